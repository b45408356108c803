"""A small training job for the failure tests: trains, fails as told, writes what came out.

    python job.py OPTIONS, a JSON object; see DEFAULTS.

A failure is `{"worker": 1, "how": "kill", "at": "batch", "n": 7}`, and happens once: it leaves
a file in `marks` before it does, which is also the proof that it happened.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
import time

DEFAULTS = {
    "out": None,  # directory for result-<worker>.json, and for backups
    "backup": True,
    "every": 2,
    "fits": {"": {}},  # several trainings in one process: name -> options of its own
    "optimizer": "adam",
    "jit": False,
    "overlap": False,
    "compression": None,
    "steps_per_execution": 1,
    "epochs": 3,
    "steps_per_epoch": None,
    "known_length": True,
    "devices": 0,  # 0: several workers; 1: no strategy; more: several devices
    "failures": [],
    "marks": None,
    "validate": False,
    "stop": None,  # end each fit, by an exception, after so many batches
    "poison": None,  # iteration at which the last worker's weights become NaN
    "on_nonfinite": "raise",
}
given = {**DEFAULTS, **json.loads(sys.argv[1])}
task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {"index": 0})
worker = task["index"]


def fail(at, n=None):
    """Does what `failures` say for this worker at this place."""
    for number, failure in enumerate(given["failures"]):
        if (failure["worker"], failure["at"]) != (worker, at) or failure.get("n") not in (None, n):
            continue
        mark = pathlib.Path(given["marks"], f"failure-{number}")
        if mark.exists() and not failure.get("always"):
            continue
        with mark.open("a") as file:
            file.write("x")
        how = failure["how"]
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "sleep":
            time.sleep(failure.get("seconds", 1000))
        elif how == "raise":
            raise RuntimeError("a mistake in the script")


fail("start")
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from helpers import classifier, crossentropy, examples, scope, unknown_length  # noqa: E402

import tf_blockmomentum as tfbm  # noqa: E402

if given["devices"] > 1:
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * given["devices"]
    tf.config.set_logical_device_configuration(cpu, logical)
    strategy = tfbm.MultiDeviceBlockStrategy([f"CPU:{i}" for i in range(given["devices"])])
elif given["devices"] == 1:
    strategy = None
else:
    strategy = tfbm.MultiWorkerBlockStrategy(compression=given["compression"])
fail("joined")


class Stopped(Exception):
    pass


class Failing(keras.callbacks.Callback):
    def __init__(self, options):
        super().__init__()
        self.options, self.batches = options, 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        iterations = int(self.model.optimizer.iterations.numpy())
        fail("batch", iterations)
        if iterations == self.options["poison"] and worker == strategy.num_replicas_in_sync - 1:
            kernel = self.model.weights[0].value  # as if the step had done it: no new anchor
            kernel.assign(kernel * float("nan"))
        if self.batches == self.options["stop"]:
            raise Stopped

    def on_test_begin(self, logs=None):
        fail("validation")


def fail_around(name, owner, function):
    original = getattr(owner, function)

    def failing(*args, **kwargs):
        fail(name)
        return original(*args, **kwargs)

    setattr(owner, function, failing)


fail_around("backup", os, "replace")  # a piece is written, but not yet in its place
fail_around("boundary", tfbm.BlockLoop, "_end_block")


def inner(name):
    decay = keras.optimizers.schedules.ExponentialDecay(0.05, 10, 0.9)
    return {
        "sgd": lambda: keras.optimizers.SGD(0.05),
        "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(0.01),
        "schedule": lambda: keras.optimizers.SGD(decay, momentum=0.9),
    }[name]()


def train(name, options):
    keras.utils.set_random_seed(11)
    if isinstance(strategy, tfbm.MultiWorkerBlockStrategy):
        strategy.compression = options["compression"]
    with scope(strategy):
        model = classifier(dropout=True)
        model.compile(
            tfbm.BlockMomentum(
                inner(options["optimizer"]), sync_period=3, overlap=options["overlap"]
            ),
            crossentropy(),
            metrics=["accuracy"],
            steps_per_execution=options["steps_per_execution"],
        )
    x, y = examples(120)
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(120, seed=5).batch(12)
    if options["steps_per_epoch"]:
        data = data.repeat()
    if not options["known_length"]:
        data = unknown_length(data)
    training = tfbm.BlockTraining(options["jit"], on_nonfinite=options["on_nonfinite"])
    failing = Failing(options)
    backup = tfbm.BlockBackup(pathlib.Path(options["out"], "backup", name), options["every"])
    try:
        history = model.fit(
            data,
            epochs=options["epochs"],
            steps_per_epoch=options["steps_per_epoch"],
            validation_data=(x[:24], y[:24]) if options["validate"] else None,
            validation_batch_size=24,
            verbose=0,
            callbacks=[training, failing, *([backup] if options["backup"] else [])],
        )
    except Stopped:
        return None
    digest = hashlib.sha256()
    local = strategy.experimental_local_results if strategy else lambda v: [v]
    for variable in [*model.variables, *model.optimizer.variables]:
        for part in local(variable.value):
            digest.update(part.numpy().tobytes())
    return {
        "state": digest.hexdigest(),
        "logs": {name: values[-1] for name, values in history.history.items()},
        "batches": failing.batches,
        "blocks": model.optimizer.blocks,
        "skipped": training.skipped,
        "finite": all(np.isfinite(w).all() for w in model.get_weights()),
    }


results = {name: train(name, {**given, **own}) for name, own in given["fits"].items()}
pathlib.Path(given["out"], f"result-{worker}.json").write_text(json.dumps(results))
