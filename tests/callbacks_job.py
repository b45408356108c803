"""Keras's callbacks and uneven data under two workers; writes what this worker saw."""

import json
import os
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf
from helpers import classifier, crossentropy, examples, unknown_length

import tf_blockmomentum as tfbm

out = pathlib.Path(sys.argv[1])
worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
strategy = tfbm.MultiWorkerBlockStrategy()
saw = {}


def own(*arrays, batch=8):
    """A dataset of this worker alone, to its end; half of each batch is a step's."""
    options = tf.data.Options()
    off = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_distribute.auto_shard_policy = off
    data = tf.data.Dataset.from_tensor_slices(arrays).batch(batch)
    return unknown_length(data.with_options(options))


def compiled(metrics=(), **block):
    keras.utils.set_random_seed(2)
    with strategy.scope():
        model = classifier()
        model.compile(
            tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=3, **block),
            crossentropy(),
            metrics=list(metrics),
        )
    return model


class Count(keras.callbacks.Callback):
    batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1


# 1. All at once, on paths that the workers share.
x, y = examples(96)
writers = [
    keras.callbacks.ModelCheckpoint(out / "best.keras", monitor="loss", save_best_only=True),
    keras.callbacks.ModelCheckpoint(out / "last.weights.h5", save_weights_only=True, save_freq=4),
    keras.callbacks.CSVLogger(out / "log.csv"),
    keras.callbacks.TensorBoard(out / "board"),
]
plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", min_delta=10.0, patience=1, factor=0.5)
stopping = keras.callbacks.EarlyStopping(monitor="loss", min_delta=10.0, patience=3)
model = compiled(["accuracy"])
history = model.fit(
    x,
    y,
    batch_size=16,
    epochs=9,
    verbose=0,
    callbacks=[
        tfbm.BlockTraining(),
        *map(tfbm.ChiefOnly, writers),
        plateau,
        stopping,
        keras.callbacks.TerminateOnNaN(),
    ],
)
saw["loss"] = history.history["loss"]
saw["rates"] = history.history["learning_rate"]
saw["wrote"] = [getattr(callback, "_model", None) is not None for callback in writers]
saw["predicted"] = model.predict(x[:16], verbose=0).tolist()
if worker == 0:
    again = keras.saving.load_model(out / "best.keras")
    saw["kept"] = again.optimizer.blocks

# 2. NaN in one batch of worker 1: its TerminateOnNaN stops alone.
x, y = examples(96, seed=worker)
weights = np.ones(96, "float32")  # of a NaN in x some processors' ReLU makes 0
if worker == 1:
    weights[20] = np.nan  # in the sixth step
count = Count()
callbacks = [
    tfbm.BlockTraining(on_nonfinite="skip"),
    count,
    keras.callbacks.TerminateOnNaN(),
]
model = compiled()
history = model.fit(own(x, y, weights), epochs=3, verbose=0, callbacks=callbacks)
saw["after_nan"] = [len(history.epoch), count.batches, model.optimizer.blocks]
saw["skipped"] = callbacks[0].skipped
saw["finite"] = bool(all(np.isfinite(w).all() for w in model.get_weights()))

# 3. Worker 0 has 6 steps, worker 1 has 23: a metric that is the labels' mean.
x, y = examples(24 if worker == 0 else 92, seed=worker)


def label(y_true, y_pred):
    return tf.cast(y_true, tf.float32)


count = Count()
model = compiled([label])
history = model.fit(own(x, y), epochs=2, verbose=0, callbacks=[tfbm.BlockTraining(), count])
saw["label"] = history.history["label"]
saw["labels"] = [int(y.sum()), len(y)]
saw["uneven"] = [count.batches, model.optimizer.blocks]
saw["weights"] = [w.tolist() for w in model.get_weights()]


# 4. One worker alone stops: in validation, after it at an epoch's end, before a backup.
class StopAlone(keras.callbacks.Callback):
    """Worker 1 stops in the second epoch, where it is told to."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.stop)

    def stop(self, *_):
        if worker == 1 and len(self.model.history.epoch) == 1:
            self.model.stop_training = True


x, y = examples(32)
saw["alone"] = []
for hook in ("on_test_end", "on_epoch_end"):
    for backup in ([], [tfbm.BlockBackup(out / f"backup-{hook}")]):
        history = model.fit(
            x,
            y,
            batch_size=16,
            epochs=3,
            verbose=0,
            validation_data=(x, y),
            callbacks=[tfbm.BlockTraining(), StopAlone(hook), *backup],
        )
        saw["alone"].append(len(history.epoch))
(out / f"{worker}.json").write_text(json.dumps(saw))
