"""A training loop of one's own, in blocks: `BlockLoop` without `model.fit`.

    python -m tf_blockmomentum.launch --workers 2 examples/custom_loop.py

A linear regression on data made here: labels are a teacher's with noise of variance 0.01,
so that is the loss to reach. Each worker has its own part of the data.
"""

import argparse

import keras
import numpy as np
import tensorflow as tf

import tf_blockmomentum as tfbm

BATCH, FEATURES = 8, 10  # examples per replica and step


def make_data(context):
    """This worker's data: the same teacher, other examples than on every other worker."""
    teacher = np.linspace(-1, 1, FEATURES).astype("float32")[:, None]
    rng = np.random.default_rng(context.input_pipeline_id)
    x = rng.normal(size=[512, FEATURES]).astype("float32")
    y = x @ teacher + 0.1 * rng.normal(size=[512, 1]).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y))
    return data.shuffle(512, seed=0).repeat().batch(BATCH, drop_remainder=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()

    strategy = tfbm.MultiWorkerBlockStrategy()
    with strategy.scope():
        model = keras.Sequential([keras.Input([FEATURES]), keras.layers.Dense(1)])
        optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.01), sync_period=8)
        optimizer.build(model.trainable_variables)
    mean_squared_error = keras.losses.MeanSquaredError()

    def step(batch):
        """What one device would do: nothing is divided by the number of replicas."""
        x, y = batch
        with tf.GradientTape() as tape:
            loss = mean_squared_error(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply(gradients, model.trainable_weights)
        return loss

    loop = tfbm.BlockLoop(step, optimizer, strategy)
    iterator = iter(strategy.distribute_datasets_from_function(make_data))
    for done in range(0, options.steps, 50):
        steps = min(50, options.steps - done)
        loss = loop.run(iterator, steps)  # 6 whole blocks of 8 and 2 steps of the next
        print(f"step {done + steps}: loss on this worker {float(loss):.4f}", flush=True)
    loop.flush()  # now the weights are the anchor, the same on all workers
    kernel = model.layers[0].kernel.numpy()
    print(f"{optimizer.blocks} blocks; kernel {np.round(kernel[:3, 0], 3)} ...", flush=True)


if __name__ == "__main__":
    main()
