"""Any optimizer inside, and several of them: two real workers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import scope
from keras import ops
from test_same_start import alike, data_of, fit

import tf_blockmomentum as tfbm
from tf_blockmomentum.strategy import worker_of


class Centralized(keras.optimizers.SGD):
    """Changes gradients on their way, as people do, in each of the places for it."""

    def __init__(self, where="apply", **settings):
        super().__init__(**settings)
        self.where = where

    def build(self, variables):
        super().build(variables)
        self.seen = [self.add_variable_from_reference(v, name="seen") for v in variables]

    def _changed(self, gradients):
        return [None if g is None else 2 * g for g in gradients]

    def apply_gradients(self, grads_and_vars):
        gradients, variables = zip(*grads_and_vars, strict=True)
        if self.where == "apply_gradients":
            gradients = self._changed(gradients)
        return super().apply_gradients(list(zip(gradients, variables, strict=True)))

    def apply(self, grads, trainable_variables=None):
        if self.where == "apply":
            grads = self._changed(grads)
        return super().apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        if self.where == "update_step":  # with what a tf.Variable has, and a Keras one has not
            variable.scatter_nd_add(tf.zeros([1, len(variable.shape)], tf.int32), tf.zeros([1]))
            gradient = 2 * gradient
        self.seen[self._get_variable_index(variable)].assign_add(gradient)
        super().update_step(gradient, variable, learning_rate)


def trained_with(strategy, where, replica=None):
    """Two local steps on each worker's examples, K=2, beta=0; or of one of them in plain Keras."""
    index = worker_of(strategy)[0] if replica is None else replica
    x = np.random.default_rng(index).normal(size=[2, 4, 3]).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x.sum(axis=-1, keepdims=True)))
    with scope(strategy):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = keras.Sequential([keras.Input([3]), dense])
        optimizer = Centralized(where, learning_rate=0.05, momentum=0.5)
        if strategy:
            optimizer = tfbm.BlockMomentum(optimizer, sync_period=2, block_momentum=0)
        model.compile(optimizer, "mse")
    if strategy:
        fit(model, strategy.distribute_datasets_from_function(lambda _: data))
    else:
        model.fit(data, verbose=0)
    return model.get_weights()


@pytest.mark.parametrize(
    "where",
    ["apply", "apply_gradients", pytest.param("update_step", marks=pytest.mark.slow)],
)
def test_an_optimizer_of_ones_own(pair, where):
    alone = [trained_with(None, where, replica) for replica in (0, 1)]
    for got in pair.run(trained_with, where):
        for a, *parts in zip(got, *alone, strict=True):
            np.testing.assert_allclose(a, np.mean(parts, axis=0), rtol=1e-5, atol=1e-6)


def multi(strategy, callable_map):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input([3]), keras.layers.Dense(2, name="body"), keras.layers.Dense(1)]
        )
        body, head = keras.optimizers.SGD(0.0), keras.optimizers.Adam(0.05)
        if callable_map:
            chosen = lambda v: body if "body" in v.path else head  # noqa: E731
        else:
            chosen = keras.optimizers.OptimizerMap(head, {".*body/.*": body})
        both = keras.optimizers.MultiOptimizer(chosen)
        model.compile(tfbm.BlockMomentum(both, sync_period=2), "mse")
    before = model.get_weights()
    fit(model, data_of(strategy))
    return before, model.get_weights(), int(head.iterations), int(model.optimizer.iterations)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="an older Keras")
@pytest.mark.parametrize("callable_map", [pytest.param(True, marks=pytest.mark.slow), False])
def test_multi_optimizer(pair, callable_map):
    (before, after, own, all_), (_, other, *_) = pair.run(multi, callable_map)
    alike([after, other])
    alike([before[:2], after[:2]])
    assert all(np.abs(a - b).min() > 0.01 for a, b in zip(before[2:], after[2:], strict=True))
    assert own == all_ == 6


class GAN(keras.Model):
    """As in Keras's examples: no call(), optimizers of its own compile(), which nobody builds."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input([2]), keras.layers.Dense(2)])
        self.critic = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])

    def compile(self, critic_optimizer, generator_optimizer):
        super().compile()
        self.critic_optimizer, self.generator_optimizer = critic_optimizer, generator_optimizer

    def train_step(self, real):
        noise = real[:, ::-1]
        for _ in range(2):  # two steps of the critic for one of the generator
            with tf.GradientTape() as tape:
                loss = ops.mean(self.critic(self.generator(noise))) - ops.mean(self.critic(real))
            weights = self.critic.trainable_weights
            gradients = tape.gradient(loss, weights)
            self.critic_optimizer.apply_gradients(zip(gradients, weights, strict=True))
            for w in weights:  # WGAN's, which is no reason to lose the momentum
                w.assign(ops.clip(w, -1, 1))
        with tf.GradientTape() as tape:
            g_loss = -ops.mean(self.critic(self.generator(noise)))
        weights = self.generator.trainable_weights
        gradients = tape.gradient(g_loss, weights)
        self.generator_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {"critic": loss, "generator": g_loss}


def gan(strategy, periods=(2, 2), beta=0.5, replica=None, eagerly=False):
    index = worker_of(strategy)[0] if replica is None else replica
    x = np.random.default_rng(index).normal(size=[4, 8, 2]).astype("float32") + index
    data = tf.data.Dataset.from_tensor_slices(x)
    inner = [keras.optimizers.SGD, keras.optimizers.SGD]
    with scope(strategy):
        keras.utils.set_random_seed(0)
        model = GAN()
        optimizers = [make(0.02) for make in inner]
        if strategy:
            optimizers = [
                tfbm.BlockMomentum(o, sync_period=k, block_momentum=beta)
                for o, k in zip(optimizers, periods, strict=True)
            ]
        model.compile(*optimizers)
        model.run_eagerly = eagerly
    if strategy:
        fit(model, strategy.distribute_datasets_from_function(lambda _: data))
    else:
        model.fit(data, verbose=0)
    return model.get_weights(), [int(o.iterations) for o in optimizers]


@pytest.mark.parametrize("eagerly", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_wrapped_optimizers(pair, eagerly):
    """One block of four steps at beta=0: the mean of what each device would have trained."""
    alone = [gan(None, replica=replica)[0] for replica in (0, 1)]
    for got, steps in pair.run(gan, (4, 4), 0.0, eagerly=eagerly):
        for a, *parts in zip(got, *alone, strict=True):
            np.testing.assert_allclose(a, np.mean(parts, axis=0), rtol=1e-4, atol=1e-5)
        assert steps == [8, 4]
    (one, _), (other, _) = pair.run(gan, eagerly=eagerly)
    alike([one, other])


def test_two_optimizers_whose_blocks_differ(pair):
    for error in pair.run(gan, (2, 4), expect_error=True):
        assert error.type == "ValueError"
        assert "end their blocks together: they need the same number" in error.text
        assert "Received: 2 (overlap=False), 4 (overlap=False)" in error.text


def gan_half_wrapped(strategy):
    with strategy.scope():
        model = GAN()
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1)), keras.optimizers.SGD(0.1))
    fit(model, strategy.distribute_datasets_from_function(
        lambda _: tf.data.Dataset.from_tensors(np.ones([4, 2], "float32"))))  # fmt: skip


def test_an_optimizer_that_was_forgotten(pair):
    for error in pair.run(gan_half_wrapped, expect_error=True):
        assert error.type == "ValueError"
        assert "Wrap all optimizers that it applies" in error.text


class Sets(keras.callbacks.Callback):
    """Sets an attribute of the optimizer at the second epoch."""

    def __init__(self, **values):
        super().__init__()
        self.values, self.read = values, []

    def on_epoch_begin(self, epoch, logs=None):
        optimizer = self.model.optimizer
        if epoch == 1:
            for name, value in self.values.items():
                setattr(optimizer, name, value)
        self.read.append([int(optimizer.iterations), round(float(optimizer.learning_rate), 4)])


def set_later(strategy, values, overlap=False):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Sequential([keras.Input([3]), dense])
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.SGD(0.05), sync_period=2, block_momentum=0.5, overlap=overlap
        )
        model.compile(optimizer, "mse")
    sets = Sets(**values)
    fit(model, data_of(strategy, steps=4), sets, epochs=2)
    return model.get_weights()[0], optimizer.blocks, sets.read


def by_hand(beta, zeta, later):
    """NumPy's M-AVG of the same; `later`: beta, zeta of the second epoch."""
    anchor, v = np.ones([3, 1]), np.zeros([3, 1])
    x = [np.random.default_rng(j).normal(size=[4, 4, 3]).astype("float32") for j in (0, 1)]
    for beta_, zeta_ in ((beta, zeta), later):
        for begin in (0, 2):
            ends = []
            for own in x:
                w = anchor
                for batch in own[begin : begin + 2]:
                    error = batch @ w - batch.sum(axis=1, keepdims=True)
                    w = w - 0.05 * 2 * batch.T @ error / 4
                ends.append(w)
            v = beta_ * v + zeta_ * (np.mean(ends, axis=0) - anchor)
            anchor = anchor + v
    return anchor


@pytest.mark.parametrize(
    ("values", "later"),
    [
        ({"block_momentum": 0.9}, (0.9, 1.0)),
        pytest.param({"block_momentum": 0}, (0.0, 1.0), marks=pytest.mark.slow),
        ({"block_learning_rate": 0.3}, (0.5, 0.3)),
    ],
)
def test_what_is_set_later_takes_effect(pair, values, later):
    for got, blocks, read in pair.run(set_later, values):
        np.testing.assert_allclose(got, by_hand(0.5, 1.0, later), rtol=1e-5)
        assert blocks == 4
        assert read == [[0, 0.05], [4, 0.05]]


def test_a_learning_rate_and_a_period_set_later(pair):
    for _, blocks, read in pair.run(set_later, {"learning_rate": 0.01, "sync_period": 4}):
        assert blocks == 3
        assert read == [[0, 0.05], [4, 0.01]]
    results = pair.run(set_later, {"block_momentum": 0.9}, overlap=True)
    alike([results[0][:1], results[1][:1]])


def test_bad_values_set_later():
    optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1), block_momentum=0)
    optimizer.build([keras.Variable([0.0])])
    with pytest.raises(ValueError, match=r"built with block_momentum=0.*begin with a small one"):
        optimizer.block_momentum = 0.5
    with pytest.raises(ValueError, match="`block_momentum` must be a number from 0"):
        optimizer.block_momentum = 1.5
    with pytest.raises(ValueError, match="`block_learning_rate` must be a number of at least 0"):
        optimizer.block_learning_rate = -1
    with pytest.raises(ValueError, match="schedule of `sync_period` cannot be set later"):
        optimizer.sync_period = lambda step: 2
    other = tfbm.BlockMomentum("sgd", outer_optimizer=keras.optimizers.SGD(1.0))
    with pytest.raises(ValueError, match=r"has no `block_momentum`.*optimizer.outer_optimizer"):
        other.block_momentum = 0.5


def uneven(strategy, overlap):
    """Ten batches on one worker, six on the other, and a rate that follows the steps."""
    with strategy.scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        schedule = keras.optimizers.schedules.InverseTimeDecay(0.1, 1, 1)
        inner = keras.optimizers.Adam(schedule)
        optimizer = tfbm.BlockMomentum(inner, sync_period=2, overlap=overlap)
        model.compile(optimizer, "mse")
    rates = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            rates.append((float(optimizer.learning_rate), int(optimizer.iterations)))

    fit(model, data_of(strategy, steps=10 - 4 * worker_of(strategy)[0]), Look(), epochs=2)
    return rates, model.get_weights()


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_the_learning_rate_where_shares_are_uneven(pair, overlap):
    (rates, weights), (other, its_weights) = pair.run(uneven, overlap)
    assert rates == other
    assert [steps for _, steps in rates] == [10, 20]
    alike([weights, its_weights])


class Unbuilt(keras.Model):
    """No call(), and layers that the step is the first to call."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(3, kernel_initializer="ones")
        self.norm = keras.layers.BatchNormalization()
        self.head = keras.layers.Dense(1, kernel_initializer="ones")

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self.head(self.norm(self.hidden(x), training=True))
            loss = ops.mean(ops.square(y_pred - y))
        weights = self.hidden.trainable_weights + self.head.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"mine": loss}


def unbuilt(strategy, wrap=True):
    with scope(strategy):
        model = Unbuilt()
        inner = keras.optimizers.SGD(0.1)
        model.compile(tfbm.BlockMomentum(inner, 1, block_momentum=0.0) if wrap else inner)
    x = np.random.default_rng(0).normal(size=[24, 2]).astype("float32")
    x = np.repeat(x.reshape(6, 4, 2), 2, axis=0) if strategy else x.reshape(6, 4, 2)
    data = tf.data.Dataset.from_tensor_slices(x.reshape(-1, 2)).map(lambda x: (x, x[:1]))
    history = model.fit(
        data.batch(8 if strategy else 4), verbose=0,
        callbacks=[tfbm.BlockTraining(refresh_statistics=0)] if wrap else [],
    ).history  # fmt: skip
    return history["mine"], model.get_weights()


@pytest.mark.filterwarnings("ignore:Layer 'unbuilt' looks like it has unbuilt state:UserWarning")
@pytest.mark.filterwarnings("ignore:`build\\(\\)` was called on layer:UserWarning")
def test_a_model_that_its_step_builds(pair):
    """As plain Keras's, which has no need to know the variables before."""
    want = unbuilt(None, wrap=False)
    for losses, weights in (unbuilt(None), *pair.run(unbuilt)):
        np.testing.assert_allclose(losses, want[0], rtol=1e-4)
        for a, b in zip(weights, want[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_loop_whose_step_makes_variables():
    dense, optimizer = keras.layers.Dense(1), tfbm.BlockMomentum(keras.optimizers.SGD(0.1))

    def step(x):
        with tf.GradientTape() as tape:
            loss = ops.mean(dense(x))
        optimizer.apply(tape.gradient(loss, dense.trainable_weights), dense.trainable_weights)

    loop = tfbm.BlockLoop(step, optimizer)
    data = tf.data.Dataset.from_tensors(tf.ones([2, 3]))
    with pytest.raises(ValueError, match=r"The step makes variables.*Build the model before"):
        loop.run(iter(data), 1)
