"""Keras 2 (tf_keras), `fit` under MultiWorkerMirroredStrategy: the synchronous training that
worked before Keras 3. Prints JSON lines as speed.py's own workers do."""

import json
import statistics
import sys
import time

import numpy as np
import tensorflow as tf
import tf_keras

batch, rounds, _, *widths = (int(a.split(",")[0]) for a in sys.argv[1:])  # batch, rounds, all K
strategy = tf.distribute.MultiWorkerMirroredStrategy()
rng = np.random.default_rng(0)
x = rng.normal(size=[batch, widths[0]]).astype("float32")
y = rng.integers(widths[-1], size=batch)
data = strategy.distribute_datasets_from_function(
    lambda _: tf.data.Dataset.from_tensors((x, y)).repeat()
)


class Clock(tf_keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())


with strategy.scope():
    hidden = [tf_keras.layers.Dense(n, activation="relu") for n in widths[1:-1]]
    model = tf_keras.Sequential([*hidden, tf_keras.layers.Dense(widths[-1])])
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.SGD(0.001), loss)
seconds, clock = [], Clock()
for n in range(rounds + 1):  # the first one compiles
    model.fit(data, steps_per_epoch=24, verbose=0, callbacks=[clock])
    if n:
        seconds.append((clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1))
if strategy.cluster_resolver.task_id == 0:
    row = {"method": "synchronous fit", "k": 1, "family": "Keras 2"}
    print(json.dumps({**row, "step_seconds": statistics.median(seconds)}), flush=True)
