"""Random small Keras programs, for test_fuzz.py.

    what = draw(seed)             # a dict of plain values, from numpy's default_rng
    seen = run(what, wrap=...)    # trains it; what a user of the script sees of it

`wrap=False` is Keras alone. `copies` is how many times each batch holds its examples: two workers
that share out a batch of two copies have the same data each.
"""

import tempfile

import keras
import numpy as np
import tensorflow as tf
from fuzz_data import (
    BATCH,
    data_of,
    elements,
    repeat_in_batches,
    some_backwards,
    training_data,
    validation_data,
)
from fuzz_draw import OPTIMIZERS
from fuzz_models import CUSTOM, build
from helpers import scope

import tf_blockmomentum as tfbm

# -- compile ----------------------------------------------------------------------------------


def scalar_crossentropy(y, y_pred):
    return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, y_pred))


def example_crossentropy(y, y_pred):
    return keras.losses.sparse_categorical_crossentropy(y, y_pred)


def scalar_squares(y, y_pred):
    return keras.ops.mean(keras.ops.square(y - y_pred))


def example_squares(y, y_pred):
    return keras.ops.mean(keras.ops.square(y - y_pred), axis=-1)


def losses_of(what):
    a = {
        "string": lambda: "sparse_categorical_crossentropy",
        "object": lambda: keras.losses.SparseCategoricalCrossentropy(),
        "sum": lambda: keras.losses.SparseCategoricalCrossentropy(reduction="sum"),
        "example": lambda: example_crossentropy,
        "scalar": lambda: scalar_crossentropy,
    }[what["loss"]]()
    b = {
        "string": lambda: "mse",
        "object": lambda: keras.losses.Huber(),
        "sum": lambda: keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        "example": lambda: example_squares,
        "scalar": lambda: scalar_squares,
    }[what["loss"]]()
    return a if what["outputs"] == 1 else {"a": a, "b": b}


def metrics_of(what):
    if what["step"] == "by hand" or what["metrics"] == "none":
        return {}
    objects = what["metrics"] != "strings"
    a = ["accuracy"]
    if objects:
        a = [
            keras.metrics.SparseCategoricalAccuracy(name="hits"),
            keras.metrics.SparseCategoricalCrossentropy(name="nats"),
        ]
    b = [keras.metrics.MeanAbsoluteError(name="error")] if objects else ["mae"]
    metrics = a if what["outputs"] == 1 else {"a": a, "b": b}
    return {"weighted_metrics" if what["metrics"] == "weighted" else "metrics": metrics}


def optimizer_of(what, wrap):
    name = what["optimizer"]
    settings = {**OPTIMIZERS[name], **what["arguments"]}
    rate = settings["learning_rate"]
    schedules = keras.optimizers.schedules
    settings["learning_rate"] = {
        "number": lambda: rate,
        "ExponentialDecay": lambda: schedules.ExponentialDecay(rate, 3, 0.7),
        "CosineDecay": lambda: schedules.CosineDecay(rate, 12, alpha=0.1, warmup_steps=0),
        "Piecewise": lambda: schedules.PiecewiseConstantDecay([2, 5], [rate, rate / 2, rate / 4]),
    }[what["rate"]]()
    inner = getattr(keras.optimizers, name.split()[0])(**settings)
    if not wrap:
        return inner
    period = tfbm.schedules.GrowingPeriod(1, 3, 4) if what["K"] == "growing" else what["K"]
    return tfbm.BlockMomentum(inner, period, block_momentum=0.0, overlap=what["overlap"])


def compile_(model, what, wrap):
    loss = losses_of(what)
    weights = what["loss_weights"]
    if weights is not None:
        weights = {"a": weights, "b": 1.5} if what["outputs"] == 2 else [weights]
    metrics = metrics_of(what)
    if what["step"] == "by hand":
        loss = None
    model.compile(
        optimizer_of(what, wrap),
        loss,
        loss_weights=weights,
        steps_per_execution=what["steps_per_execution"],
        jit_compile=what["jit"],
        run_eagerly=what["eager"],
        **metrics,
    )


# -- callbacks --------------------------------------------------------------------------------


class Recorder(keras.callbacks.Callback):
    """What batches' logs say, and the learning rate and the count of steps at each epoch."""

    def __init__(self):
        super().__init__()
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append([batch, *(float(logs[name]) for name in sorted(logs))])

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        self.epochs.append([float(optimizer.learning_rate), int(optimizer.iterations)])


class SetWeights(keras.callbacks.Callback):
    """At the beginning of an epoch, or after a batch."""

    def __init__(self, batch=None):
        super().__init__()
        self.batch = batch

    def _set(self):
        for v in self.model.trainable_variables:
            v.assign(0.9 * v)

    def on_epoch_begin(self, epoch, logs=None):
        if self.batch is None and epoch:
            self._set()

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            self._set()


class StopAtBatch(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch >= 2:
            self.model.stop_training = True


class SetRate(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 2:
            self.model.optimizer.learning_rate = float(self.model.optimizer.learning_rate) * 0.8


class Evaluate(keras.callbacks.Callback):
    def __init__(self, settings):
        super().__init__()
        self.settings, self.seen = settings, []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(list(self.model.evaluate(verbose=0, return_dict=True,
                                                  **self.settings).values()))  # fmt: skip


def callbacks_of(what, evaluation, path):
    monitor = "val_loss" if what["validation"] and what["step"] != "by hand" else "loss"
    if what["step"] == "by hand":
        monitor = "val_own" if what["validation"] else "own"
    make = {
        "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau(
            monitor, factor=0.5, patience=1, min_delta=0.5, mode="min"
        ),
        "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: rate * 0.7
        ),
        "EarlyStopping": lambda: keras.callbacks.EarlyStopping(  # a falling loss is no better
            monitor, patience=1, mode="max", restore_best_weights=True
        ),
        "SwapEMAWeights": lambda: keras.callbacks.SwapEMAWeights(),
        "SetWeights": lambda: SetWeights(),
        "SetWeightsAtBatch": lambda: SetWeights(1),
        "SetRate": lambda: SetRate(),
        "StopAtBatch": lambda: StopAtBatch(),
        "Evaluate": lambda: Evaluate(evaluation),
        "TerminateOnNaN": lambda: keras.callbacks.TerminateOnNaN(),
        "ModelCheckpoint": lambda: tfbm.ChiefOnly(
            keras.callbacks.ModelCheckpoint(
                path + "/best.weights.h5", monitor, mode="min", save_best_only=True,
                save_weights_only=True,
            )
        ),
    }  # fmt: skip
    return {name: make[name]() for name in what["callbacks"]}


# -- the program ------------------------------------------------------------------------------


def run(what, strategy=None, wrap=True, copies=1):
    """Trains; returns a dict of lists of numbers and arrays, by what they are."""
    if what["policy"] == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(what["policy"])
    try:
        with tempfile.TemporaryDirectory() as path:
            return _run(what, strategy, wrap, copies, path)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def _run(what, strategy, wrap, copies, path):
    keras.utils.set_random_seed(what["seed"])
    arrays = data_of(what)
    with scope(strategy):
        model = build(what, arrays)
        compile_(model, what, wrap)
    own = what["data"] == "own" and strategy is not None
    some = elements(what, some_backwards(arrays, copies), weighted=False)
    evaluation = {"x": some[0], "y": some[1], "batch_size": BATCH * copies}
    seen = {"on batch": [], "batches": [], "epochs": []}
    own_batch = elements(what, {k: a[:BATCH] for k, a in arrays.items()}, weighted=False)
    for _ in range(what["on_batch"]):
        logs = model.train_on_batch(*own_batch, return_dict=True)
        seen["on batch"].append([float(logs[name]) for name in sorted(logs)])
    for number in range(1 if what["between"] is None else 2):
        # Made anew: how far a generator has been read ahead when a fit ends is nobody's promise.
        training = training_data(what, strategy, wrap, arrays, 1 if own else copies)
        training |= validation_data(what, arrays, copies)
        recorder, callbacks = Recorder(), callbacks_of(what, evaluation, path)
        ours = [tfbm.BlockTraining(refresh_statistics=0)] if wrap else []
        history = model.fit(
            **training, verbose=0, callbacks=[*ours, *callbacks.values(), recorder]
        ).history
        seen["batches"] += recorder.batches
        seen["epochs"] += recorder.epochs
        for name, values in history.items():
            seen[f"history {name} {number}"] = values
        if "Evaluate" in callbacks:
            seen[f"evaluated {number}"] = callbacks["Evaluate"].seen
        seen[f"weights {number}"] = model.get_weights()
        if number == 0:
            model = between(what, model, strategy, wrap, path)
    evaluated = model.evaluate(**evaluation, verbose=0, return_dict=True)
    seen |= {f"evaluate {name}": value for name, value in evaluated.items()}
    outputs = model.predict(tf.data.Dataset.from_tensor_slices(some[0]).batch(BATCH * copies),
                            verbose=0)  # fmt: skip
    # Of each batch of copies the first is what plain Keras has.
    first = repeat_in_batches(np.arange(len(some_backwards(arrays, 1)["a"])), copies)
    kept = np.unique(first, return_index=True)[1]
    seen["predict"] = [np.asarray(part)[kept] for part in keras.tree.flatten(outputs)]
    return seen


def between(what, model, strategy, wrap, path):
    """What happens between two fits; returns the model that goes on."""
    kind = what["between"]
    if kind == "set_weights":
        model.set_weights([0.8 * w if w.dtype.kind == "f" else w for w in model.get_weights()])
    elif kind == "load_weights":
        file = path + "/w.weights.h5"
        model.save_weights(file)
        model.load_weights(file)
    elif kind == "save":
        model.save(path + "/model.keras")
        with scope(strategy):
            model = keras.models.load_model(path + "/model.keras", custom_objects=CUSTOM)
    elif kind == "compile":
        with scope(strategy):
            compile_(model, what, wrap)
    return model
