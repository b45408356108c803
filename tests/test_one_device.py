"""A local step is one device's: losses, gradients, clipping and what is reported.

Each program runs twice: in plain Keras, and on two workers with K=1 and beta=0. Around plain SGD
that is gradient descent on the global batch, whose halves are unlike.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import scope
from keras import ops
from test_oracles import close

import tf_blockmomentum as tfbm

STEPS, BATCH = 3, 16


def wrapped(strategy, inner, **settings):
    """Plain Keras's optimizer without a strategy, and in blocks what should equal it."""
    if strategy is None:
        return inner
    settings = {"sync_period": 1, "block_momentum": 0, **settings}
    return tfbm.BlockMomentum(inner, **settings)


def regression(scale=1.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[STEPS * BATCH, 3])
    y = x @ rng.normal(size=[3, 1]) + rng.normal(size=[len(x), 1])
    return (scale * x).astype("float32"), (scale * y).astype("float32")


def result(strategy, model, x, y=None, epochs=2, **settings):
    callbacks = [] if strategy is None else [tfbm.BlockTraining()]
    history = model.fit(
        x, y, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks,
        **{"batch_size": BATCH, **settings},
    ).history  # fmt: skip
    return model.get_weights(), history


def squared(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred))  # one number


class OwnReduction(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred))


def compiled_loss(strategy, loss, policy="float32", regularized=False, metric=True):
    keras.config.set_dtype_policy(policy)
    loss = OwnReduction() if loss == "own reduction" else loss
    # So that loss scaling overflows on no replica: it would leave out that one's step alone.
    data = regression(0.05 if "16" in policy else 1.0)
    with scope(strategy):
        l2 = keras.regularizers.L2(0.1) if regularized else None
        dense = keras.layers.Dense(1, kernel_initializer="ones", kernel_regularizer=l2)
        head = keras.layers.Activation("linear", dtype="float32")
        model = keras.Sequential([keras.Input([3]), dense, head])
        model.compile(
            wrapped(strategy, keras.optimizers.SGD(0.05)),
            loss,
            metrics=["mae"] if metric else [],
        )
    weights, history = result(strategy, model, *data)
    return weights, history, model.evaluate(*data, batch_size=BATCH, verbose=0)


@pytest.mark.parametrize(
    ("loss", "policy", "regularized"),
    [
        ("mse", "float32", True),
        pytest.param(squared, "float32", False, marks=pytest.mark.slow),
        pytest.param(squared, "float32", True, marks=pytest.mark.slow),
        ("own reduction", "float32", False),
        (squared, "mixed_float16", False),
    ],
)
def test_a_compiled_loss(pair, loss, policy, regularized):
    want = compiled_loss(None, loss, policy, regularized)
    rtol = 5e-3 if "16" in policy else 1e-5
    for got in pair.run(compiled_loss, loss, policy, regularized):
        for a, b in zip(got[0], want[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10)
        assert got[1].keys() == want[1].keys()
        for name, values in want[1].items():
            np.testing.assert_allclose(got[1][name], values, rtol=rtol)
        np.testing.assert_allclose(got[2], want[2], rtol=rtol)


class VAE(keras.Model):
    """Losses by hand, and those of layers: nothing goes through compile's loss."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.layers.Dense(2, kernel_regularizer="l2", kernel_initializer="ones")
        self.decoder = keras.layers.Dense(3, kernel_initializer="ones")
        self.tracker = keras.metrics.Mean(name="total")

    def call(self, x):
        code = self.encoder(x)
        self.add_loss(0.1 * ops.mean(ops.square(code)))
        return self.decoder(code)

    def train_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(x - self(x, training=True))) + sum(self.losses)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self.tracker.update_state(loss)
        return {"total": self.tracker.result()}

    @property
    def metrics(self):
        return [self.tracker]


def vae(strategy):
    with scope(strategy):
        model = VAE()
        model.compile(wrapped(strategy, keras.optimizers.SGD(0.05)))
    return result(strategy, model, regression()[0])


class Mixed(keras.Sequential):
    """Part of the loss is compiled, part is made by hand."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
            loss += tf.reduce_mean(tf.abs(y_pred))
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return self.compute_metrics(x, y, y_pred)


def mixed(strategy):
    with scope(strategy):
        dense = keras.layers.Dense(1, kernel_initializer="ones", kernel_regularizer="l1")
        model = Mixed([keras.Input([3]), dense])
        model.compile(wrapped(strategy, keras.optimizers.SGD(0.05)), "mse", metrics=["mse"])
    weights, history = result(strategy, model, *regression())
    return weights, {"mse": history["mse"]}


class AverageLoss(keras.Sequential):
    """As TensorFlow's guides to distributed training have it."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        with tf.GradientTape() as tape:
            errors = tf.reduce_sum(tf.square(y - self(x, training=True)), axis=-1)
            loss = tf.nn.compute_average_loss(errors) + tf.reduce_mean(errors) / replicas
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"none": tf.constant(0.0)}


def average_loss(strategy):
    with scope(strategy):
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = AverageLoss([keras.Input([3]), dense])
        model.compile(wrapped(strategy, keras.optimizers.SGD(0.05)))
    return result(strategy, model, *regression())


@pytest.mark.parametrize("program", [vae, mixed, average_loss])
def test_a_loss_by_hand(pair, program):
    want = program(None)
    for weights, history in pair.run(program):
        close(weights, want[0])
        assert history.keys() == want[1].keys()
        for name, values in want[1].items():
            np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)


class Clips(keras.Sequential):
    """Its own clipping, by the norm of all gradients."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = squared(y, self(x, training=True))
        weights = self.trainable_weights
        gradients, norm = tf.clip_by_global_norm(tape.gradient(loss, weights), 0.5)
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {"loss": loss, "norm": norm}


def clips(strategy, worker):
    """Every worker has examples of its own, and one replica of those alone is plain Keras."""
    rng = np.random.default_rng(worker)
    x = rng.normal(size=[8, 3]).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    data = tf.data.Dataset.from_tensors((x, y))
    with scope(strategy):
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = Clips([keras.Input([3]), dense])
        model.compile(wrapped(strategy, keras.optimizers.SGD(0.1)))
    if strategy is not None:
        data = strategy.distribute_datasets_from_function(lambda _: data)
    return result(strategy, model, data, epochs=1, batch_size=None)[0]


def clips_own(strategy):
    return clips(strategy, strategy.cluster_resolver.task_id)


def test_clipping_in_a_train_step(pair):
    """One step: the mean of what each device would have made of its own examples."""
    want = [np.mean(pairs, axis=0) for pairs in zip(clips(None, 0), clips(None, 1), strict=True)]
    for got in pair.run(clips_own):
        close(got, want)


def hand_made_loop(strategy, hand):
    """BlockLoop: the loss is that of one device, and its outputs are too."""
    x, y = regression()
    index, workers = strategy.cluster_resolver.task_id, 2
    own = [part.reshape(STEPS, workers, 8, -1)[:, index] for part in (x, y)]
    data = tf.data.Dataset.from_tensor_slices(tuple(own))
    loss_fn = keras.losses.MeanSquaredError()
    with strategy.scope():
        w = keras.Variable(np.ones([3, 1], "float32"))
        optimizer = wrapped(strategy, keras.optimizers.SGD(0.1))

    def step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            y_pred = x @ w.value
            loss = tf.reduce_mean(tf.square(y - y_pred)) if hand else loss_fn(y, y_pred)
        optimizer.apply([tape.gradient(loss, w.value)], [w])
        return loss

    loop = tfbm.BlockLoop(step, optimizer, strategy)
    iterator = iter(strategy.distribute_datasets_from_function(lambda _: data))
    losses = [float(loop.run(iterator, 1)) for _ in range(STEPS)]
    return w.numpy(), losses


@pytest.mark.parametrize("hand", [True, False])
def test_block_loop(pair, hand):
    x, y = (part.astype("float64") for part in regression())
    w, losses = np.ones([3, 1]), []
    for s in range(0, STEPS * BATCH, BATCH):
        error = x[s : s + BATCH] @ w - y[s : s + BATCH]
        losses.append([np.mean(half**2) for half in (error[:8], error[8:])])
        w = w - 0.1 * 2 * x[s : s + BATCH].T @ error / BATCH
    for worker, (got, its_losses) in enumerate(pair.run(hand_made_loop, hand)):
        np.testing.assert_allclose(got, w, rtol=1e-5)
        np.testing.assert_allclose(its_losses, [pair_[worker] for pair_ in losses], rtol=1e-5)


class Bag(keras.Model):
    """The mean of the embeddings of a ragged row, or of a sparse row's columns."""

    def build(self, shape):
        self.table = self.add_weight(shape=[5, 3], initializer="ones")

    def call(self, x):
        if isinstance(x, tf.RaggedTensor):
            return tf.reduce_mean(tf.ragged.map_flat_values(tf.gather, self.table, x), axis=1)
        return tf.sparse.sparse_dense_matmul(x, self.table)


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_a_model_not_built_of_ragged_and_sparse_inputs(kind):
    x = tf.ragged.constant([[1], [2, 3], [4], [0, 1, 2]])
    if kind == "sparse":
        x = tf.sparse.from_dense(tf.one_hot([1, 2, 4, 0], 5))
    y = np.arange(12.0, dtype="float32").reshape(4, 3)
    results = []
    for wrap in (False, True):
        model, inner = Bag(), keras.optimizers.SGD(0.1)
        model.compile(tfbm.BlockMomentum(inner, 1, block_momentum=0.0) if wrap else inner, "mse")
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
        callbacks = [tfbm.BlockTraining()] if wrap else []
        losses = model.fit(data, epochs=2, verbose=0, callbacks=callbacks).history["loss"]
        results.append((losses, model.get_weights()))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    np.testing.assert_allclose(results[1][1][0], results[0][1][0], rtol=1e-5)
