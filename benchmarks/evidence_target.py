"""Seconds to a validation loss, over real links: synchronous Keras beside blocks.

Real workers, each a process with a core of its own (with more workers than cores they share), and
links between network namespaces as in speed.py. A run is timed from its first step to the end of
the first epoch whose validation loss is at the target; what validation takes, and compiling, which
an epoch before the run does, are left out.
"""

import json
import math
import sys
import time
from pathlib import Path

import cluster
import numpy as np
from evidence_records import SEARCH
from evidence_tasks import mnist1d, perceptron, shuffled

LINKS = ("loopback", "1gbit", "100mbit", "10mbit")
WORKERS = (2, 4)
WIDTHS = (40, 384, 192, 10)  # 0.4 MB of weights
BATCH, PERIOD, EPOCH = 32, 32, 64  # of a worker's step; K; steps from one validation to the next
MOST = 60  # epochs
TARGET = 0.8  # validation loss
SEEDS = range(3)
SYNCHRONOUS = "synchronous SGD"
BLOCKS = ("", "overlap=0.5", "overlap=0.5, int4")
RATES = (0.1, 0.2, 0.4, 0.8, 1.6)  # of the search, on loopback, with two seeds
LIMIT = 3000  # seconds of one job


def cell(workers, link, option):
    """A setting but for rate and seed; `option`: None for synchronous training."""
    blocks = option is not None
    return {
        "task": "target", "replicas": workers, "method": "M-AVG" if blocks else SYNCHRONOUS,
        "sync_period": PERIOD if blocks else 1, "block_momentum": 0.5 if blocks else 0.0,
        "option": ", ".join(part for part in (link, option) if part),
    }  # fmt: skip


def study(workers, records, quick=False):
    """The runs with so many workers that are not recorded yet: the search, then every link."""
    rates, links, seeds = (RATES, LINKS, SEEDS) if not quick else (RATES[1:3], LINKS[:1], (0,))
    search = [
        {**cell(workers, "loopback", option), "rate": rate, "seed": seed}
        for option in (None, "")
        for rate in rates
        for seed in (SEARCH, SEARCH + 1)
    ]
    run_missing(search, "loopback", records, quick)
    for link in links:
        wanted = [
            {**cell(workers, link, option), "rate": best_rate(workers, option, records), "seed": s}
            for option in (None, *BLOCKS)
            for s in seeds
        ]
        run_missing(wanted, link, records, quick)


def best_rate(workers, option, records):
    """The one with which the search took the fewest epochs to the target; blocks with an option
    have that of those without."""
    own = cell(workers, "loopback", None if option is None else "")
    found: dict = {}
    for row in records.rows:
        if int(row["seed"]) >= SEARCH and all(row[n] == str(v) for n, v in own.items()):
            found.setdefault(float(row["rate"]), []).append(epochs_of(row))
    return min(found, key=lambda rate: np.mean(found[rate]))


def epochs_of(row):
    """How many epochs a run took; one more than there are if it did not come to the target."""
    return len(row["curve"].split()) if row["seconds"] else MOST + 1


def seconds(workers, link, option, records):
    """{seed: seconds to the target, or 0 where it was not reached} of what is recorded with the
    rate that the search chose."""
    own = cell(workers, link, option)
    rows = [row for row in records.rows if all(row[n] == str(v) for n, v in own.items())]
    rows = [row for row in rows if int(row["seed"]) < SEARCH]
    return {int(row["seed"]): float(row["seconds"] or 0) for row in rows}


def run_missing(wanted, link, records, quick):
    """One job of real workers for those of the settings that are not recorded."""
    missing = [setting for setting in wanted if records.get(setting) is None]
    if not missing:
        return
    workers, rate = missing[0]["replicas"], None if link == "loopback" else link
    given = [json.dumps(missing), *(["--quick"] if quick else [])]
    with cluster.link(rate, workers) as places:
        rows = cluster.launch(places, sys.executable, Path(__file__).resolve(), given, LIMIT)
    records.add(rows)


# -- a worker -------------------------------------------------------------------------------------


def work(settings, quick):
    """Runs settings one after the other; those of one method and option share what is compiled.
    Worker 0 prints a JSON line for each."""
    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    x, y = mnist1d(3000 if quick else 44000)
    held_out = (x[-2000:], y[-2000:]) if not quick else (x[-500:], y[-500:])
    training = (x[: -len(held_out[0])], y[: -len(held_out[0])])
    ways: dict = {}
    for setting in settings:
        way = setting["method"], setting["option"]
        if way not in ways:
            ways[way] = Way(setting, strategy)
            ways[way].run({**setting, "seed": 10**6}, training, held_out, 1)  # compiles
        found = ways[way].run(setting, training, held_out, 2 if quick else MOST)
        if not strategy.cluster_resolver.task_id:
            print(json.dumps({**setting, **found}), flush=True)


class Way:
    """A model that is trained again and again with one method."""

    def __init__(self, setting, strategy):
        import keras

        import tf_blockmomentum as tfbm

        parts = setting["option"].split(", ")
        self.strategy, self.workers = strategy, setting["replicas"]
        self.compression = "int4" if "int4" in parts else None
        strategy.compression = self.compression
        self.blocks = setting["method"] != SYNCHRONOUS
        with strategy.scope():
            self.model = perceptron(WIDTHS)
            self.inner = inner = keras.optimizers.SGD(0.1)
            if self.blocks:
                overlap = 0.5 if "overlap=0.5" in parts else False
                inner = tfbm.BlockMomentum(inner, PERIOD, 0.5, overlap=overlap)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            each = setting[
                "sync_period"
            ]  # a synchronous fit communicates, and has no loop of steps
            self.model.compile(inner, loss, steps_per_execution=each)
            inner.build(self.model.trainable_variables)
        self.start = [v.numpy() for v in inner.variables]

    def run(self, setting, training, held_out, most):
        """Trains from the seed's weights; the result's fields."""
        import keras
        import tensorflow as tf

        import tf_blockmomentum as tfbm

        self.strategy.compression, optimizer = self.compression, self.model.optimizer
        keras.utils.set_random_seed(setting["seed"])
        for variable, value in zip(optimizer.variables, self.start, strict=True):
            variable.assign(value)
        self.model.set_weights(perceptron(WIDTHS).get_weights())
        if self.blocks:
            optimizer.restart_block()
        self.inner.learning_rate.assign(setting["rate"])
        count = most * EPOCH * BATCH * self.workers
        order = shuffled(
            np.arange(len(training[0])), count, np.random.default_rng(setting["seed"])
        )
        index = self.strategy.cluster_resolver.task_id or 0
        own = order.reshape(-1, self.workers, BATCH)[:, index]
        arrays = [tf.constant(a) for a in training]

        def dataset(_):
            indices = tf.data.Dataset.from_tensor_slices(own)
            return indices.map(lambda i: tuple(tf.gather(a, i) for a in arrays)).prefetch(8)

        timed = Timed()
        data = self.strategy.distribute_datasets_from_function(dataset)
        blocks = [tfbm.BlockTraining()] if self.blocks else []
        try:
            self.model.fit(
                data, epochs=most, steps_per_epoch=EPOCH, verbose=0, callbacks=[*blocks, timed],
                validation_data=held_out, validation_batch_size=500 * self.workers,
            )  # fmt: skip
        except FloatingPointError:  # diverged, on all workers alike
            timed.losses.append(math.inf)
        reached = timed.losses[-1] <= TARGET
        epochs = len(timed.losses)
        return {
            "seconds": f"{timed.seconds:.4g}" if reached else "",
            "validation_loss": f"{timed.losses[-1]:.5g}",
            "boundaries": epochs * EPOCH // setting["sync_period"],
            "samples": " ".join(
                str(n * EPOCH * BATCH * self.workers) for n in range(1, epochs + 1)
            ),
            "curve": " ".join(f"{loss:.5g}" for loss in timed.losses),
        }


def Timed():
    """A callback that adds up the seconds of training, and stops at the target."""
    import keras

    class Callback(keras.callbacks.Callback):
        seconds = 0.0

        def on_train_begin(self, logs=None):
            self.losses = []

        def on_epoch_begin(self, epoch, logs=None):
            self.began = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            self.ended = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds += self.ended - self.began
            self.losses.append(logs["val_loss"])
            if not math.isfinite(logs["val_loss"]) or logs["val_loss"] <= TARGET:
                self.model.stop_training = True

    return Callback()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), "--quick" in sys.argv)
