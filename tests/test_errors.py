"""Bad input: each error says what was received, what is expected and what to do."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import classifier, crossentropy, dataset, examples, scope

import tf_blockmomentum as tfbm
from tf_blockmomentum.cost import CostModel
from tf_blockmomentum.tf_config import check_tf_config

SGD = keras.optimizers.SGD


def compiled(strategy, **settings):
    with scope(strategy):
        model = classifier()
        model.compile(tfbm.BlockMomentum(SGD(0.1)), crossentropy(), **settings)
    return model


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", None])
def test_sync_period(value):
    with pytest.raises(
        ValueError, match="`sync_period` must be a whole number of at least 1"
    ) as e:
        tfbm.BlockMomentum(SGD(), sync_period=value)
    assert f"Received: sync_period={value!r}" in str(e.value)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 2, float("nan"), "0.5"])
def test_block_momentum(value):
    with pytest.raises(ValueError, match="`block_momentum` must be a number from 0 up to") as e:
        tfbm.BlockMomentum(SGD(), block_momentum=value)
    assert f"Received: block_momentum={value!r}" in str(e.value)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), "1"])
def test_block_learning_rate(value):
    with pytest.raises(ValueError, match="`block_learning_rate` must be a number of at least 0"):
        tfbm.BlockMomentum(SGD(), block_learning_rate=value)


def test_numpy_numbers_are_numbers():
    made = tfbm.BlockMomentum(SGD(), sync_period=np.int64(4), block_momentum=np.float32(0.5))
    assert (made.sync_period, made.block_momentum) == (4, 0.5)
    json.dumps(made.get_config())


@pytest.mark.parametrize("argument", ["clipnorm", "weight_decay", "use_ema", "learning_rate"])
def test_arguments_of_the_base_class(argument):
    with pytest.raises(ValueError, match=f"does not take `{argument}`.*on the inner optimizer"):
        tfbm.BlockMomentum(SGD(), **{argument: 1.0})


def test_what_is_wrapped():
    with pytest.raises(TypeError, match=r"wraps a Keras optimizer.*Received: inner_optimizer=0.1"):
        tfbm.BlockMomentum(0.1)
    with pytest.raises(ValueError, match=r"cannot wrap a BlockMomentum.*Wrap the "):
        tfbm.BlockMomentum(tfbm.BlockMomentum(SGD()))
    with pytest.raises(ValueError, match="cannot wrap a BlockMomentum"):
        tfbm.BlockMomentum(keras.optimizers.LossScaleOptimizer(tfbm.BlockMomentum(SGD())))
    assert tfbm.BlockMomentum("adam").inner_optimizer.name == "adam"


@pytest.mark.parametrize(
    "given", [{"block_momentum": 0.5}, {"nesterov": False}, {"block_learning_rate": 1.0}]
)
def test_an_outer_optimizer_and_what_it_replaces(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match="takes no block_momentum, nesterov or block_learn") as e:
        tfbm.BlockMomentum(SGD(), outer_optimizer=SGD(1.0, name="sgd"), **given)
    assert f"Received: outer_optimizer='sgd' and {name}={value!r}. Give them to" in str(e.value)


@pytest.mark.parametrize(
    ("overlap", "error", "words"),
    [
        (1.5, ValueError, "above 0 and up to 1"),
        (0, ValueError, "Received: 0. For no overlap give overlap=False"),
        (-0.5, ValueError, "Received: -0.5"),
        (float("nan"), ValueError, "Received: nan"),
        ("half", TypeError, "Received: 'half'. Give it as a number"),
        (None, TypeError, "Received: None"),
    ],
)
def test_overlaps_that_are_no_fraction(overlap, error, words):
    with pytest.raises(error, match=r"`overlap` must be False, True \(half of the") as e:
        tfbm.BlockMomentum(SGD(), overlap=overlap)
    assert words in str(e.value)
    with pytest.raises(error):
        CostModel(0.1, 1, 1).block(4, 2, overlap=overlap)


def test_what_overlap_cannot_do():
    with pytest.raises(ValueError, match='With `overlap`, `inner_state` must be "keep"') as e:
        tfbm.BlockMomentum(SGD(), overlap=0.5, inner_state="average")
    assert "Received: overlap=0.5, inner_state='average'" in str(e.value)


def test_compression_that_is_not_known():
    text = r'None, "float16", "int8" or "int4"\. Received: compression=.int3'
    with pytest.raises(ValueError, match=text):
        tfbm.MultiWorkerBlockStrategy(compression="int3")
    with pytest.raises(ValueError, match=r"devices of one machine .*Received: compression=.int8"):
        tfbm.MultiDeviceBlockStrategy(["CPU:0"], compression="int8")


def test_outer_optimizers_that_cannot_be():
    with pytest.raises(TypeError, match=r"Received: outer_optimizer=0.1"):
        tfbm.BlockMomentum(SGD(), outer_optimizer=0.1)
    with pytest.raises(ValueError, match=r"cannot wrap a BlockMomentum.*Received: outer_opt"):
        tfbm.BlockMomentum(SGD(), outer_optimizer=tfbm.BlockMomentum(SGD()))
    inner = SGD()
    with pytest.raises(ValueError, match=r"one of its own.*the inner optimizer"):
        tfbm.BlockMomentum(inner, outer_optimizer=inner)
    inner.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match=r"not yet built.*built already"):
        tfbm.BlockMomentum(SGD(), outer_optimizer=inner)
    with pytest.raises(ValueError, match=r"cannot use use_ema=True.*belongs to the inner"):
        tfbm.BlockMomentum(SGD(), outer_optimizer=SGD(use_ema=True))
    with pytest.raises(ValueError, match="cannot use loss scaling"):
        tfbm.BlockMomentum(SGD(), outer_optimizer=keras.optimizers.LossScaleOptimizer(SGD()))
    alone = tfbm.SlowMo()
    alone.build([keras.Variable([1.0])])
    with pytest.raises(RuntimeError, match=r"Use tfbm.BlockMomentum\(.*outer_optimizer=tfbm.Slow"):
        alone.apply([keras.ops.ones([1])])
    with pytest.raises(ValueError, match="`momentum` must be a number from 0 up to"):
        tfbm.SlowMo(momentum=1.0)


def test_inner_state():
    with pytest.raises(ValueError, match=r'"keep", "reset" or "average".*inner_state=None'):
        tfbm.BlockMomentum(SGD(), inner_state=None)


def test_schedules_of_the_period():
    schedules = tfbm.schedules
    with pytest.raises(ValueError, match=r"one value more than there are boundaries.*values=.4"):
        schedules.PiecewisePeriod([10, 20], [4, 8])
    with pytest.raises(ValueError, match="increasing boundaries"):
        schedules.PiecewisePeriod([20, 10], [4, 8, 16])
    with pytest.raises(ValueError, match=r"`values` must be a whole number.*values=0"):
        schedules.PiecewisePeriod([10], [0, 8])
    with pytest.raises(ValueError, match=r"`factor` must be at least 1. Received: factor=0.5"):
        schedules.GrowingPeriod(4, 10, 16, factor=0.5)
    with pytest.raises(ValueError, match=r"`target` must be positive. Received: target=0"):
        schedules.DriftPeriod(0)
    with pytest.raises(ValueError, match=r"minimum <= initial <= maximum.*initial=8"):
        schedules.DriftPeriod(0.1, initial=8, maximum=4)
    with pytest.raises(ValueError, match="cannot hold another PostLocal"):
        schedules.PostLocal(10, schedules.PostLocal(10, 4))
    optimizer = tfbm.BlockMomentum(SGD(), sync_period=lambda step: 2.5)
    optimizer.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match=r"`sync_period\(0\)` must be a whole.*=2.5"):
        optimizer.period  # noqa: B018


def test_a_stock_strategy():
    stock = tf.distribute.MirroredStrategy(["CPU:0"])
    with stock.scope(), pytest.raises(ValueError, match="Received: a MirroredStrategy") as e:
        tfbm.BlockMomentum(SGD())
    assert "Use tfbm.MultiDeviceBlockStrategy(devices)" in str(e.value)
    with pytest.raises(ValueError, match="Received: a MirroredStrategy"):
        tfbm.BlockLoop(lambda x: None, tfbm.BlockMomentum(SGD()), stock)


def test_made_in_two_scopes(strategy_of):
    inner = SGD()
    with strategy_of(2).scope(), pytest.raises(ValueError, match="The inner optimizer and") as e:
        tfbm.BlockMomentum(inner)
    assert "_DefaultDistributionStrategy, BlockMomentum under MultiDevice" in str(e.value)
    for model_scope, optimizer_scope in ((2, 1), (1, 2)):
        with scope(strategy_of(model_scope)):
            model = classifier()
        with scope(strategy_of(optimizer_scope)):
            optimizer = tfbm.BlockMomentum(SGD())
        model.compile(optimizer, crossentropy())
        with pytest.raises(ValueError, match="Build and compile the model inside the scope"):
            model.fit(*examples(), callbacks=[tfbm.BlockTraining()], verbose=0)


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_callback_forgotten(strategy_of, replicas):
    x, y = examples()
    model = compiled(strategy_of(replicas))
    before = model.get_weights()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"callbacks=\[tfbm.BlockTraining\(\)\]"):
            model.fit(x, y, batch_size=16, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[tfbm.BlockTraining()])
    with pytest.raises(RuntimeError, match=r"callbacks=\[tfbm.BlockTraining\(\)\]"):
        model.fit(x, y, batch_size=16, verbose=0)  # forgotten the second time
    with pytest.raises(RuntimeError, match="outside a block"):
        model.optimizer.apply([tf.zeros_like(w) for w in model.trainable_variables])


def test_the_callback_without_the_optimizer():
    model = classifier()
    model.compile("sgd", crossentropy())
    with pytest.raises(ValueError, match=r"needs a model compiled with BlockMomentum.*Wrap it"):
        model.fit(*examples(), callbacks=[tfbm.BlockTraining()], verbose=0)


def test_jit_compile(strategy_of):
    for bad in ("always", None, 1):
        with pytest.raises(ValueError, match='`jit_compile` must be True, False or "auto"'):
            tfbm.BlockTraining(jit_compile=bad)

    class NoXLA(keras.layers.Layer):
        def __init__(self, declared):
            super().__init__(name="no_xla")
            self.supports_jit = not declared

        def call(self, x):
            return tf.reshape(tf.strings.to_number(tf.strings.as_string(x)), tf.shape(x))

    x, y = examples()
    for declared in (True, False):
        with strategy_of(2).scope():
            layers = [keras.Input([6]), keras.layers.Dense(3), NoXLA(declared)]
            layers = [layers[0], layers[2], layers[1]]
            model = keras.Sequential(layers)
            model.compile(tfbm.BlockMomentum(SGD(0.1)), crossentropy())
        expected = "no_xla" if declared else "XLA cannot compile this model's step"
        with pytest.raises(ValueError, match=expected) as e:
            model.fit(x, y, verbose=0, callbacks=[tfbm.BlockTraining(jit_compile=True)])
        assert "jit_compile=False" in str(e.value)
        model.fit(x, y, verbose=0, callbacks=[tfbm.BlockTraining(jit_compile=False)])


def test_a_global_batch_that_does_not_divide(strategy_of):
    x, y = examples()
    model = compiled(strategy_of(2))
    for data in ((x, y), (dataset(x, y, batch=9),)):
        how = {"batch_size": 9} if len(data) == 2 else {}
        with pytest.raises(ValueError, match=r"batches of 9 for 2 replicas.*batch_size=10;"):
            model.fit(*data, **how, verbose=0, callbacks=[tfbm.BlockTraining()])
    assert np.isfinite(model.evaluate(x, y, batch_size=9, verbose=0))


def test_block_loop(strategy_of):
    optimizer = tfbm.BlockMomentum(SGD(0.1))
    with pytest.raises(TypeError, match=r"needs a BlockMomentum optimizer.*Wrap yours"):
        tfbm.BlockLoop(lambda x: None, SGD(0.1))
    with pytest.raises(ValueError, match="`jit_compile` must be"):
        tfbm.BlockLoop(lambda x: None, optimizer, jit_compile="no")
    loop = tfbm.BlockLoop(lambda x: None, optimizer)
    data = tf.data.Dataset.range(3)
    with pytest.raises(TypeError, match="takes an iterator over a distributed dataset"):
        loop.run(data, 1)
    unbuilt = tfbm.BlockLoop(lambda x: optimizer.apply([tf.constant([0.0])]), optimizer)
    with pytest.raises(ValueError, match=r"built before the first step.*Call optimizer.build"):
        unbuilt.run(iter(data), 1)
    optimizer.build([keras.Variable([0.0])])
    for steps in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`steps` must be a whole number of at least 1"):
            loop.run(iter(data), steps)
    with pytest.raises(StopIteration):
        loop.run(iter(data.take(0)), 1)
    assert optimizer.blocks == 0


def config(**changes):
    good = {
        "cluster": {"worker": ["127.0.0.1:7001", "127.0.0.1:7002"]},
        "task": {"type": "worker", "index": 0},
    }
    return json.dumps({**good, **changes})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{worker: 0}", "it is not JSON"),
        ("[1]", "it is not a JSON object"),
        ('{"task": {"type": "worker", "index": 0}}', "it has no `cluster`"),
        (config(cluster={"worker": "localhost:1"}), 'is not a list of "host:port"'),
        (config(cluster={"worker": ["localhost"]}), 'is not a list of "host:port"'),
        (config(cluster={"worker": ["a:1", "a:1"]}), "names an address twice"),
        (config(cluster={"ps": ["a:1"], "worker": ["a:2"]}), "not 'ps'"),
        (config(task={"type": "chief", "index": 0}), r"`task.type` is none of \['worker'\]"),
        (config(task={"type": "worker", "index": 2}), "not a whole number from 0 to 1"),
        (config(task={"type": "worker", "index": "0"}), "not a whole number from 0 to 1"),
        (config(task=None), "`task.type` is none of"),
    ],
)
def test_tf_config(text, problem):
    with pytest.raises(ValueError, match=problem) as e:
        check_tf_config(text)
    assert f"Received: TF_CONFIG={text!r}" in str(e.value)
    assert "tf_blockmomentum.launch" in str(e.value)
    for good in (None, "", "{}", config()):
        check_tf_config(good)


def test_a_wrong_compile_argument_is_told_as_keras_tells_it():
    """The metrics are wrong, and the optimizer not built yet."""
    inputs = keras.Input([3])
    model = keras.Model(inputs, {n: keras.layers.Dense(1, name=n)(inputs) for n in "ab"})
    optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1))
    model.compile(optimizer, {"a": "mse", "b": "mse"}, metrics={"c": ["mse"]})
    y = {"a": np.ones([8, 1]), "b": np.ones([8, 1])}
    with pytest.raises(ValueError, match=r"(?s)Invalid `metrics`.*'c'"):
        model.fit(np.ones([8, 3]), y, verbose=0, callbacks=[tfbm.BlockTraining()])


@pytest.mark.timeout(120)
def test_strategy_after_other_operations_and_a_bad_tf_config():
    """In a process of its own: a second strategy in one process would not do."""
    script = """
import os, tensorflow as tf, tf_blockmomentum as tfbm
os.environ["TF_CONFIG"] = "{"
try:
    tfbm.MultiWorkerBlockStrategy()
except ValueError as error:
    print("first:", error)
os.environ["TF_CONFIG"] = ('{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, '
                           '"task": {"type": "worker", "index": 0}}')
tf.ones([2]) + 1
try:
    tfbm.MultiWorkerBlockStrategy()
except RuntimeError as error:
    print("second:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=110, check=False)  # fmt: skip
    first, second = (
        next((line for line in done.stdout.splitlines() if line.startswith(which)), done.stderr)
        for which in ("first:", "second:")
    )
    assert "TF_CONFIG is not usable: it is not JSON" in first
    assert "must come before any other TensorFlow operation" in second
    assert "Move the strategy's line to the top of the script" in second
