"""A backup holds all of the state, and going on is going on: two real workers."""

import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_same_start import alike

import tf_blockmomentum as tfbm
from tf_blockmomentum import launch
from tf_blockmomentum.strategy import worker_of

STEPS = 6  # an epoch


class At(keras.callbacks.Callback):
    """Does something on one worker at a batch of an epoch."""

    def __init__(self, at, what):
        super().__init__()
        self.at, self.what, self.epoch = at, what, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        on_the_second = worker_of(self.model.distribute_strategy)[0] == 1
        if self.at == (self.epoch, batch) and on_the_second:
            self.what(self.model)


def stop(model):
    model.stop_training = True


def reclaim(model):
    os.kill(os.getpid(), signal.SIGTERM)


class Scripted(keras.callbacks.Callback):
    """A validation loss whose best epoch is the first."""

    def on_epoch_end(self, epoch, logs=None):
        logs["value"] = [1.0, 3.0, 2.0, 1.5][epoch]


def train(strategy, directory, at=None, what=None, overlap=False, epochs=4):
    """Of everything that has a state of its own one; returns what is left of it."""
    index = worker_of(strategy)[0]
    x = np.random.default_rng(index).normal(size=[STEPS, 4, 3, 2]).astype("float32") + 2
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :, 0, :1]))
    keras.utils.set_random_seed(0)
    normalization = keras.layers.Normalization()  # outside the scope
    normalization.adapt(np.random.default_rng(0).normal(size=[20, 2]) * 3)
    with strategy.scope():
        inputs = keras.Input([3, 2], batch_size=4)
        rnn = keras.layers.GRU(3, stateful=True)
        hidden = keras.layers.Dropout(0.2)(rnn(normalization(inputs)))
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        inner = keras.optimizers.Adam(0.01)
        model.compile(tfbm.BlockMomentum(inner, sync_period=4, overlap=overlap), "mse")
    best = keras.callbacks.ModelCheckpoint(
        str(directory / "best.keras"), monitor="value", mode="min", save_best_only=True
    )
    patience = keras.callbacks.EarlyStopping(
        "value", mode="min", patience=3, restore_best_weights=True
    )
    code = None
    try:
        history = model.fit(
            strategy.distribute_datasets_from_function(lambda _: data),
            epochs=epochs, verbose=0,
            callbacks=[
                tfbm.BlockTraining(), Scripted(), tfbm.ChiefOnly(best), patience, At(at, what),
                tfbm.BlockBackup(directory / "backup"),
            ],
        ).history  # fmt: skip
    except SystemExit as error:
        code, history = error.code, {}
    return {
        "code": code,
        "weights": model.get_weights()[:-1],  # without the seeds
        "states": [np.asarray(s) for s in rnn.states],
        "history": history,
        "steps": int(model.optimizer.iterations),
        "best": float(best.best) if index == 0 else None,
        "stopped": patience.stopped_epoch,
    }


@pytest.mark.parametrize(
    "overlap",
    [
        0.25,
        pytest.param(False, marks=pytest.mark.slow),
        pytest.param(1.0, marks=pytest.mark.slow),
    ],
)
def test_stopped_within_an_epoch_and_started_again(pair, tmp_path, overlap):
    """Bit-identical, histories and best values too, and not taken for finished. After SIGTERM the
    script ends there."""
    never = pair.run(train, tmp_path / "whole", overlap=overlap, limit=100)
    assert never[0]["best"] == 1.0
    for what, code in ((stop, None), (reclaim, 143)):
        parts = tmp_path / what.__name__
        first = pair.run(train, parts, (1, 2), what, overlap=overlap)
        assert [saw["code"] for saw in first] == [code, code]
        for saw in first:
            assert STEPS < saw["steps"] < 3 * STEPS
        second = pair.run(train, parts, overlap=overlap)
        assert "going on from" in pair.output[0]
        for want, got in zip(never, second, strict=True):
            assert got["steps"] == want["steps"] == 4 * STEPS
            alike([got["weights"] + got["states"], want["weights"] + want["states"]])
            assert got["history"] == want["history"]
            assert got["best"] == want["best"]
            assert got["stopped"] == want["stopped"]
    finished = pair.run(train, parts, overlap=overlap)  # begun once more it trains no more
    assert finished[0]["steps"] == 4 * STEPS
    assert finished[0]["history"] == never[0]["history"]


ROLE = """
import json, os, sys, time
import keras, numpy as np
import tf_blockmomentum as tfbm

folder, role = sys.argv[1], json.loads(os.environ["TF_CONFIG"])["task"]["type"]
strategy = tfbm.MultiWorkerBlockStrategy()
keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=[32, 3]).astype("float32")
y = x.sum(axis=1, keepdims=True)
with strategy.scope():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.05), sync_period=2), "mse")
saved = os.path.join(folder, "chief.weights.h5")
calls = []
note = keras.callbacks.LambdaCallback()
note.on_test_end = lambda logs=None: calls.append(logs)
value = None
if role == "evaluator":
    while not os.path.exists(saved):
        time.sleep(0.05)
    model.load_weights(saved)
    value = model.evaluate(x, y, batch_size=8, verbose=0, callbacks=[tfbm.ChiefOnly(note)])
else:
    path = os.path.join(folder, f"{role}.part.weights.h5")
    last = tfbm.ChiefOnly(keras.callbacks.ModelCheckpoint(path, save_weights_only=True))
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, validation_data=(x, y),
                        callbacks=[tfbm.BlockTraining(), last]).history
    value = history["val_loss"][-1]
    if role == "chief":
        os.replace(path, saved)
print(json.dumps([strategy.num_replicas_in_sync, value, len(calls)]), flush=True)
"""


def test_a_chief_a_worker_and_an_evaluator(tmp_path):
    (tmp_path / "train.py").write_text(ROLE)
    kinds = ("chief", "worker", "evaluator")
    addresses = [f"127.0.0.1:{port}" for port in launch.free_ports(3)]
    cluster = {kind: [address] for kind, address in zip(kinds, addresses, strict=True)}
    children = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "train.py"), str(tmp_path)],
            env={
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": 0}}),
            },
            stdout=subprocess.PIPE, text=True,
        )
        for kind in kinds
    ]  # fmt: skip
    try:
        told = [json.loads(child.communicate(timeout=100)[0]) for child in children]
    finally:
        for child in children:
            child.kill()
    (replicas, value, _), worker, evaluator = told
    assert (replicas, worker[0], evaluator[0]) == (2, 2, 1)
    assert worker[1] == value
    assert evaluator[1] == pytest.approx(value, rel=1e-5)
    assert evaluator[2] == 1  # it is the first and only worker of its own
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["chief.weights.h5"]
