"""The main job: one small CNN trained three ways over several workers, with the same samples.

    python examples/digits_three_ways.py
    python examples/digits_three_ways.py --workers 4 --sync-period 16 --block-momentum 0.7
    python examples/digits_three_ways.py --dataset cifar10 --epochs 40     # needs a network

Synchronous SGD averages at every step; K-AVG at every K-th; M-AVG too, and applies block
momentum there. Ends with a table and writes the curves to `runs/digits_three_ways.png`.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import digits
import keras

import tf_blockmomentum as tfbm
from tf_blockmomentum import launch

RUNS = Path("runs")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dataset", default="digits", help="a TFDS name (default: digits)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="examples per worker and step")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--sync-period", type=int, default=8, help="K")
    parser.add_argument("--block-momentum", type=float, default=0.7, help="beta")
    parser.add_argument("--target-loss", type=float, default=0.1)
    return parser.parse_args()


def main():
    options = parse()
    if "TF_CONFIG" in os.environ:
        return train(options)
    RUNS.mkdir(exist_ok=True)
    print(f"Preparing {options.dataset} ...", flush=True)
    digits.prepare(options.dataset)
    print(f"Starting {options.workers} workers ...", flush=True)
    # On the cores: a small CNN, and there may be fewer GPUs than workers.
    where = ["--workers", str(options.workers), "--gpus-per-worker", "0"]
    status = launch.main([*where, __file__, *sys.argv[1:]])
    if status == 0:
        report(json.loads(results_file(options).read_text()), options)
    return status


def results_file(options):
    return RUNS / f"{options.dataset}_three_ways.json"


def train(options):
    """What every worker runs."""
    strategy = tfbm.MultiWorkerBlockStrategy()
    builder = digits.prepare(options.dataset)  # already on disk
    replicas = strategy.num_replicas_in_sync
    steps = builder.info.splits["train"].num_examples // (options.batch * replicas)

    def dataset(split, training):
        def make(context):
            data = digits.share(builder, split, context)
            if not training:
                return data.batch(128)
            data = data.shuffle(2048, seed=context.input_pipeline_id).repeat()
            return data.batch(options.batch).prefetch(2)

        return strategy.distribute_datasets_from_function(make)

    methods = {
        "synchronous SGD": {"sync_period": 1, "block_momentum": 0.0},
        "K-AVG": {"sync_period": options.sync_period, "block_momentum": 0.0},
        "M-AVG": {
            "sync_period": options.sync_period,
            "block_momentum": options.block_momentum,
        },
    }
    results = []
    for name, settings in methods.items():
        keras.utils.set_random_seed(1)  # the same start and the same samples for each
        with strategy.scope():
            model = cnn(builder.info.features)
            optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(options.learning_rate), **settings)
            model.compile(
                optimizer,
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                # One that divides the epoch: Keras makes executions whole.
                steps_per_execution=math.gcd(steps, settings["sync_period"]),
            )
        curve = Curve(name, dataset("train", training=False), steps * options.batch * replicas)
        model.fit(
            dataset("train", training=True),
            steps_per_epoch=steps,
            epochs=options.epochs,
            validation_data=dataset("test", training=False),
            shuffle=False,  # the dataset does
            verbose=0,
            callbacks=[tfbm.BlockTraining(), curve],
        )
        size = sum(w.numpy().nbytes for w in model.trainable_variables)
        results.append(
            {
                "name": name,
                **curve.result(options.target_loss),
                "boundaries": optimizer.blocks,
                # A ring all-reduce sends 2 (P - 1) / P of the weights' bytes from each worker.
                "bytes": optimizer.blocks * size * 2 * (replicas - 1) / replicas,
            }
        )
    if strategy.extended.should_checkpoint:  # the chief's, or the first worker's
        results_file(options).write_text(json.dumps(results))


def cnn(features):
    return keras.Sequential(
        [
            keras.Input(features["image"].shape),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(features["label"].num_classes),
        ]
    )


class Curve(keras.callbacks.Callback):
    """After every epoch: loss on the whole training split, accuracy on the test split."""

    def __init__(self, name, train_data, samples_per_epoch):
        super().__init__()
        self.name, self.train_data, self.per_epoch = name, train_data, samples_per_epoch
        self.samples, self.loss, self.accuracy, self.seconds = [], [], [], 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.begin = time.perf_counter()

    def on_test_begin(self, logs=None):  # training has ended, validation begins
        if self.begin is not None:
            self.seconds += time.perf_counter() - self.begin
            self.begin = None

    def on_epoch_end(self, epoch, logs=None):
        loss, _ = self.model.evaluate(self.train_data, verbose=0)
        self.samples.append((epoch + 1) * self.per_epoch)
        self.loss.append(loss)
        self.accuracy.append(logs["val_accuracy"])
        if self.model.distribute_strategy.extended.should_checkpoint:
            print(
                f"{self.name:16}  epoch {epoch + 1:3} of {self.params['epochs']}  "
                f"training loss {loss:.4f}  test accuracy {logs['val_accuracy']:.4f}",
                flush=True,
            )

    def result(self, target):
        reached = (s for s, loss in zip(self.samples, self.loss, strict=True) if loss <= target)
        return {
            "samples": self.samples,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "seconds": self.seconds,
            "samples to target": next(reached, None),
        }


def report(results, options):
    header = (
        "method",
        "test accuracy",
        "final training loss",
        f"samples to loss {options.target_loss}",
        "seconds",
        "boundaries",
        "MB sent per worker",
    )
    rows = [
        (
            r["name"],
            f"{r['accuracy'][-1]:.4f}",
            f"{r['loss'][-1]:.4f}",
            f"{r['samples to target']:,}" if r["samples to target"] else "not reached",
            f"{r['seconds']:.1f}",
            f"{r['boundaries']:,}",
            f"{r['bytes'] / 1e6:.1f}",
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print()
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    print(
        f"\n{options.workers} workers, K={options.sync_period}, beta={options.block_momentum}, "
        f"learning rate {options.learning_rate}. Seconds are those of training alone, the first "
        "epoch's compilation included."
    )
    picture = results_file(options).with_suffix(".png")
    plot(results, options, picture)
    print(f"Curves: {picture}")


def plot(results, options, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for r, marker in zip(results, "so^", strict=True):
        sent = [r["bytes"] / 1e6 * s / r["samples"][-1] for s in r["samples"]]
        for axis, x in zip(axes, (r["samples"], sent), strict=True):
            axis.plot(x, r["loss"], marker=marker, markersize=3.5, label=r["name"])
    for axis, label in zip(axes, ("samples", "MB sent per worker"), strict=True):
        axis.axhline(options.target_loss, color="grey", linewidth=0.8, linestyle="--")
        axis.set(xlabel=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[1].set_xscale("log")
    axes[0].set_ylabel("training loss")
    axes[0].legend()
    figure.suptitle(
        f"{options.dataset}: {options.workers} workers, K={options.sync_period}, "
        f"beta={options.block_momentum}"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
