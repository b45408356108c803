"""What test_workers.py runs on every worker of a pool: each returns a dict of what it saw.

The test compares the workers with each other and with the NumPy reference.
"""

import os

import keras
import numpy as np
import tensorflow as tf
from helpers import classifier, crossentropy, examples, unknown_length

import tf_blockmomentum as tfbm
from tf_blockmomentum.strategy import worker_of

BATCH, FEATURES, CLASSES = 4, 5, 3


def oracle_data(workers, steps, seed):
    """x of [steps, workers, BATCH, FEATURES] and y of [steps, workers, BATCH]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[steps, workers, BATCH, FEATURES]).astype("float32")
    y = rng.integers(CLASSES, size=[steps, workers, BATCH])
    return x, y


def own_share(strategy, x, y):
    """This worker's data, taken by hand, so that the test knows which replica saw what."""
    index, _ = worker_of(strategy)
    own = tf.data.Dataset.from_tensor_slices((x[:, index], y[:, index]))
    return strategy.distribute_datasets_from_function(lambda _: own)


class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append([w.numpy() for w in self.model.trainable_variables])


def linear(optimizer, **settings):
    model = keras.Sequential([keras.Input([FEATURES]), keras.layers.Dense(CLASSES)])
    model.compile(optimizer, crossentropy(), **settings)
    return model


def oracle(strategy, x, y, jit, settings):
    """The weights after every step of two epochs."""
    index, _ = worker_of(strategy)
    with strategy.scope():
        keras.utils.set_random_seed(index)  # unlike on purpose: the chief's values count
        model = linear(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), **settings))
    kernel, bias = model.get_weights()
    recorder = Recorder()
    callbacks = [tfbm.BlockTraining(jit_compile=jit), recorder]
    model.fit(own_share(strategy, x, y), epochs=2, verbose=0, callbacks=callbacks)
    return {
        "start_kernel": kernel,
        "start_bias": bias,
        "kernels": np.stack([kernel for kernel, _ in recorder.steps]),
        "biases": np.stack([bias for _, bias in recorder.steps]),
        "blocks": model.optimizer.blocks,
    }


def fit(strategy, out):
    """As people use it: shuffled arrays, validation, BatchNorm, dropout, XLA, Adam."""
    x, y = examples()
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = classifier(dropout=True)
        model.compile(
            tfbm.BlockMomentum(keras.optimizers.Adam(0.01), sync_period=4),
            crossentropy(),
            metrics=["accuracy"],
            steps_per_execution=3,
            jit_compile=True,
        )
    saw = {
        "evaluate_before": model.evaluate(x, y, batch_size=24, verbose=0),
        "predict_before": model.predict(x, batch_size=24, verbose=0),
    }
    history = model.fit(
        x, y, batch_size=24, epochs=4, validation_data=(x, y), verbose=0,
        callbacks=[tfbm.BlockTraining()],
    ).history  # fmt: skip
    for name, values in history.items():
        saw[f"history_{name}"] = values
    saw["evaluate_after"] = model.evaluate(x, y, batch_size=24, verbose=0)
    saw["predict_after"] = model.predict(x, batch_size=24, verbose=0)
    for i, variable in enumerate(model.weights):
        if "seed" not in variable.path:
            saw[f"weight_{i}"] = variable.numpy()
    saw["seeds"] = [g.state.numpy()[0] for layer in model.layers for g in layer._seed_generators]
    if worker_of(strategy)[0] == 0:
        model.save(os.path.join(out, "model.keras"))  # the chief alone: nobody waits
    return saw


def uneven(strategy, x, y, steps_per_execution, overlap):
    """Data that ends earlier on some workers, of unknown length: 10, 7, 4 steps."""
    index, _ = worker_of(strategy)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = linear(
            tfbm.BlockMomentum(
                keras.optimizers.SGD(0.1), sync_period=4, block_momentum=0.5, overlap=overlap
            ),
            metrics=["accuracy"],
            steps_per_execution=steps_per_execution,
        )
    steps = 10 - 3 * index
    own = tf.data.Dataset.from_tensor_slices((x[:steps, index], y[:steps, index]))
    own = unknown_length(own)
    data = strategy.distribute_datasets_from_function(lambda _: own)
    start = model.get_weights()[0]
    history = model.fit(data, epochs=2, verbose=0, callbacks=[tfbm.BlockTraining()]).history
    return {
        "start": start,
        "kernel": model.get_weights()[0],
        "blocks": model.optimizer.blocks,
        "accuracy": history["accuracy"],
    }


def stock(strategy, x, y):
    """Keras's own optimizer: synchronous."""
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = linear(keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy"])
    start = model.get_weights()[0]
    history = model.fit(own_share(strategy, x, y), epochs=2, verbose=0).history
    return {"start": start, "kernel": model.get_weights()[0], "accuracy": history["accuracy"]}


def own_log(strategy, x, y):
    """What a train_step returns itself, the worker's number; the epoch's log."""
    index, _ = worker_of(strategy)

    class Own(keras.Model):
        def train_step(self, data):
            super().train_step(data)
            return {"worker": tf.constant(float(index))}

    with strategy.scope():
        inputs = keras.Input([FEATURES])
        model = Own(inputs, keras.layers.Dense(CLASSES)(inputs))
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1)), crossentropy())
    data = own_share(strategy, x, y)
    return model.fit(data, verbose=0, callbacks=[tfbm.BlockTraining()]).history["worker"]


def fit_ones(strategy, count, batch_size, callback):
    """A fit that its arguments forbid."""
    with strategy.scope():
        model = linear(tfbm.BlockMomentum(keras.optimizers.SGD(0.1)))
    model.fit(
        np.ones([count, FEATURES]),
        np.ones([count]),
        batch_size=batch_size,
        callbacks=[tfbm.BlockTraining()] if callback else [],
        verbose=0,
    )
