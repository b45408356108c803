"""One worker of a cluster: `worker.py OUT PARTS`. Runs the parts, by number, and writes what
it saw.

Every worker writes `OUT/<index>.npz`; test_workers.py compares the workers with each other
and with the NumPy reference. One start of TensorFlow serves many checks.
"""

import json
import os
import sys
import warnings

import keras
import numpy as np
import tensorflow as tf
from helpers import classifier, crossentropy, examples, unknown_length

import tf_blockmomentum as tfbm

out, parts = sys.argv[1:]
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
strategy = tfbm.MultiWorkerBlockStrategy()
workers = strategy.num_replicas_in_sync
saw = {}
BATCH, FEATURES, CLASSES = 4, 5, 3


def say(text):
    print(text, flush=True)


def oracle_data(steps, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[steps, workers, BATCH, FEATURES]).astype("float32")
    y = rng.integers(CLASSES, size=[steps, workers, BATCH])
    return x, y


def own_share(x, y):
    """This worker's data, taken by hand, so that the test knows which replica saw what."""
    return tf.data.Dataset.from_tensor_slices((x[:, index], y[:, index]))


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


# -- 1. the oracle: weights after every boundary ----------------------------------------------
for case, (jit, settings) in enumerate(
    [
        (False, {"sync_period": 3, "block_momentum": 0.5}),
        (True, {"sync_period": 4, "block_momentum": 0.9, "nesterov": True}),
        (False, {"sync_period": 1, "block_momentum": 0.0}),
        (True, {"sync_period": 2, "block_momentum": 0.5, "overlap": True}),
    ]
):
    x, y = oracle_data(steps=7, seed=case)
    with strategy.scope():
        keras.utils.set_random_seed(index)  # unlike on purpose: the chief's values count
        model = linear(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), **settings))
    saw[f"start_{case}_kernel"], saw[f"start_{case}_bias"] = model.get_weights()
    recorder = Recorder()
    data = strategy.distribute_datasets_from_function(lambda _, x=x, y=y: own_share(x, y))
    model.fit(data, epochs=2, verbose=0, callbacks=[tfbm.BlockTraining(jit_compile=jit), recorder])
    saw[f"kernels_{case}"] = np.stack([kernel for kernel, _ in recorder.steps])
    saw[f"biases_{case}"] = np.stack([bias for _, bias in recorder.steps])
    saw[f"blocks_{case}"] = model.optimizer.blocks
say("oracle done")

# -- 2. fit as people use it: shuffled arrays, validation, BatchNorm, dropout, XLA, Adam ---------
if "2" in parts:
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
    saw["evaluate_before"] = model.evaluate(x, y, batch_size=24, verbose=0)
    saw["predict_before"] = model.predict(x, batch_size=24, verbose=0)
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
    if index == 0:
        model.save(os.path.join(out, "model.keras"))  # the chief alone: nobody waits
    say("fit done")

# -- 3. data that ends earlier on some workers, of unknown length ---------------------------------
if "3" in parts:
    for steps_per_execution, overlap in ((1, False), (3, False), (2, True)):
        with strategy.scope():
            keras.utils.set_random_seed(0)
            model = linear(
                tfbm.BlockMomentum(
                    keras.optimizers.SGD(0.1),
                    sync_period=4,
                    block_momentum=0.5,
                    overlap=overlap,
                ),
                metrics=["accuracy"],
                steps_per_execution=steps_per_execution,
            )
        steps = 10 - 3 * index  # 10, 7, 4
        x_own, y_own = (part[:steps] for part in oracle_data(10, seed=9))
        own = unknown_length(own_share(x_own, y_own))
        data = strategy.distribute_datasets_from_function(lambda _, own=own: own)
        start = model.get_weights()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's "ran out of data"
            history = model.fit(
                data, epochs=2, verbose=0, callbacks=[tfbm.BlockTraining()]
            ).history
        saw[f"uneven_{steps_per_execution}_kernel"] = model.get_weights()[0]
        saw[f"uneven_{steps_per_execution}_blocks"] = model.optimizer.blocks
        saw[f"uneven_{steps_per_execution}_accuracy"] = history["accuracy"]
        saw[f"uneven_{steps_per_execution}_start"] = start[0]
    say("uneven done")

# -- 4. Keras's own optimizer: synchronous ------------------------------------------------------
if "4" in parts:
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = linear(keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy"])
    saw["stock_start"] = model.get_weights()[0]
    x, y = oracle_data(6, seed=5)
    data = strategy.distribute_datasets_from_function(lambda _, x=x, y=y: own_share(x, y))
    history = model.fit(data, epochs=2, verbose=0).history
    saw["stock_kernel"], saw["stock_accuracy"] = model.get_weights()[0], history["accuracy"]

    class Own(keras.Model):
        def train_step(self, data):
            super().train_step(data)
            return {"worker": tf.constant(float(index))}

    with strategy.scope():
        inputs = keras.Input([FEATURES])
        model = Own(inputs, keras.layers.Dense(CLASSES)(inputs))
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1)), crossentropy())
    history = model.fit(data, verbose=0, callbacks=[tfbm.BlockTraining()]).history
    saw["own_log"] = history["worker"]
    say("stock done")

# -- 5. errors ----------------------------------------------------------------------------------
if "5" in parts:
    x, y = examples()
    with strategy.scope():
        model = linear(tfbm.BlockMomentum(keras.optimizers.SGD(0.1)))
    odd = 8 * workers + 1
    try:
        model.fit(
            np.ones([40, 5]), np.ones([40]), batch_size=odd, callbacks=[tfbm.BlockTraining()]
        )
    except ValueError as error:
        saw["error_batch"] = str(error)
    try:
        model.fit(np.ones([24, 5]), np.ones([24]), batch_size=4 * workers, verbose=0)
    except RuntimeError as error:
        saw["error_callback"] = str(error)

np.savez(os.path.join(out, f"{index}.npz"), **saw)
say("end")
