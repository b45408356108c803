"""Keras's callbacks on two real workers, and data that is not the same on both."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import Counter, classifier, crossentropy, examples, unknown_length

import tf_blockmomentum as tfbm
from tf_blockmomentum.strategy import worker_of


def own(*arrays, batch=8):
    """A dataset of this worker alone, to its end; half of each batch is a step's."""
    options = tf.data.Options()
    off = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_distribute.auto_shard_policy = off
    data = tf.data.Dataset.from_tensor_slices(arrays).batch(batch)
    return unknown_length(data.with_options(options))


def compiled(strategy, metrics=()):
    keras.utils.set_random_seed(2)
    with strategy.scope():
        model = classifier()
        model.compile(
            tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=3),
            crossentropy(),
            metrics=list(metrics),
        )
    return model


def all_at_once(strategy, out):
    """On paths that the workers share."""
    x, y = examples(96)
    writers = [
        keras.callbacks.ModelCheckpoint(out / "best.keras", monitor="loss", save_best_only=True),
        keras.callbacks.ModelCheckpoint(
            out / "last.weights.h5", save_weights_only=True, save_freq=4
        ),
        keras.callbacks.CSVLogger(out / "log.csv"),
        keras.callbacks.TensorBoard(out / "board"),
    ]
    model = compiled(strategy, ["accuracy"])
    history = model.fit(
        x,
        y,
        batch_size=16,
        epochs=9,
        verbose=0,
        callbacks=[
            tfbm.BlockTraining(),
            *map(tfbm.ChiefOnly, writers),
            keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=1, min_delta=10.0),
            keras.callbacks.EarlyStopping("loss", patience=3, min_delta=10.0),
            keras.callbacks.TerminateOnNaN(),
        ],
    ).history
    return {
        "loss": history["loss"],
        "rates": history["learning_rate"],
        "wrote": [getattr(callback, "_model", None) is not None for callback in writers],
        "predicted": model.predict(x[:16], verbose=0).tolist(),
    }


def test_callbacks_decide_alike_and_the_chief_alone_writes(pair, tmp_path):
    saw = pair.run(all_at_once, tmp_path)
    # EarlyStopping, ReduceLROnPlateau: the same decisions.
    assert saw[0]["loss"] == saw[1]["loss"]
    assert len(saw[0]["loss"]) == 4
    np.testing.assert_allclose(saw[0]["rates"], [0.1, 0.1, 0.05, 0.025], rtol=1e-6)
    assert saw[0]["rates"] == saw[1]["rates"]
    assert saw[0]["predicted"] == saw[1]["predicted"]
    # ModelCheckpoint, CSVLogger, TensorBoard: the chief's files alone, whole.
    assert saw[0]["wrote"] == [True] * 4
    assert saw[1]["wrote"] == [False] * 4
    assert keras.saving.load_model(tmp_path / "best.keras").optimizer.blocks > 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 4
    assert len(list((tmp_path / "board").glob("*/events*"))) == 1
    assert (tmp_path / "last.weights.h5").exists()


def nan_on_the_last(strategy):
    worker, count = worker_of(strategy)
    x, y = examples(96, seed=worker)
    weights = np.ones(96, "float32")  # of a NaN in x some processors' ReLU makes 0
    if worker == count - 1:
        weights[20] = np.nan  # in the sixth step
    training, counter = tfbm.BlockTraining(on_nonfinite="skip"), Counter()
    model = compiled(strategy)
    with pytest.warns(UserWarning, match="A delta is not finite.*Left out"):
        history = model.fit(
            own(x, y, weights),
            epochs=3,
            verbose=0,
            callbacks=[training, counter, keras.callbacks.TerminateOnNaN()],
        )
    return {
        "epochs": len(history.epoch),
        "batches": counter.batches,
        "blocks": model.optimizer.blocks,
        "skipped": training.skipped,
        "finite": bool(all(np.isfinite(w).all() for w in model.get_weights())),
    }


def test_one_worker_that_terminates_on_nan_ends_the_fit_of_both(pair):
    """At its sixth step: both end the epoch at the next boundary, and fit."""
    saw = pair.run(nan_on_the_last)
    assert "Batch 5: Invalid loss, terminating training" in pair.output[1]
    assert [s["epochs"] for s in saw] == [1, 1]
    assert saw[1]["batches"] == 9
    assert saw[0]["batches"] < 24
    assert saw[0]["blocks"] == saw[1]["blocks"]
    assert [s["skipped"] for s in saw] == [1, 1]
    assert saw[0]["finite"]
    assert saw[1]["finite"]


def label(y_true, y_pred):
    """A metric that is the labels' mean."""
    return tf.cast(y_true, tf.float32)


def six_steps_and_23(strategy):
    worker, _ = worker_of(strategy)
    x, y = examples(24 if worker == 0 else 92, seed=worker)
    counter = Counter()
    model = compiled(strategy, [label])
    history = model.fit(
        own(x, y), epochs=2, verbose=0, callbacks=[tfbm.BlockTraining(), counter]
    ).history
    return {
        "label": history["label"],
        "labels": [int(y.sum()), len(y)],
        "batches": counter.batches,
        "weights": [w.tolist() for w in model.get_weights()],
    }


def test_uneven_data_is_counted_once(pair):
    """No hang, every example counted once, the same weights."""
    saw = pair.run(six_steps_and_23)
    assert [s["batches"] for s in saw] == [2 * 6, 2 * 23]
    (sum_0, count_0), (sum_1, count_1) = saw[0]["labels"], saw[1]["labels"]
    mean = (sum_0 + sum_1) / (count_0 + count_1)
    for s in saw:
        np.testing.assert_allclose(s["label"], [mean, mean], rtol=1e-6)
    assert saw[0]["weights"] == saw[1]["weights"]


class StopAlone(keras.callbacks.Callback):
    """One worker stops in the second epoch, where it is told to."""

    def __init__(self, hook, stops):
        super().__init__()
        self.stops = stops
        setattr(self, hook, self.stop)

    def stop(self, *_):
        if self.stops and len(self.model.history.epoch) == 1:
            self.model.stop_training = True


def one_stops(strategy, hook, backup):
    worker, _ = worker_of(strategy)
    x, y = examples(32)
    history = compiled(strategy).fit(
        x,
        y,
        batch_size=16,
        epochs=3,
        verbose=0,
        validation_data=(x, y),
        callbacks=[
            tfbm.BlockTraining(),
            StopAlone(hook, worker == 1),
            *([tfbm.BlockBackup(backup)] if backup else []),
        ],
    )
    return len(history.epoch)


@pytest.mark.parametrize(
    ("backup", "hook"),
    [
        (False, "on_test_end"),
        (True, "on_epoch_end"),
        pytest.param(False, "on_epoch_end", marks=pytest.mark.slow),
        pytest.param(True, "on_test_end", marks=pytest.mark.slow),
    ],
)
def test_one_worker_that_stops_alone_ends_the_fit_of_both(pair, tmp_path, hook, backup):
    """In validation, and after it at an epoch's end; with a backup that follows, and without."""
    assert pair.run(one_stops, hook, tmp_path if backup else None) == [2, 2]
