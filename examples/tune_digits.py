"""Tunes K and beta on scikit-learn's digits, and checks the result on other seeds.

    python examples/tune_digits.py

searches with four replicas in this process for the pair that is predicted to reach a
validation loss of 0.3 first over a 10 Mbit/s link, writes a heat map, and then counts on
five other seeds (other split, weights and order) how many samples the tuned pair needs
for that, beside K=8, beta=0. Or, with two worker processes and the command:

    python -m tf_blockmomentum.tuner examples/tune_digits.py:build --workers 2 \
        --metric val_loss --target 0.3 --bandwidth 10mbit --sync-period 4 32 --trials 12
"""

import argparse

import keras
import keras_tuner as kt
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import tf_blockmomentum as tfbm

REPLICAS, BATCH, STEPS, EPOCHS = 4, 64, 32, 16  # the global batch; steps of an epoch
METRIC, TARGET = "val_loss", 0.3
# A step of this model on one core, and a link that is as slow beside its 19 kB of weights as
# 1 Gbit/s is beside 2 MB. Measured steps vary from run to run, and four replicas on the cores
# of one machine are slower than four machines; with a constant the search repeats.
STEP_SECONDS, BANDWIDTH = 0.001, "10mbit"


def build(hp):
    """A KerasTuner build function that knows nothing of blocks."""
    model = keras.Sequential(
        [keras.Input([64]), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=STEPS,
    )
    return model


def digits(seed):
    """Training and held-out examples, ((x, y), (x, y))."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    order = np.random.default_rng(seed).permutation(len(x))
    train, held_out = order[:1344], order[1344 : 1344 + 448]
    return (x[train], y[train]), (x[held_out], y[held_out])


class HeldOut(keras.callbacks.Callback):
    """val_loss and val_accuracy, without the second's start that fit's own validation has
    with several replicas in one process. The anchor is the same on every replica."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def on_epoch_end(self, epoch, logs=None):
        logits = self.model(self.x).numpy()
        losses = keras.losses.sparse_categorical_crossentropy(self.y, logits, from_logits=True)
        logs["val_loss"] = float(np.mean(losses))
        logs["val_accuracy"] = float(np.mean(logits.argmax(axis=1) == self.y))


def data(seed=0):
    """fit's arguments: a shuffled endless training set, cut into short epochs."""
    train, held_out = digits(seed)
    examples = tf.data.Dataset.from_tensor_slices(train)
    examples = examples.shuffle(1344, seed=seed).repeat().batch(BATCH, drop_remainder=True)
    options = tf.data.Options()  # each worker takes a share of the examples
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return {
        "x": examples.with_options(options),
        "steps_per_epoch": STEPS,
        "epochs": EPOCHS,
        "shuffle": False,  # done
        "callbacks": [HeldOut(*held_out)],
    }


def samples_to_target(strategy, sync_period, block_momentum, seed):
    """Samples of all replicas until the target (None: not within EPOCHS), and accuracy then."""
    keras.utils.set_random_seed(seed)
    fixed = (sync_period,) * 2, (block_momentum,) * 2
    with strategy.scope():
        model = tfbm.tuner.BlockMomentumHyperModel(build, *fixed).build(kt.HyperParameters())

    class Until(keras.callbacks.Callback):
        samples, accuracy = None, float("nan")

        def on_epoch_end(self, epoch, logs=None):
            if logs[METRIC] <= TARGET:
                self.samples, self.accuracy = (epoch + 1) * STEPS * BATCH, logs["val_accuracy"]
                model.stop_training = True

    until, fit = Until(), data(seed)
    fit["callbacks"] = [tfbm.BlockTraining(), *fit["callbacks"], until]
    model.fit(**fit, verbose=0)
    return until.samples, until.accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--directory", default="runs/tune_digits")
    options = parser.parse_args()

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * REPLICAS,
    )
    strategy = tfbm.MultiDeviceBlockStrategy([f"CPU:{i}" for i in range(REPLICAS)])
    keras.utils.set_random_seed(0)
    tuner = kt.BayesianOptimization(
        tfbm.tuner.BlockMomentumHyperModel(build, sync_period=(4, 32)),
        objective=tfbm.tuner.time_to_target(
            METRIC, TARGET, bandwidth=BANDWIDTH, step_seconds=STEP_SECONDS, give_up=10.0
        ),
        max_trials=options.trials,
        max_consecutive_failed_trials=options.trials,
        distribution_strategy=strategy,
        directory=options.directory,
        project_name="k_and_beta",
        seed=0,
    )
    tuner.search(**data(), verbose=0)
    print(tfbm.tuner.results_table(tuner))
    tfbm.tuner.heat_map(tuner, f"{options.directory}/heat_map.png", REPLICAS)
    print(f"heat map: {options.directory}/heat_map.png\n")

    best = tuner.get_best_hyperparameters()[0].values
    tuned = best["sync_period"], best["block_momentum"]
    print(f"samples until {METRIC} <= {TARGET} (held-out accuracy then), {REPLICAS} replicas:")
    print(f"seed     K=8, beta=0  K={tuned[0]}, beta={tuned[1]:g}  fraction")
    fractions = []
    for seed in range(1, options.seeds + 1):
        (plain, before), (tuned_samples, after) = (
            samples_to_target(strategy, *pair, seed) for pair in ((8, 0.0), tuned)
        )
        fractions.append(tuned_samples / plain if tuned_samples and plain else np.nan)
        print(
            f"{seed:4}  {plain!s:>7} ({before:.3f})  {tuned_samples!s:>7} ({after:.3f})  "
            f"{fractions[-1]:8.2f}",
            flush=True,
        )
    print(f"mean fraction {np.mean(fractions):.2f}")


if __name__ == "__main__":
    main()
