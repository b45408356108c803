"""Draws the programs of the fuzz: plain values, by a seed (fuzz_programs.py makes them run)."""

import numpy as np

OPTIMIZERS = {
    "SGD": {"learning_rate": 0.05},
    "SGD momentum": {"learning_rate": 0.02, "momentum": 0.9},
    "SGD nesterov": {"learning_rate": 0.02, "momentum": 0.9, "nesterov": True},
    "Adam": {"learning_rate": 0.01},
    "Adam amsgrad": {"learning_rate": 0.01, "amsgrad": True},
    "AdamW": {"learning_rate": 0.01},
    "RMSprop": {"learning_rate": 0.005},
    "RMSprop momentum": {"learning_rate": 0.005, "momentum": 0.5},
    "Lion": {"learning_rate": 0.002},
    "Nadam": {"learning_rate": 0.01},
    "Adagrad": {"learning_rate": 0.05},
    "Adadelta": {"learning_rate": 0.5},
    "Adamax": {"learning_rate": 0.01},
    "Ftrl": {"learning_rate": 0.05},
    "Adafactor": {"learning_rate": 0.01},
    "Lamb": {"learning_rate": 0.01},
}

_LAYERS = {
    "features": lambda workers: [
        *("dense", "dense", "batch norm", "layer norm", "spectral", "residual", "activity"),
        *("unit norm", "dense constraint", "frozen", "add_loss", "gru state"),
        *(["dropout", "noise", "alpha dropout"] if workers == 1 else ["no dropout"]),
    ],
    "image": lambda workers: [
        *("conv", "conv", "depthwise", "separable", "batch norm", "group norm", "pool"),
        *(["spatial dropout", "flip"] if workers == 1 else ["no dropout"]),
    ],
    "tokens": lambda workers: [
        *("gru", "lstm", "bidirectional", "conv1d", "attention", "layer norm", "batch norm"),
        *(["dropout", "recurrent dropout"] if workers == 1 else ["no dropout"]),
    ],
}


def draw(seed, workers=1):
    """The program of a seed: a dict of names and plain values, its description.

    Args:
        workers: with more than one, nothing of it may depend on which worker it is: no noise,
            no callback that stops where one worker is in its block.
    """
    rng = np.random.default_rng([seed, workers])

    def one(*choices, p=None):
        return choices[rng.choice(len(choices), p=p)]

    def chance(p):
        return bool(rng.random() < p)

    what = {"seed": seed, "workers": workers}
    what["inputs"] = one("features", "features", "image", "tokens", "two")
    kinds = ["features", "tokens"] if what["inputs"] == "two" else [what["inputs"]]
    what["layers"] = {
        kind: [one(*_LAYERS[kind](workers)) for _ in range(rng.integers(1, 4))] for kind in kinds
    }
    what["build"] = "functional"
    if what["inputs"] != "two":
        what["build"] = one("functional", "sequential", "unbuilt", "subclass")
    what["outputs"] = one(1, 2) if what["build"] == "functional" else 1
    what["regularizer"] = chance(0.25)
    what["normalization"] = what["inputs"] in ("features", "two") and chance(0.2)
    what["step"] = one("keras", "compute_loss", "by hand", p=[0.7, 0.15, 0.15])
    if what["build"] != "functional":
        what["step"] = "keras"
    loss = ["string", "object", "sum", "example", "scalar"]
    what["loss"] = "string" if what["step"] == "by hand" else one(*loss)
    what["loss_weights"] = one(None, 0.5) if what["step"] != "by hand" else None
    what["metrics"] = one("none", "strings", "objects", "weighted")

    what["optimizer"] = one(*OPTIMIZERS)
    what["arguments"] = {
        name: value
        for name, value, p in (
            ("clipnorm", 0.5, 0.15),
            ("global_clipnorm", 0.7, 0.15),
            ("clipvalue", 0.05, 0.15),
            ("weight_decay", 0.02, 0.15),
            ("use_ema", True, 0.15),
            ("gradient_accumulation_steps", int(rng.integers(2, 4)), 0.15),
        )
        if chance(p)
    }
    clips = [name for name in what["arguments"] if "clip" in name]
    for name in clips[1:]:
        del what["arguments"][name]
    if "use_ema" in what["arguments"]:
        what["arguments"]["ema_momentum"] = 0.8
        what["arguments"]["ema_overwrite_frequency"] = one(None, 1, 3)
    what["rate"] = one("number", "number", "ExponentialDecay", "CosineDecay", "Piecewise")
    what["K"] = one(1, 2, 3, 4, 7, 100, "growing")
    what["overlap"] = isinstance(what["K"], int) and chance(0.15)

    what["data"] = one("arrays", "dataset", "unknown", "pydataset", "generator", "repeated")
    if workers > 1 and chance(0.4):
        what["data"] = "own"
    what["batches"] = int(rng.integers(3, 7))
    what["left_over"] = int(one(0, 0, 3))
    what["weights"] = one(None, None, "sample", "class")
    if what["outputs"] == 2 or what["data"] not in ("arrays", "dataset", "unknown"):
        what["weights"] = one(None, "sample")
    if what["step"] == "by hand" or what["data"] == "own":
        what["weights"] = None
    what["validation"] = one(None, "arrays", "dataset", "split")
    if what["validation"] == "split" and (what["data"] != "arrays" or workers > 1):
        what["validation"] = "dataset"
    what["steps_per_execution"] = int(one(1, 1, 2, 3, 5))
    if what["data"] in ("generator", "repeated"):
        what["left_over"] = 0
    what["jit"] = one(False, True, "auto", p=[0.8, 0.1, 0.1])
    what["eager"] = chance(0.06)
    if what["eager"]:
        what["jit"], what["steps_per_execution"] = False, 1
    what["policy"] = one(
        "float64", "float32", "mixed_bfloat16", "mixed_float16", p=[0.6, 0.2, 0.1, 0.1]
    )

    drawn = [name for names in what["layers"].values() for name in names]
    if what["policy"].startswith("mixed") and {"add_loss", "activity"} & set(drawn):
        what["policy"] = "float32"  # Keras cannot add up losses of several dtypes
    recurrent = [d for d in drawn if d in ("gru", "lstm", "bidirectional", "recurrent dropout")]
    if len(recurrent) > 1 and what["jit"] is True:  # XLA compiles plain Keras's for minutes
        what["jit"] = False
    if what["policy"] == "mixed_float16" and {"spectral", "unit norm"} & set(drawn):
        what["policy"] = "float32"  # they divide by an epsilon that float16 does not have

    what["epochs"] = int(rng.integers(1, 4))
    callbacks = ["ReduceLROnPlateau", "LearningRateScheduler", "EarlyStopping", "SwapEMAWeights"]
    callbacks += ["SetWeights", "Evaluate", "ModelCheckpoint", "TerminateOnNaN", "SetRate"]
    if workers == 1:
        callbacks += ["StopAtBatch", "SetWeightsAtBatch"]
    what["callbacks"] = [name for name in callbacks if chance(0.15)]
    unfit = {"SwapEMAWeights"} if "use_ema" not in what["arguments"] else set()
    if what["rate"] != "number":
        unfit |= {"ReduceLROnPlateau", "LearningRateScheduler", "SetRate"}
    what["callbacks"] = [name for name in what["callbacks"] if name not in unfit]
    what["between"] = one(None, None, "fit", "set_weights", "load_weights", "save", "compile")
    if what["between"] == "save" and (
        what["build"] == "subclass"
        or what["step"] != "keras"
        or what["loss"] not in ("string", "object", "sum")
    ):
        what["between"] = "load_weights"
    what["on_batch"] = int(one(0, 0, 0, 3))  # calls of train_on_batch before fit
    return what
