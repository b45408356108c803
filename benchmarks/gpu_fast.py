"""What `gpu_check.py` measures: each result one JSON line."""

import gc
import statistics
import time

import keras
import numpy as np
import tensorflow as tf
from gpu_machine import DEVICE, GPUS, NEVER, say

import tf_blockmomentum as tfbm


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


def fast(build, quick, steps, without_xla=True, executions=(1, 32)):
    """Plain Keras beside ours."""
    steps = 32 if quick else steps
    for each in executions:
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
    fast(transformer, quick, 64, without_xla=False, executions=[1])


def fast_resnet18(quick):
    fast(resnet18, quick, 128, without_xla=False)


def fast_resnet50(quick):
    fast(resnet50, quick, 32, without_xla=False, executions=[1])


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
    """Ours beside Keras and TensorFlow's buffer on the device, which can crash; of data without
    an end and with one."""
    build, data = feed(quick)
    steps = 32 if quick else 128

    def ours(strategy):
        return strategy.experimental_distribute_dataset(data)

    def with_an_end(strategy):
        return strategy.experimental_distribute_dataset(data.take(10**6))

    def tensorflows(strategy):
        return strategy.experimental_distribute_dataset(data, tf.distribute.InputOptions())

    for each in (1, 32):
        for what, blocks, source in (
            ("Keras", None, lambda _: data),
            ("blocks", {"sync_period": NEVER}, ours),
            ("blocks, data with an end", {"sync_period": NEVER}, with_an_end),
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
