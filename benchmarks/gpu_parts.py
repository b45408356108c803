"""The parts of `gpu_check.py`: each prints one JSON line for each result."""

import argparse
import gc
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tf_blockmomentum as tfbm

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "examples")]

FEATURES, CLASSES, BATCH = 16, 4, 8
NEVER = 10**9  # a block that does not end
GPUS = tf.config.list_physical_devices("GPU")
DEVICE = "GPU:0" if GPUS else "CPU:0"


def say(**row):
    print(json.dumps(row), flush=True)


def machine(quick):
    """What it is measured on."""
    names = [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in GPUS]
    say(
        GPUs=", ".join(map(str, names)) or "none: checked on the CPU, with small sizes",
        cores=len(os.sched_getaffinity(0)),
        TensorFlow=tf.__version__,
        Keras=keras.__version__,
        Python=sys.version.split()[0],
    )


# -- right ------------------------------------------------------------------------------------


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


def backup(quick):
    """A run that is stopped in mid-epoch and goes on, beside one that is not."""
    import subprocess

    with tempfile.TemporaryDirectory() as directory:
        digests = []
        for place, stop in (("whole", 0), ("stopped", 21), ("stopped", 0)):
            command = [sys.executable, __file__, "backup_run", "--stop", str(stop)]
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


# -- fast -------------------------------------------------------------------------------------


def mlp(quick):
    widths, size = ((64, 64), 16) if quick else ((1536, 1536, 768), 128)
    layers = [keras.layers.Dense(n, activation="relu") for n in widths]
    x, y = np.random.default_rng(0).normal(size=[size, 784]), np.arange(size) % 10
    model = keras.Sequential([keras.Input([784]), *layers, keras.layers.Dense(10)])
    return model, x.astype("float32"), y


def transformer(quick):
    from text_transformer import transformer as build

    size, length = (2, 16) if quick else (32, 256)
    x = np.random.default_rng(0).integers(256, size=[2, size, length])
    return build(length, layers=1 if quick else 6, width=32 if quick else 512), x[0], x[1]


def images(size, pixels):
    x = np.random.default_rng(0).normal(size=[size, pixels, pixels, 3])
    return x.astype("float32"), np.arange(size) % 10


def resnet18(quick):
    from cifar10_resnet import resnet18 as build

    return build(4 if quick else 64, pre_activation=False), *images(4 if quick else 128, 32)


def resnet50(quick):
    pixels, size = (32, 2) if quick else (224, 64)
    model = keras.applications.ResNet50(
        weights=None, input_shape=[pixels, pixels, 3], classes=10, classifier_activation=None
    )
    return model, *images(size, pixels)


class Clock(keras.callbacks.Callback):
    """Seconds of each epoch, until all of it is computed."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):  # the epoch's logs have been read by now
        self.epochs.append(time.perf_counter() - self._began)


def train(build, quick, steps, blocks=None, each=1, jit=True, data=None, epochs=4):
    """Steps a second (median over epochs, the first left out), seconds until the first epoch's
    end, and the peak of memory in MiB. `blocks`: arguments of BlockMomentum; None: plain Keras."""
    keras.backend.clear_session()
    gc.collect()
    before = 0
    if GPUS:
        tf.config.experimental.reset_memory_stats(DEVICE)
        before = tf.config.experimental.get_memory_info(DEVICE)["current"]
    plain = blocks is None
    strategy = tf.distribute.get_strategy() if plain else tfbm.MultiDeviceBlockStrategy([DEVICE])
    with strategy.scope():
        model, x, y = build(quick)
        inner = keras.optimizers.SGD(0.001, momentum=0.9)
        model.compile(
            inner if plain else tfbm.BlockMomentum(inner, **blocks),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit,
            steps_per_execution=each,
        )
    clock = Clock()
    training = [] if plain else [tfbm.BlockTraining(jit_compile=jit)]
    data = tf.data.Dataset.from_tensors((x, y)).repeat() if data is None else data(strategy)
    model.fit(data, steps_per_epoch=steps, epochs=epochs, verbose=0, callbacks=[*training, clock])
    peak = None
    if GPUS:
        peak = (tf.config.experimental.get_memory_info(DEVICE)["peak"] - before) / 2**20
    return steps / statistics.median(clock.epochs[1:]), clock.epochs[0], peak


def fast(build, quick, steps, without_xla=True):
    """Plain Keras beside ours."""
    steps = 32 if quick else steps
    for each in (1, 32):
        rates = {}
        for name, blocks, jit in (
            ("Keras, XLA", None, True),
            ("blocks, XLA", {"sync_period": NEVER}, True),
            ("blocks, K=16, XLA", {"sync_period": 16}, True),
            ("Keras, no XLA", None, False),
            ("blocks, no XLA", {"sync_period": NEVER}, False),
        ):
            if not jit and not without_xla:
                continue
            rate, first, peak = train(build, quick, steps, blocks, each, jit)
            rates[name] = rate
            say(
                what=name,
                steps_per_execution=each,
                steps_per_second=rate,
                share_of_Keras=rate / rates["Keras, XLA" if jit else "Keras, no XLA"],
                first_epoch_seconds=first,
                peak_MiB=peak,
            )


def fast_mlp(quick):
    fast(mlp, quick, 512)


def fast_transformer(quick):
    fast(transformer, quick, 64, without_xla=False)


def fast_resnet18(quick):
    fast(resnet18, quick, 128)


def fast_resnet50(quick):
    fast(resnet50, quick, 32, without_xla=False)


def boundary(quick):
    """Seconds of a boundary, beside a pass that reads and writes as much as it has to: weights,
    anchor and velocity."""
    for millions in (0.1, 1.0) if quick else (1.0, 5.0, 25.0, 100.0):
        weights = int(millions * 1e6)
        source, target = tf.Variable(tf.ones([3 * weights])), tf.Variable(tf.zeros([3 * weights]))

        @tf.function(jit_compile=True)
        def copy(source=source, target=target):
            target.assign(source + 1.0)
            return target[0]

        floor = median(lambda copy=copy: copy().numpy())
        for form, block in (("no overlap", {}), ("overlap", {"overlap": True})):
            strategy = tfbm.MultiDeviceBlockStrategy([DEVICE])
            with strategy.scope():
                parts = [keras.Variable(tf.zeros([weights // 8]), name=f"w{i}") for i in range(8)]
                optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=4, **block)
                optimizer.build(parts)

            def step(data, optimizer=optimizer, parts=parts):
                optimizer.apply([tf.ones_like(v) * data[0, 0] for v in parts])

            def blocks_of(
                count, period, optimizer=optimizer, strategy=strategy, step=step, w=parts[0]
            ):
                optimizer.sync_period = period
                loop = tfbm.BlockLoop(step, optimizer, strategy, jit_compile=True)
                data = tf.data.Dataset.from_tensors(tf.ones([1, 1])).repeat()
                iterator = iter(strategy.experimental_distribute_dataset(data))
                loop.run(iterator, 8)
                loop.flush()

                def run():
                    loop.run(iterator, count)
                    loop.flush()
                    w.numpy()

                return median(run)

            steps = 32
            spent = (blocks_of(steps, 2) - blocks_of(steps, NEVER)) / (steps / 2 - 1)
            say(
                form=form,
                weights_in_millions=millions,
                boundary_ms=1000 * spent,
                pass_ms=1000 * floor,
                share_of_bandwidth=floor / spent,
                GB_per_second_of_a_pass=24 * weights / floor / 1e9,
            )


def median(call, times=7):
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def feed(quick):
    """A small network on large images, which come from the host anew at every step."""
    pixels, size = (16, 4) if quick else (128, 64)
    x, y = images(2 * size, pixels)

    def build(_):
        model = keras.Sequential(
            [
                keras.Input([pixels, pixels, 3]),
                *(
                    keras.layers.Conv2D(n, 3, strides=2, activation="relu", padding="same")
                    for n in (32, 64, 128)
                ),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(10),
            ]
        )
        return model, x, y

    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(size, drop_remainder=True)
    return build, data.prefetch(2)


# not `input`: Python has one
def part_input(quick):
    """Ours, which takes the next batch of an execution while a step is launched, beside Keras and
    TensorFlow's buffer on the device, which can crash."""
    build, data = feed(quick)
    steps = 32 if quick else 128

    def ours(strategy):
        return strategy.experimental_distribute_dataset(data)

    def tensorflows(strategy):
        return strategy.experimental_distribute_dataset(data, tf.distribute.InputOptions())

    for each in (1, 32):
        for what, blocks, source in (
            ("Keras", None, lambda _: data),
            ("blocks", {"sync_period": NEVER}, ours),
            ("blocks, TensorFlow's buffer", {"sync_period": NEVER}, tensorflows),
        ):
            rate, _, _ = train(build, quick, steps, blocks, each, True, source, epochs=3)
            say(what=what, steps_per_execution=each, steps_per_second=rate)


def overlap(quick):
    """Blocks of two processes, through TensorFlow's ring."""
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    options = tf.distribute.experimental.CommunicationOptions(implementation=ring)
    strategy = tfbm.MultiWorkerBlockStrategy(communication_options=options)
    steps = 32 if quick else 256
    for what, block in (
        ("no communication", {"sync_period": NEVER}),
        ("K=32", {"sync_period": 32}),
        ("K=32, overlap", {"sync_period": 32, "overlap": True}),
    ):
        with strategy.scope():
            model, x, y = mlp(quick)
            model.compile(
                tfbm.BlockMomentum(keras.optimizers.SGD(0.001), **block),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                steps_per_execution=32,
            )
        clock = Clock()
        data = strategy.distribute_datasets_from_function(
            lambda _, x=x, y=y: tf.data.Dataset.from_tensors((x, y)).repeat()
        )
        model.fit(
            data,
            steps_per_epoch=steps,
            epochs=3,
            verbose=0,
            callbacks=[tfbm.BlockTraining(jit_compile=True), clock],
        )
        say(what=what, steps_per_second=steps / statistics.median(clock.epochs[1:]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stop", type=int, default=0)
    parser.add_argument("--directory")
    options = parser.parse_args()
    if options.part == "backup_run":
        backup_run(options)
        return
    part = globals()["part_input" if options.part == "input" else options.part]
    part(options.quick or not GPUS)


if __name__ == "__main__":
    main()
