"""Moving statistics estimated anew at the anchor."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import crossentropy, examples, replica_values, scope, unknown_length

import tf_blockmomentum as tfbm
from tf_blockmomentum.statistics.layers import with_statistics

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
    [
        pytest.param(2, "plain", marks=pytest.mark.slow),
        (1, "jit"),
        (2, "overlap in float16"),
        pytest.param(1, "eager", marks=pytest.mark.slow),
    ],
)
def test_those_of_the_last_batches_at_the_anchor_and_nothing_else(strategy_of, replicas, what):
    strategy, size = strategy_of(replicas), SHARE * replicas
    missing = replicas if what == "plain" else 0  # from the last batch
    x, y = examples(size * STEPS - missing)
    policy, rounding = ("mixed_float16", 3e-3) if "float16" in what else ("float32", 1e-5)
    results = []
    for n in (3,) if "overlap" in what else (3, 0):
        optimizer = None
        if "overlap" in what:
            with scope(strategy):
                optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1), 4, overlap=True)
        model, inner = model_with(
            strategy,
            optimizer,
            jit=what == "jit",
            policy=policy,
            run_eagerly=what == "eager",
        )
        seen = []  # metrics too, which evaluation begins anew after this
        at_test = keras.callbacks.LambdaCallback(on_test_begin=lambda logs: look())

        def look(n=n, model=model, inner=inner, seen=seen):
            seen.append(everything(model))
            if n:
                check(inner, x[-3 * size + missing :], rounding)

        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size)
        history = model.fit(
            unknown_length(data) if what == "plain" else data,
            epochs=2,
            verbose=0,
            validation_data=(x[:8], y[:8]),
            callbacks=[tfbm.BlockTraining(refresh_statistics=n), at_test],
        )
        norm = inner.get_layer("norm").moving_mean.numpy()
        results.append(([*seen[0], *seen[1]], history.history["loss"], norm))
    if "overlap" in what:
        return
    (state, losses, norm), (expected, expected_losses, other) = results
    assert losses == expected_losses
    for a, b in zip(state, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(norm - other).max() > 1e-3


def step_for(inner, head, optimizer):
    """A step function that calls the layers twice, on each of two inputs, and counts."""
    seen = keras.Variable(0.0, name="seen")
    loss = crossentropy()

    def step(batch):
        (a, b), y = batch
        with tf.GradientTape() as tape:
            outputs = head(inner(a, training=True) + inner(b, training=True))
            value = loss(y, outputs)
        variables = [*inner.trainable_variables, *head.trainable_variables]
        gradients = tape.gradient(value, [v.value for v in variables])
        optimizer.apply(gradients, variables)
        seen.assign_add(1.0)
        return value

    return step, seen


def own_batches(strategy, data):
    return strategy.distribute_datasets_from_function(lambda context: data)


def a_loop_with_uneven_data(strategy):
    """Worker 0 has three batches for the statistics, worker 1 one or none."""
    index = strategy.cluster_resolver.task_id
    x, y = examples(40, seed=4)
    results = []
    for count in (1, 0):
        keras.utils.set_random_seed(3)
        with strategy.scope():
            _, inner = model_with(None)
            head = keras.layers.Dense(3)
            head.build([None, 5])
            optimizer = tfbm.BlockMomentum(keras.optimizers.Adam(0.02), 4, 0.8)
            optimizer.build([*inner.trainable_variables, *head.trainable_variables])
            step, seen = step_for(inner, head, optimizer)
        loop = tfbm.BlockLoop(step, optimizer, strategy)
        shifted = tf.data.Dataset.from_tensor_slices(((x, x + 1), y)).batch(4)
        loop.run(iter(own_batches(strategy, shifted.take(7))), 6)  # mid-block
        before = [v.numpy() for v in (*optimizer.inner_optimizer.variables, seen)]
        mine = shifted.skip(7).take(count if index else 3)
        loop.refresh(own_batches(strategy, mine))
        after = [v.numpy() for v in (*optimizer.inner_optimizer.variables, seen)]
        norm = inner.get_layer("norm")
        weights = inner.get_layer("dense").get_weights()
        used = [x[28:40], *([x[28 : 28 + 4 * count]])]
        want = np.concatenate([[u, u + 1] for u in used if len(u)], axis=1).reshape(-1, 6)
        results.append(
            {
                "at anchor": loop.at_anchor,
                "changed": sum((a != b).any() for a, b in zip(before, after, strict=True)),
                "statistics": [v.numpy() for v in (norm.moving_mean, norm.moving_variance)],
                "want": [f(want @ weights[0] + weights[1], axis=0) for f in (np.mean, np.var)],
                "momentum": norm.momentum,
            }
        )
    return results


def test_a_loop_on_workers_with_uneven_data(pair):
    for case in zip(*pair.run(a_loop_with_uneven_data, limit=120), strict=True):
        for result in case:
            assert result["at anchor"]
            assert (result["changed"], result["momentum"]) == (0, 0.9)
            for got, want, other in zip(
                result["statistics"], result["want"], case[0]["statistics"], strict=True
            ):
                np.testing.assert_array_equal(got, other)
                np.testing.assert_allclose(got, want, 1e-5, 1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("replicas", [2, "CPU:1"])
def test_a_backup_within_the_last_batches(strategy_of, tmp_path, replicas):
    """Holds those trained on already, for the estimate of the fit that goes on."""
    strategy = strategy_of(replicas)
    x, y = examples(8 * STEPS)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)

    def stop(batch, logs):
        if batch == 9:
            raise Stop

    final = []
    for stops in (True, False, None):
        model, inner = model_with(strategy)
        callbacks = [tfbm.BlockTraining(refresh_statistics=6)]
        if stops is not None:
            callbacks.append(tfbm.BlockBackup(tmp_path / "backup", every=1))
        if stops:
            callbacks.append(keras.callbacks.LambdaCallback(on_train_batch_end=stop))
        with pytest.raises(Stop) if stops else contextlib.nullcontext():
            model.fit(data, verbose=0, callbacks=callbacks)
        if not stops:
            check(inner, x[-6 * 8 :])
            final.append([v.numpy() for v in model.variables])
    for a, b in zip(*final, strict=True):
        np.testing.assert_array_equal(a, b)


class Own(keras.layers.Layer):
    """Statistics of a user's own, as BatchNormalization's."""

    def build(self, shape):
        self.momentum = 0.99
        for name, value in (("moving_mean", "zeros"), ("moving_variance", "ones")):
            setattr(self, name, self.add_weight(shape=shape[-1:], initializer=value,
                                                trainable=False, name=name))  # fmt: skip

    def call(self, x, training=None):
        if training:
            for variable, value in (
                (self.moving_mean, tf.reduce_mean(x, 0)),
                (self.moving_variance, tf.math.reduce_variance(x, 0)),
            ):
                variable.assign(self.momentum * variable + (1 - self.momentum) * value)
        return (x - self.moving_mean) / tf.sqrt(self.moving_variance + 1e-3)


def test_a_model_at_hand(strategy_of):
    """Renormalization has a third statistic; uneven shares of the last batch."""
    strategy = strategy_of(2)
    x, _ = examples(15)
    with strategy.scope():
        inputs = [keras.Input([6]), keras.Input([6])]
        first = keras.layers.BatchNormalization(renorm=True, momentum=0.99)
        own = Own()
        model = keras.Model(inputs, first(keras.layers.Dropout(0.5, seed=1)(inputs[0]))
                            + own(inputs[1] * 100 + 1000))  # fmt: skip
    before = {v.path: v.numpy() for v in model.variables}
    data = tf.data.Dataset.from_tensor_slices(((np.ones_like(x), x),)).batch(4)
    assert tfbm.refresh_statistics(model, data) is model
    far = x.astype(np.float64) * 100 + 1000
    np.testing.assert_allclose(own.moving_mean, far.mean(0), 1e-5)
    np.testing.assert_allclose(own.moving_variance, far.var(0), 1e-4)
    # A dropout of ones gives zeros and twos: the same share of the variance at every unit.
    mean = first.moving_mean.numpy()
    assert 0.4 < mean.mean() < 1.6
    np.testing.assert_allclose(first.moving_variance, mean * (2 - mean), 1e-4, 1e-5)
    np.testing.assert_allclose(first.moving_stddev**2, first.moving_variance + 1e-3, 1e-4)
    changed = {v.path for v in model.variables if (v.numpy() != before[v.path]).any()}
    assert len(changed) == 5
    assert all("moving" in path for path in changed)

    with pytest.raises(ValueError, match="has to have an end"):
        tfbm.refresh_statistics(model, data.repeat())
    with pytest.raises(TypeError, match="Received: ndarray"):
        tfbm.refresh_statistics(model, x)
    with pytest.raises(ValueError, match="has to be built"):
        tfbm.refresh_statistics(keras.Sequential([keras.layers.Dense(1)]), data)


@pytest.mark.parametrize("n", [-1, 2.5, True, None, "auto"])
def test_a_number_of_batches_that_is_none(n):
    with pytest.raises(ValueError, match="`refresh_statistics` must be a whole number of batches"):
        tfbm.BlockTraining(refresh_statistics=n)


def test_a_model_without_statistics_keeps_no_batches():
    model = keras.Sequential([keras.Input([6]), keras.layers.GroupNormalization(2)])
    model.compile(tfbm.BlockMomentum("sgd"), "mse")
    training = tfbm.BlockTraining()
    x = np.ones([8, 6], "float32")
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[training])
    assert training._loop.kept is None
    assert with_statistics(model.layers) == []
