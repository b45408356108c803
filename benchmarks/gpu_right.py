"""What `gpu_check.py` checks against NumPy, or to the bit: each result one JSON line."""

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from gpu_machine import DEVICE, GPUS, say

import tf_blockmomentum as tfbm

PARTS = Path(__file__).with_name("gpu_parts.py")
FEATURES, CLASSES, BATCH = 16, 4, 8


def compare(strategy, replicas, what, tolerance=1e-5, policy="float32", jit=False, **block):
    """Trains a linear classifier on unlike data for each replica; an independent one in NumPy
    says what comes out. A worker has its own replicas' data."""
    import reference

    rng = np.random.default_rng(3)
    steps, rate, period = 13, 0.5, 3
    x = rng.normal(size=[steps, replicas, BATCH, FEATURES]).astype("float32")
    y = rng.integers(CLASSES, size=[steps, replicas, BATCH])
    first = [rng.normal(size=[FEATURES, CLASSES]).astype("float32"), np.zeros(CLASSES, "float32")]
    index = int(json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0))
    workers = 2 if "TF_CONFIG" in os.environ else 1
    own = slice(index * replicas // workers, (index + 1) * replicas // workers)
    shares = [a[:, own].reshape(-1, BATCH, *a.shape[3:]) for a in (x, y)]

    with strategy.scope():
        keras.config.set_dtype_policy(policy)
        logits = keras.layers.Dense(CLASSES)
        model = keras.Sequential([keras.Input([FEATURES]), logits])
        keras.config.set_dtype_policy("float32")
        model.compile(
            tfbm.BlockMomentum(
                keras.optimizers.SGD(rate), sync_period=period, block_momentum=0.5, **block
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=4,
        )
        model.set_weights(first)
    data = strategy.distribute_datasets_from_function(
        lambda _: tf.data.Dataset.from_tensor_slices(tuple(shares))
    )
    model.fit(
        data,
        steps_per_epoch=steps,
        verbose=0,
        callbacks=[tfbm.BlockTraining(jit_compile=jit)],
    )
    batches = [[(x[s, j], y[s, j]) for j in range(replicas)] for s in range(steps)]
    settings = (first, batches, reference.softmax_gradients, rate, period, 0.5)
    if block.get("overlap"):
        tau = math.ceil(block["overlap"] * period)
        schedule, outer = reference.Constant(period), reference.block_momentum(0.5)
        seen = reference.overlapped(*settings[:4], schedule, lambda _: tau, outer)[0]
        want = seen[-1][0]
    else:
        want = reference.m_avg(*settings, nesterov=block.get("nesterov", False))[0][-1]
    got = model.get_weights()
    off = max(np.abs(g - w).max() for g, w in zip(got, want, strict=True))
    error = float(off / max(np.abs(w).max() for w in want))
    say(what=what, XLA=jit, error=error, allowed=tolerance, right=error <= tolerance)


FORMS = (
    ("M-AVG", {}),
    ("Nesterov", {"nesterov": True}),
    ("overlap=1", {"overlap": 1.0}),
    ("overlap=0.5", {"overlap": 0.5}),
)


# What one block's rounding may leave behind; feedback brings the rest in the next.
CODES = {"float16": 2e-3, "int8": 2e-2, "int4": 0.2}


def no_tf32():
    """TensorFlow multiplies float32 matrices with 10 bits on newer GPUs; oracles do not."""
    tf.config.experimental.enable_tensor_float_32_execution(False)


def right(quick):
    """One replica, every form."""
    no_tf32()
    strategy = tfbm.MultiWorkerBlockStrategy()
    jits = (False,) if quick else (False, True)
    for (what, block), jit in itertools.product(FORMS, jits):
        compare(strategy, 1, what, jit=jit, **block)
    for policy, tolerance in (("mixed_bfloat16", 2e-2), ("mixed_float16", 4e-3)):
        for jit in jits:
            compare(strategy, 1, policy, tolerance, policy, jit=jit)
    for code, tolerance in CODES.items():
        strategy.compression = code
        for jit in jits:
            compare(strategy, 1, f"deltas as {code}", tolerance, jit=jit)


def two(quick):
    """Two processes; NCCL wants a GPU for each, so they meet by TensorFlow's ring."""
    no_tf32()
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    strategy = tfbm.MultiWorkerBlockStrategy(
        communication_options=tf.distribute.experimental.CommunicationOptions(implementation=ring)
    )
    for (what, block), jit in itertools.product(FORMS, (False, True)):
        compare(strategy, 2, what, jit=jit, **block)
    for code, tolerance in CODES.items():
        strategy.compression = code
        compare(strategy, 2, f"deltas as {code}", tolerance, jit=True)


def devices(quick):
    """All GPUs; with one, two halves of it."""
    no_tf32()
    kind = "GPU" if GPUS else "CPU"
    physical = tf.config.list_physical_devices(kind)
    if len(physical) < 2:
        half = {"memory_limit": 2048} if GPUS else {}
        configuration = tf.config.LogicalDeviceConfiguration(**half)
        tf.config.set_logical_device_configuration(physical[0], [configuration] * 2)
    names = [f"{kind}:{i}" for i in range(len(tf.config.list_logical_devices(kind)))]
    strategy = tfbm.MultiDeviceBlockStrategy(names)
    for (what, block), jit in itertools.product(FORMS, (False, True)):
        compare(strategy, len(names), f"{what}, {len(names)} replicas", jit=jit, **block)


def moving_statistics(quick):
    """Moving statistics at the anchor, of an epoch's last batches, and a report of the blocks."""
    no_tf32()
    rng = np.random.default_rng(7)
    x = rng.normal(size=[12 * BATCH, FEATURES]).astype("float32")
    y = rng.integers(CLASSES, size=len(x))
    last = 5
    for jit in (False, True):
        strategy = tfbm.MultiDeviceBlockStrategy([DEVICE])
        with strategy.scope():
            dense, norm = keras.layers.Dense(8), keras.layers.BatchNormalization()
            model = keras.Sequential([keras.Input([FEATURES]), dense, norm, keras.layers.Dense(4)])
            model.compile(
                tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=4),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                steps_per_execution=4,
            )
        report = tfbm.BlockReport()
        training = tfbm.BlockTraining(jit_compile=jit, refresh_statistics=last)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH, drop_remainder=True)
        model.fit(data, epochs=2, verbose=0, callbacks=[training, report])
        kernel, bias = (v.numpy() for v in (dense.kernel, dense.bias))
        outputs = x[-last * BATCH :] @ kernel + bias
        off = [
            np.abs(got.numpy() - want).max() / np.abs(want).max()
            for got, want in (
                (norm.moving_mean, outputs.mean(0)),
                (norm.moving_variance, outputs.var(0)),
            )
        ]
        error = float(max(off))
        say(
            what=f"mean and variance of the last {last} batches",
            XLA=jit,
            error=error,
            allowed=1e-5,
            blocks_reported=sum(epoch.boundaries for epoch in report.epochs),
            right=error <= 1e-5,
        )


def backup(quick):
    """A run that is stopped in mid-epoch and goes on, beside one that is not."""
    with tempfile.TemporaryDirectory() as directory:
        digests = []
        for place, stop in (("whole", 0), ("stopped", 21), ("stopped", 0)):
            command = [sys.executable, str(PARTS), "backup_run", "--stop", str(stop)]
            command += ["--directory", f"{directory}/{place}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            if done.returncode != (9 if stop else 0):
                sys.exit(done.stderr[-2000:])
            digests.append(done.stdout.strip().splitlines()[-1] if not stop else None)
    say(
        what="stopped after 21 steps and resumed; Adam, dropout, BatchNormalization, "
        "a convolution, XLA",
        whole=digests[0][:12],
        resumed=digests[2][:12],
        right=digests[0] == digests[2],
    )


def backup_run(options):
    keras.utils.set_random_seed(5)
    tf.config.experimental.enable_op_determinism()
    strategy = tfbm.MultiDeviceBlockStrategy([DEVICE])
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([8, 8, 1]),
                keras.layers.Conv2D(8, 3, activation="relu"),
                keras.layers.BatchNormalization(),
                keras.layers.Flatten(),
                keras.layers.Dropout(0.3),
                keras.layers.Dense(4),
            ]
        )
        model.compile(
            tfbm.BlockMomentum(keras.optimizers.Adam(0.01), sync_period=4),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=2,
        )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[256, 8, 8, 1]).astype("float32"), rng.integers(4, size=256)
    count = itertools.count(2, 2)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if options.stop and next(count) > options.stop:
                os._exit(9)

    model.fit(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(16),
        epochs=3,
        verbose=0,
        callbacks=[
            tfbm.BlockTraining(jit_compile=True),
            tfbm.BlockBackup(options.directory, every=1),
            Stop(),
        ],
    )
    digest = hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights()))
    print(digest.hexdigest())
