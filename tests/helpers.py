"""What several test modules share."""

import contextlib
import os
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf


def forget_keras_state():
    """As new for the next test: names, graphs, dtype policy, functions that run compiled."""
    keras.backend.clear_session()
    keras.config.set_dtype_policy("float32")
    tf.config.run_functions_eagerly(False)


def scope(strategy):
    """The strategy's scope; nothing without one."""
    return strategy.scope() if strategy else contextlib.nullcontext()


def replica_values(variable):
    """A variable's value on every replica of this process."""
    parts = getattr(variable.value, "values", [variable.value])
    return [part.numpy() for part in parts]


def examples(count=96, features=6, classes=3, seed=0):
    """A separable classification task: x, y."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[count, features]).astype("float32")
    y = np.argmax(x @ rng.normal(size=[features, classes]), axis=1)
    return x, y


def classifier(features=6, classes=3, dropout=False):
    """A small model with BatchNormalization, built."""
    layers = [
        keras.Input([features]),
        keras.layers.Dense(8, activation="relu"),
        keras.layers.BatchNormalization(),
        *([keras.layers.Dropout(0.25, seed=1)] if dropout else []),
        keras.layers.Dense(classes, dtype="float32"),
    ]
    return keras.Sequential(layers)


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dataset(x, y, batch=16):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)


def unknown_length(data):
    """The same dataset, its length unknown, as a generator's is."""
    return data.filter(lambda *_: True)


class Counter(keras.callbacks.Callback):
    """Counts calls, and remembers the blocks ended when validation and epochs end."""

    def __init__(self):
        super().__init__()
        self.batches, self.blocks_at_validation, self.blocks_at_epoch_end = 0, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1

    def on_test_begin(self, logs=None):
        self.blocks_at_validation.append(self.model.optimizer.blocks)

    def on_epoch_end(self, epoch, logs=None):
        self.blocks_at_epoch_end.append(self.model.optimizer.blocks)


def run_python(*arguments, limit, environment=None, **others):
    """What a Python program prints; if it fails, the test does, with all that the program said."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={"PYTHONFAULTHANDLER": "1", **(os.environ if environment is None else environment)},
        capture_output=True, text=True, timeout=limit, check=False, **others,
    )  # fmt: skip
    said = f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert done.returncode == 0, f"ended with {done.returncode}: {said}"
    return done.stdout
