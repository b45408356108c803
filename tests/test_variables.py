"""What becomes of each kind of variable at a boundary, on two real workers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import scope
from keras import ops

import tf_blockmomentum as tfbm

K, BATCH, STEPS = 2, 8, 6


def own_data(strategy, seed=0):
    """Unlike examples on each worker, `BATCH` a step; returns all of them too."""
    x = np.random.default_rng(seed).normal(size=[STEPS, 2, BATCH, 2]).astype("float32")
    x[:, 1] += 3
    index = strategy.cluster_resolver.task_id
    data = tf.data.Dataset.from_tensor_slices((x[:, index], x[:, index, :, :1]))
    return strategy.distribute_datasets_from_function(lambda _: data), x


class Keeps(keras.layers.Layer):
    """Keeps things of what it has seen in variables that nothing trains."""

    def __init__(self, **kinds):
        super().__init__()
        self.kinds = kinds

    def build(self, shape):
        def weight(name, shape=(), **settings):
            settings = {"initializer": "zeros", "trainable": False, **settings}
            return self.add_weight(name=name, shape=shape, **settings)

        minus = keras.initializers.Constant(float("-inf"))
        self.largest = weight("largest", initializer=minus)
        self.smallest = weight("smallest")
        self.unused = weight("unused", initializer=minus)
        self.steps = weight("steps", dtype="int32")
        self.seen = weight("seen", aggregation="sum")
        self.average = weight("average")
        self.average_too = weight("average_too", aggregation="mean")
        self.first = weight("first", aggregation="only_first_replica")
        self.queue = weight("queue", [12, 2])
        self.copy = weight("copy", [2, 1])
        self.rounded = weight("rounded", dtype="int32", aggregation="mean")

    def call(self, x, training=False):
        if training:
            self.largest.assign(ops.maximum(self.largest, ops.max(x)))
            self.smallest.assign(ops.minimum(ops.min(x), self.smallest))
            self.steps.assign_add(1)
            self.rounded.assign_add(ops.cast(ops.max(x) > 3, "int32"))
            self.seen.assign_add(ops.cast(ops.shape(x)[0], "float32"))
            for average in (self.average, self.average_too, self.first):
                average.assign(0.5 * average + 0.5 * ops.mean(x))
            self.queue.assign(ops.concatenate([x[:4], self.queue[:-4]]))
        return x


class Model(keras.Sequential):
    def train_step(self, data):
        logs = super().train_step(data)
        keeps, dense = self.layers
        keeps.copy.assign(dense.kernel)
        return logs


def keep(strategy, jit):
    data, _ = own_data(strategy)
    with strategy.scope():
        keeps = Keeps()
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = Model([keras.Input([2]), keeps, dense])
        # So large a beta would throw anything it were applied to far away.
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.SGD(0.01), sync_period=K, block_momentum=0.9
        )
        model.compile(optimizer, "mse")
    model.fit(data, epochs=2, verbose=0, callbacks=[tfbm.BlockTraining(jit_compile=jit)])
    return {v.name: v.numpy() for v in keeps.variables}, dense.kernel.numpy()


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_a_layer_keeps(pair, jit):
    (got, kernel), (other, _) = pair.run(keep, jit, limit=120)
    for name, value in got.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    x = np.random.default_rng(0).normal(size=[STEPS, 2, BATCH, 2]).astype("float32")
    x[:, 1] += 3
    assert got["largest"] == x.max()
    assert got["smallest"] == min(x.min(), 0)
    assert got["unused"] == -np.inf
    assert got["steps"] == 2 * STEPS  # one replica's
    assert got["seen"] == 2 * 2 * STEPS * BATCH  # all examples of both workers and epochs
    above = np.mean((x.max(axis=(2, 3)) > 3).sum(axis=0))  # an epoch, one replica
    assert got["rounded"] == np.round(np.round(above) + above) > 0
    own = [0.0, 0.0]  # a moving average is linear: the mean of the replicas' own
    for step in [*range(STEPS)] * 2:
        own = [0.5 * average + 0.5 * x[step, j].mean() for j, average in enumerate(own)]
    np.testing.assert_allclose(got["average"], np.mean(own), rtol=1e-5)
    np.testing.assert_allclose(got["average_too"], np.mean(own), rtol=1e-5)
    np.testing.assert_allclose(got["first"], own[0], rtol=1e-5)
    np.testing.assert_array_equal(got["queue"], x[[-1, -2, -3], 0, :4].reshape(12, 2))
    # A copy of a weight, assigned in the last step before the boundary: the mean of the replicas'
    # kernels, without the block momentum that the kernel itself gets.
    assert np.abs(got["copy"] - kernel).max() > 0
    assert np.abs(got["copy"] - kernel).max() < 0.1


class Teacher(keras.Model):
    """BYOL, mean teacher: a copy of the network follows it."""

    def __init__(self, frozen):
        super().__init__()
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        self.network = keras.Sequential([keras.Input([2]), dense])
        self.teacher = keras.models.clone_model(self.network)
        self.teacher.set_weights([0 * w for w in self.network.get_weights()])
        self.teacher.trainable = not frozen

    def call(self, x, training=None):
        return self.network(x)

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        weights = self.network.trainable_weights
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x))
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        for w, average in zip(self.network.weights, self.teacher.weights, strict=True):
            average.assign(0.5 * average + 0.5 * w)
        return {"loss": loss}


def teach(strategy, frozen, rate, inner="SGD", eagerly=False):
    data, _ = own_data(strategy)
    with strategy.scope():
        model = Teacher(frozen)
        inner = getattr(keras.optimizers, inner)(rate)
        optimizer = tfbm.BlockMomentum(inner, sync_period=K, block_momentum=0.9)
        model.compile(optimizer, "mse", run_eagerly=eagerly)
    model.fit(data, verbose=0, callbacks=[tfbm.BlockTraining()])
    return model.teacher.get_weights()[0], model.network.get_weights()[0], [
        v.path for v in optimizer.trained_variables
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("eagerly", "frozen"),
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_a_teacher(pair, frozen, eagerly):
    for teacher, network, trained in pair.run(teach, frozen, 0.0, eagerly=eagerly):
        np.testing.assert_allclose(teacher, 1 - 0.5**STEPS, rtol=1e-6)
        np.testing.assert_array_equal(network, np.ones([2, 1]))
        assert len(trained) == 1
    (one, network, _), (other, *_) = pair.run(teach, frozen, 0.05, "Adam", eagerly=eagerly)
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - network).max() > 1e-4


def no_gradient(strategy):
    """A trainable weight that the loss does not reach keeps its value, and is not sent."""
    data, _ = own_data(strategy)
    with strategy.scope():
        inputs = keras.Input([2])
        used = keras.layers.Dense(1)
        output = used(inputs)
        model = keras.Model(inputs, output)
        model.unused = keras.layers.Dense(3)
        model.unused.build([None, 2])
        optimizer = tfbm.BlockMomentum(keras.optimizers.Adam(0.1), sync_period=K)
        model.compile(optimizer, "mse")
    before = model.unused.kernel.numpy()
    with_warning = tfbm.BlockTraining()
    model.fit(data, verbose=0, callbacks=[with_warning])
    return before, model.unused.kernel.numpy(), len(optimizer.trained_variables)


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
def test_a_weight_without_a_gradient(pair):
    for before, after, trained in pair.run(no_gradient):
        np.testing.assert_array_equal(before, after)
        assert trained == 2


def spectral(strategy):
    data, _ = own_data(strategy)
    with scope(strategy):
        dense = keras.layers.Dense(4, use_bias=False)
        model = keras.Sequential(
            [
                keras.Input([2]),
                keras.layers.SpectralNormalization(dense, power_iterations=10),
                keras.layers.Dense(1),
            ]
        )
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.SGD(0.01), sync_period=K, block_momentum=0.9
        )
        model.compile(optimizer, "mse")
    model.fit(data, epochs=3, verbose=0, callbacks=[tfbm.BlockTraining()])
    return dense.kernel.numpy(), [v.path for v in optimizer.trained_variables]


def test_spectral_normalization(pair):
    """Its kernel stays near the unit sphere on which the step puts it: momentum would leave it."""
    (kernel, trained), (other, _) = pair.run(spectral)
    np.testing.assert_array_equal(kernel, other)
    assert 0.8 < np.linalg.norm(kernel, 2) < 1.2
    assert len(trained) == 2  # of the last layer


def recurrent(strategy):
    x = np.random.default_rng(0).normal(size=[STEPS, 2, 4, 3, 2]).astype("float32")
    index = strategy.cluster_resolver.task_id
    data = tf.data.Dataset.from_tensor_slices((x[:, index], x[:, index, :, 0, :1]))
    data = strategy.distribute_datasets_from_function(lambda _: data)
    with strategy.scope():
        rnn = keras.layers.GRU(3, stateful=True)
        model = keras.Sequential([keras.Input([3, 2], batch_size=4), rnn, keras.layers.Dense(1)])
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.01), sync_period=K), "mse")
    model.fit(data, verbose=0, callbacks=[tfbm.BlockTraining()])
    return [np.asarray(state) for state in rnn.states], model.get_weights()


def test_a_recurrent_state(pair):
    (state, weights), (other, its_weights) = pair.run(recurrent)
    for a, b in zip([*state, *weights], [*other, *its_weights], strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(state[0]).max() > 0.01


def plain_variables(strategy, eagerly, data_for=2):
    """TensorFlow's own variables in a step; only the first workers have data."""
    data, _ = own_data(strategy)
    if strategy.cluster_resolver.task_id >= data_for:
        data = strategy.distribute_datasets_from_function(
            lambda _: tf.data.Dataset.from_tensor_slices(
                (np.zeros([0, BATCH, 2], "float32"), np.zeros([0, BATCH, 1], "float32"))
            )
        )
    with strategy.scope():
        average = tf.Variable(0.0, trainable=False)
        steps = tf.Variable(0, trainable=False)
        unused = tf.Variable(7.0, trainable=False)

        class Plain(keras.Sequential):
            def train_step(self, data):
                average.assign(0.5 * average + 0.5 * tf.reduce_mean(data[0]))
                steps.assign_add(1 + strategy.cluster_resolver.task_id)
                return super().train_step(data)

        model = Plain([keras.Input([2]), keras.layers.Dense(1)])
        optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.01), sync_period=K)
        model.compile(optimizer, "mse", run_eagerly=eagerly)
    model.fit(data, verbose=0, callbacks=[tfbm.BlockTraining()])
    return [v.numpy() for v in (average, steps, unused)], model.get_weights()


@pytest.mark.parametrize("eagerly", [False, True])
def test_plain_variables(pair, eagerly):
    (got, weights), (other, its_weights) = pair.run(plain_variables, eagerly)
    np.testing.assert_array_equal(got, other)
    for a, b in zip(weights, its_weights, strict=True):
        np.testing.assert_array_equal(a, b)
    x = np.random.default_rng(0).normal(size=[STEPS, 2, BATCH, 2]).astype("float32")
    x[:, 1] += 3
    want = 0.0
    for step in range(STEPS):  # linear: the mean of the replicas' own
        want = 0.5 * want + 0.5 * x[step].mean()
    np.testing.assert_allclose(got[0], want, rtol=1e-5)
    assert got[1:] == [STEPS, 7.0]


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_a_worker_without_a_batch(pair):
    """What a step changes is known from its trace, or has to be seen."""
    (got, weights), (other, its_weights) = pair.run(plain_variables, False, 1)
    np.testing.assert_array_equal(got, other)
    for a, b in zip(weights, its_weights, strict=True):
        np.testing.assert_array_equal(a, b)
    for error in pair.run(plain_variables, True, 1, expect_error=True):
        assert error.type == "RuntimeError"
        assert "on worker 1 they changed others than on worker 0" in error.text
        assert "Received: worker 1 has had no batch" in error.text
