"""Every dtype and mode, on two real workers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import scope
from test_same_start import alike, data_of, fit

import tf_blockmomentum as tfbm


def under(strategy, policy):
    keras.config.set_dtype_policy(policy)
    with scope(strategy):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input([3]),
                keras.layers.Dense(4, activation="relu"),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(1),
            ]
        )
        # Not Adam: in bfloat16 1 - 0.999 is 0, and so is its rate, in plain Keras too.
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.05), sync_period=2), "mse")
    data = data_of(strategy, steps=10)
    history = model.fit(data, epochs=4, verbose=0, callbacks=[tfbm.BlockTraining()]).history
    x = np.ones([4, 3], "float32")
    return [w.astype("float32") for w in model.get_weights()], history["loss"], model.predict(
        x, verbose=0
    ).astype("float32")  # fmt: skip


@pytest.mark.parametrize(
    "policy",
    [
        "bfloat16",
        "mixed_bfloat16",
        "mixed_float16",
        pytest.param("float64", marks=pytest.mark.slow),  # most of test_fuzz's are
    ],
)
def test_a_policy(pair, policy):
    (weights, losses, rows), (other, its_losses, its_rows) = pair.run(under, policy)
    alike([weights, other])
    assert losses == its_losses
    assert losses[-1] < 0.7 * losses[0]
    assert rows.shape == (4, 1)
    np.testing.assert_array_equal(rows, its_rows)


def odd_variables(strategy, dtype):
    """Each worker's own initial value is drawn; all get the chief's."""
    with strategy.scope():
        seed = strategy.cluster_resolver.task_id
        drawn = lambda shape, dtype: tf.cast(  # noqa: E731
            tf.cast(keras.random.randint(shape, 0, 2, seed=seed), "float32"), dtype
        )
        v = keras.Variable(drawn, shape=[40], dtype=dtype, trainable=False)
    return np.asarray(tf.cast(v, "float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "uint8", "bool", "float8_e4m3fn"])
def test_initial_values_of_any_dtype(pair, dtype):
    one, other = pair.run(odd_variables, dtype)
    np.testing.assert_array_equal(one, other)
    assert 0 < one.sum() < 40


def low_rank(strategy):
    """LoRA over weights of int8."""
    with strategy.scope():
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(8, name="adapted")
        model = keras.Sequential([keras.Input([3]), dense, keras.layers.Dense(1)])
        dense.quantize("int8")
        dense.enable_lora(2)
        model.compile(tfbm.BlockMomentum(keras.optimizers.Adam(0.05), sync_period=2), "mse")
    before = dense._kernel.numpy()
    fit(model, data_of(strategy), epochs=3)
    assert dense._kernel.dtype == "int8"
    return before, dense._kernel.numpy(), [v.numpy() for v in model.trainable_variables]


def test_lora_over_int8(pair):
    (before, after, trained), (_, _, other) = pair.run(low_rank)
    np.testing.assert_array_equal(before, after)
    alike([trained, other])
    assert len(trained) == 5  # two of LoRA, its bias, and the head's


def looks(strategy, eagerly, steps_per_execution=1):
    seen = []

    class Looks(keras.Sequential):
        def train_step(self, data):
            logs = super().train_step(data)
            if self.run_eagerly:
                seen.append(float(logs["loss"]))  # a breakpoint could be here
            return logs

    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = Looks([keras.Input([3]), keras.layers.Dense(2), keras.layers.Dense(1)])
        model.compile(
            tfbm.BlockMomentum(keras.optimizers.Adam(0.02), sync_period=2, overlap=True),
            "mse",
            run_eagerly=eagerly,
            steps_per_execution=steps_per_execution,
        )
    fit(model, data_of(strategy), epochs=2)
    return model.get_weights(), seen


@pytest.mark.parametrize("steps_per_execution", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_run_eagerly(pair, steps_per_execution):
    compiled = pair.run(looks, False)
    for (want, _), (got, seen) in zip(
        compiled, pair.run(looks, True, steps_per_execution), strict=True
    ):
        assert len(seen) == 12
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def refused(strategy, what):
    with strategy.scope():
        norm = keras.layers.BatchNormalization(synchronized=what == "synchronized", name="norm")
        model = keras.Sequential([keras.Input([3]), norm, keras.layers.Dense(1)])
        optimizer = keras.optimizers.SGD(0.1)
        if what == "synchronized":
            optimizer = tfbm.BlockMomentum(optimizer)
        model.compile(optimizer, "mse", steps_per_execution=2)
    before = model.get_weights()
    try:
        model.fit(data_of(strategy), verbose=0,
                  callbacks=[tfbm.BlockTraining()] if what == "synchronized" else [])  # fmt: skip
    finally:
        alike([before, model.get_weights()])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("synchronized", "Received: synchronized=True in norm. Use BatchNormalization"),
        ("stock", "Received: steps_per_execution=2. Compile with steps_per_execution=1"),
    ],
)
def test_what_cannot_be_is_named_before_training(pair, what, words):
    for error in pair.run(refused, what, expect_error=True):
        assert error.type == "ValueError"
        assert words in error.text
