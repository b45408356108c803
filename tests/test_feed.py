"""Batches that are copied to a device: once, ahead of their steps, and trained on as others."""

import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import classifier, crossentropy, examples, run_python, scope

import tf_blockmomentum as tfbm
from tf_blockmomentum.feed import Feed


class Input(keras.layers.Layer):
    """Of a batch of several tensors: ragged, sparse, text and numbers."""

    def call(self, x):
        parts = (
            tf.reduce_sum(x["ragged"], axis=1),
            tf.sparse.to_dense(x["sparse"]),
            tf.strings.to_number(x["text"])[:, None],
            tf.cast(x["number"], tf.float32),
        )
        return tf.concat(parts, axis=1)


class Model(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.last = Input(), keras.layers.Dense(1)

    def call(self, x):
        return self.last(self.first(x))


def mixed(count):
    """Batches of 4 of such, the last one smaller, of which neither length nor shapes are known."""
    rng = np.random.default_rng(0)
    data = []
    for i in range(count):
        size = 4 if i < count - 1 else 3
        values = rng.normal(size=[size, 2]).astype("float32")
        x = {
            "ragged": tf.RaggedTensor.from_row_lengths(
                rng.normal(size=[2 * size, 2]).astype("float32"), [2] * size
            ),
            "sparse": tf.sparse.from_dense(values * (values > 0)),
            "text": tf.strings.as_string(values[:, 0]),
            "number": tf.constant(rng.integers(0, 3, [size, 1])),
        }
        data.append((x, values.sum(axis=1, keepdims=True)))
    spec = (
        {
            "ragged": tf.RaggedTensorSpec([None, None, 2], tf.float32, ragged_rank=1),
            "sparse": tf.SparseTensorSpec([None, 2], tf.float32),
            "text": tf.TensorSpec([None], tf.string),
            "number": tf.TensorSpec([None, 1], tf.int64),
        },
        tf.TensorSpec([None, 1], tf.float32),
    )
    return tf.data.Dataset.from_generator(lambda: iter(data), output_signature=spec)


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("what", ["length known", "steps_per_epoch", "mixed"])
def test_it_trains_as_on_the_host(strategy_of, what, each):
    """On another device than the host's: statistics are of the same batches too."""
    x, y = examples(90)
    results = []
    for device in ("CPU:0", "CPU:1"):
        strategy = strategy_of(device)
        keras.utils.set_random_seed(0)
        with scope(strategy):
            model = Model() if what == "mixed" else classifier()
            loss = "mse" if what == "mixed" else crossentropy()
            optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.05), sync_period=3)
            model.compile(optimizer, loss, steps_per_execution=each)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)  # 12 batches, the last of 2
        settings = {"epochs": 2}
        if what == "mixed":
            data = mixed(7)
        elif what == "steps_per_epoch":
            data, settings = data.repeat(), {"epochs": 3, "steps_per_epoch": 8}
        iterator = iter(strategy.experimental_distribute_dataset(data))
        assert Feed(strategy).copies(iterator) == (device == "CPU:1")
        callbacks = [tfbm.BlockTraining(refresh_statistics=3)]
        history = model.fit(data, verbose=0, callbacks=callbacks, **settings).history
        results.append(([v.numpy() for v in model.variables], history, optimizer.blocks))
    (host, *told), (device, *other) = results
    assert told == other
    for a, b in zip(host, device, strict=True):
        np.testing.assert_array_equal(a, b)


# A loss of each batch, on a device that counts the copies from and to it.
PROGRAM = """
import ctypes, sys
import numpy as np, tensorflow as tf
from tensorflow.python.framework.load_library import load_pluggable_device_library

load_pluggable_device_library(sys.argv[1])
device = ctypes.CDLL(sys.argv[1])
import tf_blockmomentum as tfbm
from tf_blockmomentum.feed import is_there
from tf_blockmomentum.steps import LocalSteps

BATCHES, SIZE = 40, 64 * 1024
strategy = tfbm.MultiDeviceBlockStrategy(["EMULATED:0"])
data = tf.data.Dataset.range(1, BATCHES + 1)
data = data.map(lambda i: tf.fill([SIZE], tf.cast(i, tf.float32))).batch(1)

def losses(each, peek):
    steps = LocalSteps(tf.nn.l2_loss, strategy, False)
    iterator = iter(strategy.experimental_distribute_dataset(data))
    taken, following, found = 0, None, []
    while True:
        count, loss, following = steps(iterator, each, following, peek)
        taken += count
        found += [float(loss)] if count else []
        if count < each or (peek and not is_there(following)):
            return taken, found

for each in (1, 8):
    for peek in (True, False):
        device.copied(0, 1), device.copied(1, 1)
        taken, found = losses(each, peek)
        assert taken == BATCHES
        last = np.arange(each, BATCHES + 1, each)
        np.testing.assert_allclose(found, SIZE * last**2 / 2)
        print("copied", each, peek, device.copied(0, 1), device.copied(1, 1))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="a compiler makes the device")
@pytest.mark.timeout(150)
def test_a_batch_crosses_once(tmp_path):
    """To the device, and never back: in loops and without, asked for ahead or in time. Where a
    branch or a loop is placed decides about it, which no test on the host's devices can tell."""
    folder = Path(tf.sysconfig.get_lib())
    command = ["gcc", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-o", tmp_path / "device.so"]
    command += [Path(__file__).parent / "emulated_device.c", f"-I{tf.sysconfig.get_include()}"]
    command += [f"-L{folder}", "-l:libtensorflow_framework.so.2", "-lpthread"]
    subprocess.run(command, check=True, timeout=60)
    text = run_python("-c", PROGRAM, tmp_path / "device.so", limit=80)
    told = [line.split()[3:] for line in text.splitlines() if line.startswith("copied")]
    assert told == [["40", "0"]] * 4
