"""The paper's claims, measured: M-AVG against what else one would use, with error bars.

    make evidence          # everything, about an hour on 2 cores; writes docs/evidence.md
    make evidence-quick    # every study in small, two minutes; writes runs/evidence-quick/

Every run is recorded in `evidence_runs.csv` beside the tables, and `--report` makes the tables and
plots again from there. P replicas are P logical CPU devices of one process: what is measured is
how training goes over samples, not how long it takes (benchmarks/speed.py does that).
"""

import argparse
import concurrent.futures
import csv
import itertools
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

BATCH = 16  # examples per replica and step
EVALUATE = 32  # steps between evaluations, and the longest block: all K divide it
PERIODS, MOMENTA = (4, 8, 16, 32), (0.0, 0.3, 0.5, 0.7, 0.9)
LARGE = (0.5, 0.7, 0.8, 0.9, 0.95)  # beta, where divergence is looked for
RATES = {"mlp": 0.2, "cnn": 0.1, "resnet": 0.1}
SAMPLES = {"mlp": 40960, "cnn": 20480, "resnet": 24576}  # multiples of 32 * 16 * 4
FIELDS = (
    "study", "task", "method", "replicas", "sync_period", "block_momentum", "rate", "inner",
    "inner_state", "shards", "overlap", "compression", "seed", "boundaries", "samples",
    "loss", "accuracy",
)  # fmt: skip
# One row a run; the last three are curves, a number for each evaluation.


# -- what is run ------------------------------------------------------------------------------


def settings(quick):
    """All runs: dicts of FIELDS' first twelve, and `seeds`. What shares a process is together."""
    seeds = range(2 if quick else 5)
    few = range(2 if quick else 3)
    base = {"replicas": 4, "block_momentum": 0.0, "inner": "sgd", "inner_state": "keep"}
    base |= {"shards": "alike", "overlap": "no", "compression": "no"}
    for task in ("mlp",) if quick else ("mlp", "cnn", "resnet"):
        periods, momenta = PERIODS, MOMENTA
        factors = {"mlp": (1, 2, 4), "cnn": (1, 2), "resnet": (1,)}[task]
        if task == "resnet":  # a step costs four times the others'
            periods, momenta = (8,), (0.0, 0.5, 0.7, 0.9)
        if quick:
            periods, momenta, factors = (8, 32), (0.0, 0.7), (1,)
        rate = RATES[task]
        common = {**base, "study": "acceleration", "task": task, "rate": rate, "seeds": seeds}
        for beta, k in itertools.product(momenta, periods):
            method = "M-AVG" if beta else "K-AVG"
            yield {**common, "method": method, "block_momentum": beta, "sync_period": k}
        for k in periods:
            yield {**common, "sync_period": k, "method": "EASGD"}
        for factor in factors:
            at = {**common, "rate": rate * factor}
            yield {**at, "sync_period": 1, "method": "synchronous SGD"}
            for k in periods[:2] if factor > 1 else ():
                yield {**at, "sync_period": k, "method": "K-AVG"}
            at |= {"inner": "momentum", "rate": rate * factor / 4}
            yield {**at, "sync_period": 1, "method": "synchronous momentum SGD"}
            at |= {"inner": "nesterov", "sync_period": periods[0]}
            yield {**at, "method": "EAMSGD"}

    common = {**base, "study": "scaling", "task": "mlp", "rate": RATES["mlp"], "seeds": few}
    for replicas in (2, 8) if quick else (1, 2, 4, 8, 16):
        momenta = (0.0, 0.7) if quick else (0.0, 0.5, 0.7, 0.9, 0.95)
        for beta, k in itertools.product(momenta, (8,) if quick else (8, 32)):
            method = "M-AVG" if beta else "K-AVG"
            own = {"replicas": replicas, "block_momentum": beta, "sync_period": k}
            yield {**common, **own, "method": method}

    common = {**base, "study": "inner state", "task": "mlp", "seeds": few}
    for inner, rate in {"momentum": 0.05, "nesterov": 0.05, "adam": 0.003}.items():
        for state in ("keep", "reset", "average"):
            for beta in (0.5,) if quick else (0.0, 0.5, 0.9):
                own = {"inner": inner, "rate": rate, "inner_state": state, "sync_period": 8}
                yield {**common, **own, "method": "M-AVG", "block_momentum": beta}

    common = {**base, "study": "divergence", "task": "mlp", "seeds": few}
    for rate in (0.2, 0.8) if quick else (0.1, 0.2, 0.4, 0.8):
        for beta, k in itertools.product((0.7, 0.95) if quick else (0.0, *LARGE), (8, 32)):
            method = "M-AVG" if beta else "K-AVG"
            own = {"rate": rate, "block_momentum": beta, "sync_period": k, "method": method}
            yield {**common, **own}

    common = {**base, "study": "shards", "task": "mlp", "rate": RATES["mlp"], "seeds": few}
    for beta, k in itertools.product((0.0, 0.5, 0.7), (8,) if quick else (1, 4, 8, 32)):
        method = "M-AVG" if beta else "K-AVG"
        own = {"shards": "by class", "block_momentum": beta, "sync_period": k, "method": method}
        yield {**common, **own}

    for study, value in (("overlap", "yes"), ("compression", "float16")):
        common = {**base, "study": study, study: value, "seeds": seeds}
        for task in ("mlp",) if quick else ("mlp", "cnn"):
            betas = (0.0, 0.7) if quick else (0.0, 0.5, 0.7, 0.9)
            for beta, k in itertools.product(betas, (8, 32)):
                own = {"task": task, "rate": RATES[task], "block_momentum": beta, "sync_period": k}
                yield {**common, **own, "method": "M-AVG" if beta else "K-AVG"}


def key(setting):
    """What has to be compiled anew: K and the learning rate can be set."""
    names = ("task", "replicas", "block_momentum", "inner", "inner_state", "overlap",
             "compression")  # fmt: skip
    return (*(setting[n] for n in names), setting["method"].startswith("EA"))


# -- one process ------------------------------------------------------------------------------


def run_all(group, quick):
    """Runs settings of one number of replicas; returns rows of FIELDS."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    replicas = group[0]["replicas"]
    (cpu,) = tf.config.list_physical_devices("CPU")
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, devices)
    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiDeviceBlockStrategy([f"CPU:{i}" for i in range(replicas)])
    rows, trainers = [], {}
    for setting in sorted(group, key=key):
        if key(setting) not in trainers:
            trainers = {key(setting): Trainer(strategy, setting)}
        for seed in setting["seeds"]:
            rows.append(trainers[key(setting)].run(setting, seed, quick))
    return rows


class Trainer:
    """A compiled model, loop and evaluation, for many seeds."""

    def __init__(self, strategy, setting):
        import keras
        import tensorflow as tf

        import tf_blockmomentum as tfbm

        self.strategy, self.task = strategy, setting["task"]
        self.train, self.test = data(self.task)
        self.alone = network(self.task)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        compression = setting["compression"]
        strategy.compression = None if compression == "no" else compression
        with strategy.scope():
            model = network(self.task)
            inner = inner_optimizer(setting["inner"])
            if setting["method"].startswith("EA"):
                from elastic import ElasticAveraging

                optimizer = ElasticAveraging(inner, sync_period=1)
            else:
                optimizer = tfbm.BlockMomentum(
                    inner,
                    sync_period=1,
                    block_momentum=setting["block_momentum"],
                    inner_state=setting["inner_state"],
                    overlap=1.0 if setting["overlap"] == "yes" else False,
                )
            optimizer.build(model.trainable_variables)
        x, y = (tf.constant(a) for a in self.train)

        def step(indices):
            with tf.GradientTape() as tape:
                logits = model(tf.gather(x, indices), training=True)
                value = loss(tf.gather(y, indices), logits)
            variables = model.trainable_variables
            gradients = tape.gradient(value, [v.value for v in variables])
            optimizer.apply(gradients, variables)
            return value

        @tf.function(jit_compile=False)
        def evaluate(x, y):
            logits = self.alone(x, training=False)
            hits = tf.equal(tf.argmax(logits, -1, output_type=y.dtype), y)
            return loss(y, logits), tf.reduce_mean(tf.cast(hits, tf.float32))

        self.model, self.optimizer, self.evaluate = model, optimizer, evaluate
        self.loop = tfbm.BlockLoop(step, optimizer, strategy, model.non_trainable_variables)
        self.start = [v.numpy() for v in optimizer.variables]

    def run(self, setting, seed, quick):
        import keras
        import tensorflow as tf

        optimizer, replicas = self.optimizer, self.strategy.num_replicas_in_sync
        for variable, value in zip(optimizer.variables, self.start, strict=True):
            variable.assign(value)
        optimizer.learning_rate = setting["rate"]
        optimizer.sync_period = setting["sync_period"]
        keras.utils.set_random_seed(seed)
        self.model.set_weights(network(self.task).get_weights())
        optimizer.restart_block()

        per_step = BATCH * replicas
        steps = SAMPLES[self.task] // (8 if quick else 1) // per_step
        rng = np.random.default_rng(seed)
        labels = self.train[1]
        if setting["shards"] == "alike":  # a batch is shared out in order
            order = shuffled(np.arange(len(labels)), steps * per_step, rng)
        else:
            parts = np.array_split(np.argsort(labels, kind="stable"), replicas)
            parts = [shuffled(part, steps * BATCH, rng) for part in parts]
            order = np.stack([part.reshape(steps, BATCH) for part in parts], axis=1).ravel()
        indices = tf.data.Dataset.from_tensor_slices(order).batch(per_step)
        iterator = iter(self.strategy.experimental_distribute_dataset(indices))
        samples, losses, accuracies = [], [], []
        every = max(EVALUATE * 4 // replicas, setting["sync_period"])
        if setting["study"] in ("overlap", "compression"):
            every = steps  # an evaluation lands what is in flight
        for done in range(0, steps, every):
            samples.append(min(done + every, steps) * per_step)
            try:
                self.loop.run(iterator, min(every, steps - done))
                self.loop.flush()
            except FloatingPointError:  # diverged
                losses.append("inf")
                accuracies.append("0")
                break
            self.alone.set_weights(self.centre())
            loss, _ = self.evaluate(*self.train)
            _, accuracy = self.evaluate(*self.test)
            losses.append(f"{float(loss):.5g}")
            accuracies.append(f"{float(accuracy):.4f}")
        return {
            **{name: setting[name] for name in FIELDS[:12]},
            "seed": seed,
            "boundaries": optimizer.blocks,
            "samples": " ".join(map(str, samples)),
            "loss": " ".join(losses),
            "accuracy": " ".join(accuracies),
        }

    def centre(self):
        """The weights that a method ends with: the anchor, or elastic averaging's centre."""
        shared = dict(
            zip(map(id, self.model.trainable_variables), self.optimizer.anchors, strict=True)
        )
        return [shared.get(id(v), v).numpy() for v in self.model.variables]


def shuffled(indices, count, rng):
    """The first `count` of the indices in a new random order each time over."""
    times = -(-count // len(indices))
    return np.concatenate([rng.permutation(indices) for _ in range(times)])[:count]


def inner_optimizer(name):
    import keras

    return {
        "sgd": lambda: keras.optimizers.SGD(),
        "momentum": lambda: keras.optimizers.SGD(momentum=0.9),
        "nesterov": lambda: keras.optimizers.SGD(momentum=0.9, nesterov=True),
        "adam": lambda: keras.optimizers.Adam(),
    }[name]()


def network(task):
    """The task's model, built."""
    import keras
    from keras import layers

    if task == "mlp":
        return keras.Sequential(
            [keras.Input([64]), layers.Dense(64, activation="relu"), layers.Dense(10)]
        )
    if task == "cnn":
        return keras.Sequential(
            [
                keras.Input([8, 8, 1]),
                layers.Conv2D(16, 3, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(32, 3, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(64, activation="relu"),
                layers.Dense(10),
            ]
        )
    image = keras.Input([32, 32, 3])
    x = layers.Conv2D(16, 5, strides=4, padding="same", use_bias=False)(image)
    for width, stride in ((16, 1), (32, 2)):
        x = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(x))
        y = layers.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(x)
        y = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(y))
        y = layers.Conv2D(width, 3, padding="same", use_bias=False)(y)
        if stride > 1:
            x = layers.Conv2D(width, 1, strides=stride, use_bias=False)(x)
        x = layers.Add()([x, y])
    x = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(10)(x))


def data(task):
    """((x, y) for training, (x, y) for testing)."""
    if task == "resnet":
        return teacher_images()
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images / 16).astype("float32")
    x = x.reshape(-1, 64) if task == "mlp" else x[..., None]
    y, test = digits.target.astype("int32"), np.arange(len(x)) % 5 == 0
    return (x[~test], y[~test]), (x[test], y[test])


def teacher_images(train=3072, test=1024):
    """Images of CIFAR's shape that a random network has put into ten classes.

    An image is coarse noise in colours of its own. The teacher: 24 random 5 x 5 filters with a
    ReLU, averaged over each quarter of the image, and a random linear map, each class moved so
    that all ten are about equally frequent.
    """
    rng = np.random.default_rng(0)
    count = train + test
    colours = rng.normal(size=[count, 3, 3])
    coarse = np.einsum("nhwc,ncd->nhwd", rng.normal(size=[count, 8, 8, 3]), colours)
    x = np.kron(coarse, np.ones([1, 4, 4, 1])) + 0.2 * rng.normal(size=[count, 32, 32, 3])
    x = x.astype("float32") / 2
    windows = np.lib.stride_tricks.sliding_window_view(x[:, ::2, ::2], (5, 5), axis=(1, 2))
    filters = rng.normal(size=[3, 5, 5, 24]).astype("float32") / np.sqrt(75)
    h = np.maximum(np.tensordot(windows, filters, axes=3), 0)
    quarters = [h[:, i : i + 6, j : j + 6].mean((1, 2)) for i in (0, 6) for j in (0, 6)]
    features = np.concatenate(quarters, axis=1)
    features = (features - features.mean(0)) / features.std(0)
    scores = features @ rng.normal(size=[features.shape[1], 10])
    for _ in range(300):
        shares = np.bincount(scores.argmax(1), minlength=10) / count
        scores -= 2 * (shares - 0.1) * scores.std()
    y = scores.argmax(1).astype("int32")
    return (x[:train], y[:train]), (x[train:], y[train:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every study in small")
    parser.add_argument("--report", action="store_true", help="from recorded runs only")
    parser.add_argument("--study", help="only this one; the others' records stay")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    folder = Path("runs/evidence-quick") if options.quick else Path("docs")
    records = folder / "evidence_runs.csv"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.report:
        record(records, options)
    import evidence_report

    evidence_report.write(records, folder, options.quick)
    print(f"Tables: {folder / 'evidence.md'}")


def record(path, options):
    """Runs everything, each part in a process of its own, and writes down the runs."""
    groups: dict = {}
    wanted = [s for s in settings(options.quick) if options.study in (None, s["study"])]
    for setting in wanted:
        # A process has one number of replicas; the longest studies are shared out.
        names = ("task", "replicas", "study", "method", "block_momentum")
        part = tuple(setting[name] for name in names[: 2 if options.quick else 5])
        groups.setdefault(part, []).append(setting)
    order = sorted(groups, key=lambda part: ("resnet", "cnn", "mlp").index(part[0]))
    started, rows = time.perf_counter(), []
    with concurrent.futures.ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        futures = [pool.submit(run_all, groups[part], options.quick) for part in order]
        for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
            rows += future.result()
            minutes = (time.perf_counter() - started) / 60
            print(f"{n} of {len(futures)} parts, {minutes:.1f} minutes", flush=True)
    if options.study:
        with path.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if row["study"] != options.study]
            rows += [{"compression": "no", **row} for row in others]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: [str(row[name]) for name in FIELDS]))


if __name__ == "__main__":
    sys.exit(main())
