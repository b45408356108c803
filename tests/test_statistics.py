"""Moving statistics estimated anew at the anchor."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import crossentropy, examples, replica_values, scope, unknown_length

import tf_blockmomentum as tfbm
from tf_blockmomentum import statistics

SHARE, STEPS = 4, 11  # examples a replica and step; the last block of 4 is cut short
NAMES = ("moving_mean", "moving_variance")


def model_with(strategy, optimizer=None, jit=False, policy="float32", **compiled):
    """Normalizes right after a layer that NumPy can do; then dropout and a frozen one."""
    keras.utils.set_random_seed(3)
    with scope(strategy):
        frozen = keras.layers.BatchNormalization(name="frozen")
        inner = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(5, name="dense", dtype=policy),
                keras.layers.BatchNormalization(momentum=0.9, name="norm", dtype=policy),
            ]
        )  # nested
        model = keras.Sequential(
            [
                keras.Input([6]),
                inner,
                keras.layers.Dropout(0.4, seed=5),
                frozen,
                keras.layers.Dense(3, dtype="float32"),
            ]
        )
        frozen.trainable = False
        model.compile(
            optimizer or tfbm.BlockMomentum(keras.optimizers.Adam(0.05), 4, 0.8),
            crossentropy(),
            metrics=["accuracy"],
            jit_compile=jit,
            **compiled,
        )
    return model, inner


def over_all(inner, x):
    """Mean and variance of what the layer gets, over all of these examples together."""
    kernel, bias = (np.asarray(w, np.float64) for w in inner.get_layer("dense").get_weights())
    y = x.astype(np.float64) @ kernel + bias
    return y.mean(axis=0), y.var(axis=0)


def check(inner, x, tolerance=1e-5):
    norm = inner.get_layer("norm")
    for name, want in zip(NAMES, over_all(inner, x), strict=True):
        values = replica_values(getattr(norm, name))
        for value in values:
            np.testing.assert_array_equal(value, values[0])
        np.testing.assert_allclose(values[0], want, tolerance, tolerance)


def everything(model):
    """All state but the statistics, on every replica."""
    metrics = [v for metric in model.metrics for v in metric.variables]
    variables = [*model.variables, *model.optimizer.variables, *metrics]
    return [
        value
        for v in {id(v): v for v in variables}.values()
        if v.name not in NAMES or "frozen" in v.path
        for value in replica_values(v)
    ]


@pytest.mark.parametrize(
    ("replicas", "what"),
    [(1, "plain"), (2, "plain"), (2, "jit"), (2, "float16"), (2, "overlap"), (1, "eager")],
)
def test_those_of_the_last_batches_at_the_anchor_and_nothing_else(strategy_of, replicas, what):
    strategy, size = strategy_of(replicas), SHARE * replicas
    x, y = examples(size * STEPS - replicas)  # the last batch is smaller
    results = []
    for n in (3, 0):
        optimizer = None
        if what == "overlap":
            with scope(strategy):
                optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1), 4, overlap=True)
        model, inner = model_with(
            strategy,
            optimizer,
            jit=what == "jit",
            policy="mixed_float16" if what == "float16" else "float32",
            run_eagerly=what == "eager",
        )
        seen = []  # metrics too, which evaluation begins anew after this
        at_test = keras.callbacks.LambdaCallback(on_test_begin=lambda logs: look())

        def look(n=n, model=model, inner=inner, seen=seen):
            seen.append(everything(model))
            if n:
                check(inner, x[-3 * size + replicas :], 3e-3 if what == "float16" else 1e-5)

        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size)
        history = model.fit(
            unknown_length(data) if what == "plain" else data,
            epochs=2,
            verbose=0,
            validation_data=(x[:8], y[:8]),
            callbacks=[tfbm.BlockTraining(refresh_statistics=n), at_test],
        )
        norm = inner.get_layer("norm").moving_mean.numpy()
        results.append((sum(seen, []), history.history["loss"], norm))
    (state, losses, norm), (expected, expected_losses, other) = results
    assert losses == expected_losses
    for a, b in zip(state, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(norm - other).max() > 1e-3
