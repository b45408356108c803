"""`train_on_batch`, and what Keras's own callbacks are put there for."""

import keras
import numpy as np
import pytest
from helpers import replica_values, scope
from test_same_start import alike

import tf_blockmomentum as tfbm
from tf_blockmomentum.strategy import worker_of

K = 3


def batches(worker=0, count=7):
    x = np.random.default_rng(worker).normal(size=[count, 4, 3]).astype("float32")
    return zip(x, x.sum(axis=-1, keepdims=True), strict=True)


def linear(strategy, beta=0.5, rate=0.05, wrapped=True):
    with scope(strategy):
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Sequential([keras.Input([3]), dense])
        inner = keras.optimizers.SGD(rate)
        optimizer = tfbm.BlockMomentum(inner, sync_period=K, block_momentum=beta)
        model.compile(optimizer if wrapped else inner, "mse", metrics=["mae"])
    return model


def loop(strategy):
    """A loop of one's own; in its middle the model is looked at."""
    model, worker = linear(strategy), worker_of(strategy)[0]
    weights, logs = [], []
    for step, (x, y) in enumerate(batches(worker)):
        logs.append(model.train_on_batch(x, y))
        weights.append(model.get_weights()[0])
        if step == 4:
            model.evaluate(x, y, batch_size=2, verbose=0)  # all workers: the block ends
            weights.append(model.get_weights()[0])
    return weights, logs, model.optimizer.blocks


def test_train_on_batch_is_one_local_step(pair):
    results = pair.run(loop)
    own = [list(batches(worker)) for worker in (0, 1)]
    anchor, v = np.ones([3, 1]), np.zeros([3, 1])
    replicas, looked = [anchor, anchor], 0
    for step in range(7):
        for j in (0, 1):
            x, y = own[j][step]
            error = x @ replicas[j] - y
            loss, mae = results[j][1][step]
            np.testing.assert_allclose([loss, mae], [np.mean(error**2), np.abs(error).mean()],
                                       rtol=1e-5, atol=1e-6)  # fmt: skip
            replicas[j] = replicas[j] - 0.05 * 2 * x.T @ error / 4
        if step in (2, 4):  # K steps; evaluate
            if step == 4:
                for j in (0, 1):
                    np.testing.assert_allclose(results[j][0][looked], replicas[j], rtol=1e-5)
                looked += 1
            v = 0.5 * v + np.mean(replicas, axis=0) - anchor
            anchor = anchor + v
            replicas = [anchor, anchor]
        for j in (0, 1):
            np.testing.assert_allclose(results[j][0][looked], replicas[j], rtol=1e-5)
        looked += 1
    assert [blocks for *_, blocks in results] == [2, 2]


def test_train_on_batch_before_and_after_fit(strategy_of, tmp_path):
    """In one process saving ends the block too."""
    model = linear(strategy_of(2))
    (x, y), *_ = batches()
    for _ in range(K + 1):
        model.train_on_batch(x, y)
    assert model.optimizer.blocks == 1
    model.save(tmp_path / "model.keras")
    assert model.optimizer.blocks == 2
    kernel = model.layers[0].kernel
    np.testing.assert_array_equal(*replica_values(kernel))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.get_weights()[0], kernel.numpy())
    model.fit(x, y, batch_size=4, epochs=K, verbose=0, callbacks=[tfbm.BlockTraining()])
    before = model.optimizer.blocks
    for _ in range(K):
        model.train_on_batch(x, y)
    assert model.optimizer.blocks == before + 1


def test_one_replica_is_plain_keras():
    models = [linear(None, 0.0), linear(None, wrapped=False)]
    for x, y in batches():
        results = [model.train_on_batch(x, y, return_dict=True) for model in models]
        assert results[0] == pytest.approx(results[1], rel=1e-6)
    alike([model.get_weights() for model in models])


def terminates(strategy):
    model = linear(strategy)
    x, y = (np.concatenate(part) for part in zip(*batches(count=8), strict=True))
    y[20] = np.nan
    epochs = []
    model.fit(
        x, y, batch_size=4, epochs=5, shuffle=False, verbose=0,
        callbacks=[
            tfbm.BlockTraining(),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch)),
        ],
    )  # fmt: skip
    return model.get_weights(), epochs


def test_terminate_on_nan(pair):
    """It stops all workers, in place of our error, and the weights are the last finite anchor."""
    (weights, epochs), (other, its_epochs) = pair.run(terminates)
    alike([weights, other])
    assert np.isfinite(weights[0]).all()
    assert epochs == its_epochs == [0]
