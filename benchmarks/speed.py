"""How fast training in blocks is, over real links, beside what one would use instead.

    make bench          # an MLP at every K on four links, two more models; hours on 2 cores
    make bench-quick    # the MLP with K of 8 and 32 on loopback and 1 Gbit/s, some minutes

Each worker has a processor core of its own (with DEVICE=gpu, a GPU). A link is made of network
namespaces with `tc tbf` between them (needs root; skipped with the reason otherwise). All
contenders of ours take turns in the same processes; the peers in `benchmarks/peers` run right
after, on the same link and cores. Writes `speed.csv`, `speed.md` and plots into `runs/bench`;
`--report` makes the tables and plots again from the first.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import cluster
from cluster import bytes_sent

HERE = Path(__file__).parent
RUNS = Path("runs/bench")
BATCHES = {"mlp": 32, "resnet": 32, "transformer": 8}  # examples of a worker's step
WIDTHS = (784, 1536, 1536, 768, 10)  # 19 MB of float32
NO_SYNC = 10**9  # a block that never ends
FIELDS = ("model", "workers", "link", "family", "method", "k", "steps", "step_seconds",
          "wire_bytes", "model_bytes", "memory", "target_steps")  # fmt: skip
# Forms of blocks: name, overlap (with all of the next block), compression.
FORMS = (
    ("blocks", False, None),
    ("blocks, overlap", 1.0, None),
    ("blocks, float16", False, "float16"),
    ("blocks, overlap, float16", 1.0, "float16"),
    ("blocks, int8", False, "int8"),
    ("blocks, overlap, int8", 1.0, "int8"),
    ("blocks, int4", False, "int4"),
    ("blocks, overlap, int4", 1.0, "int4"),
)
TARGET = 0.5  # training loss of the MLP on its task


def chosen(options):
    """Those of the forms that the command line asks for."""
    return [form for form in FORMS if form[2] is None or form[2] in options.compression]


# -- one worker of ours ------------------------------------------------------------------------


def work(options):
    """One part of the benchmark; worker 0 prints a JSON line for each contender."""
    import tensorflow as tf

    if options.device == "gpu" and not tf.config.list_physical_devices("GPU"):
        sys.exit("TensorFlow finds no GPU")
    for row in globals()[f"work_{options.part}"](options):
        print(json.dumps({"family": "ours", **row}), flush=True)


def network(name):
    """A model, built, and one batch for it."""
    import keras
    import numpy as np

    rng, size = np.random.default_rng(0), BATCHES[name]
    if name == "mlp":
        layers = [keras.layers.Dense(n, activation="relu") for n in WIDTHS[1:-1]]
        layers = [keras.Input([WIDTHS[0]]), *layers, keras.layers.Dense(WIDTHS[-1])]
        x, y = rng.normal(size=[size, WIDTHS[0]]).astype("float32"), rng.integers(10, size=size)
        return keras.Sequential(layers), x, y
    sys.path.insert(0, str(HERE.parent / "examples"))
    if name == "resnet":  # of a quarter of the usual width; 62 variables, 40 statistics
        from cifar10_resnet import resnet18

        x = rng.normal(size=[size, 32, 32, 3]).astype("float32")
        return resnet18(16, pre_activation=False), x, rng.integers(10, size=size)
    from text_transformer import transformer

    x = rng.integers(256, size=[2, size, 64])
    return transformer(64, layers=2, width=256), x[0], x[1]


def compile_model(strategy, name, k, overlap=False, compression=None, sync=False, rate=0.001):
    """A model of one contender, and a batch for it."""
    import keras

    import tf_blockmomentum as tfbm

    strategy.compression = compression
    with strategy.scope():
        model, x, y = network(name)
        inner = keras.optimizers.SGD(rate)
        optimizer = inner if sync else tfbm.BlockMomentum(
            inner, sync_period=k, block_momentum=0.5, overlap=overlap
        )  # fmt: skip
        model.compile(
            optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=1 if sync else max(k, 8),
        )  # fmt: skip
        if not sync:
            optimizer.build(model.trainable_variables)
    return model, x, y


def clock():
    """A callback that notes when each execution ended, and the loss until then."""
    import keras

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.ends, self.losses = [], []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())
            self.losses.append(logs["loss"])

    return Clock()


def repeated(strategy, x, y):
    import tensorflow as tf

    return strategy.distribute_datasets_from_function(
        lambda _: tf.data.Dataset.from_tensors((x, y)).repeat()
    )


def work_blocks(options):
    """Step seconds of every method and K, `rounds` times in turn, and of a bare all-reduce."""
    import keras
    import tensorflow as tf

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    keras.utils.set_random_seed(0)
    models, contenders = {}, {}
    for form, settings in (
        ("synchronous fit", {"sync": True}),
        *((name, {"overlap": o, "compression": c}) for name, o, c in chosen(options)),
    ):
        model, x, y = compile_model(strategy, options.model, 1, **settings)
        blocks = [] if settings.get("sync") else [tfbm.BlockTraining(options.jit)]
        models[form] = model, blocks, settings.get("compression"), clock()
    # K is not compiled, so that all K share a model. Short blocks take some at each execution:
    # the Python of `fit` weighs alike on all.
    contenders["synchronous fit", 1] = "synchronous fit", 1, 1
    for k in options.periods:
        contenders["no communication", max(k, 8)] = "blocks", NO_SYNC, max(k, 8)
        for form, overlap, _ in chosen(options):
            if k > 1 or not overlap:
                contenders[form, k] = form, k, max(k, 8)
    data = repeated(strategy, x, y)
    results: dict = {key: [] for key in contenders}
    bare, one, wire = [], [], {}
    for n in range(options.rounds + 1):  # the first one compiles
        for key, (form, k, each) in contenders.items():
            model, blocks, strategy.compression, timed = models[form]
            if blocks:
                model.optimizer.sync_period = k
            model.steps_per_execution = each
            executions = 24 if each == 1 else 4 if options.slow else max(5, 64 // each)
            if n == 0:
                executions = 2
            sent, before = bytes_sent(), blocks_of(model)
            model.fit(
                data, steps_per_epoch=executions * each, verbose=0, callbacks=[*blocks, timed]
            )
            if n:
                # The last block also lands what is in flight: the end of an epoch.
                spans = [b - a for a, b in itertools.pairwise(timed.ends[:-1])]
                seconds = tf.constant(statistics.median(spans) / each)
                results[key].append(float(strategy.mean_over_workers(seconds)))
                if blocks_of(model) > before:
                    wire[key] = (bytes_sent() - sent) / (blocks_of(model) - before)
        if n:
            bare.append(all_reduce_seconds(strategy, sum(w.size for w in model.get_weights())))
            one.append(all_reduce_seconds(strategy, 1))
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    size = sum(4 * math.prod(v.shape) for v in variables)
    if strategy.cluster_resolver.task_id:
        return
    for (method, k), seconds in results.items():
        row = {"method": method, "k": k, "step_seconds": statistics.median(seconds)}
        yield {**row, "wire_bytes": wire.get((method, k)), "model_bytes": size,
               "steps": contenders[method, k][2]}  # fmt: skip
    yield {"method": "all_reduce alone", "step_seconds": statistics.median(bare)}
    yield {"method": "all_reduce of one number", "step_seconds": statistics.median(one)}


def blocks_of(model):
    return getattr(model.optimizer, "blocks", 0)


def all_reduce_seconds(strategy, count):
    """The median of a few all-reduces of one tensor of so many numbers."""
    import tensorflow as tf

    flat = tf.zeros([count])

    def reduce():
        context = tf.distribute.get_replica_context()
        return tf.reduce_sum(context.all_reduce("SUM", tf.identity(flat)))

    reduce_all = tf.function(lambda: strategy.run(reduce), autograph=False)
    seconds = []
    for n in range(5):
        began = time.perf_counter()
        strategy.experimental_local_results(reduce_all())[0].numpy()
        if n:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def work_alone(options):
    """Local steps, without a boundary, beside Keras's own `fit` on one device."""
    import keras
    import tensorflow as tf

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    no_strategy = tf.distribute.get_strategy()
    for name in ("mlp", "dot"):
        contenders = {}
        for each, (method, where, blocks) in itertools.product(
            (1, 32),
            (
                ("Keras fit, no strategy", no_strategy, False),
                ("blocks, no strategy", no_strategy, True),
                ("blocks, one worker", strategy, True),
            ),
        ):
            with where.scope():
                if name == "mlp":
                    model, x, y = network(name)
                else:  # nothing to compute: what is left is Python and TensorFlow's own
                    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
                    x, y = tf.zeros([1, 1]), tf.zeros([1], "int32")
                inner = keras.optimizers.SGD(0.001)
                model.compile(
                    tfbm.BlockMomentum(inner, sync_period=NO_SYNC) if blocks else inner,
                    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    steps_per_execution=each,
                )
            timed = clock()
            training = [tfbm.BlockTraining(options.jit)] if blocks else []
            data = tf.data.Dataset.from_tensors((x, y)).repeat()
            if where is strategy:
                data = repeated(strategy, x, y)
            contenders[method, each] = model, data, [*training, timed], timed
        results: dict = {key: [] for key in contenders}
        for n in range(options.rounds + 1):
            for (method, each), (model, data, callbacks, timed) in contenders.items():
                steps = 32 * (4 if name == "mlp" else 16)
                model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=callbacks)
                if n:
                    span = timed.ends[-2] - timed.ends[0]  # the last has a boundary
                    results[method, each].append(span / (steps - 2 * each))
        for (method, each), seconds in results.items():
            yield {"model": name, "method": method, "steps": each,
                   "step_seconds": statistics.median(seconds)}  # fmt: skip


def work_memory(options):
    """The most memory that one contender's process ever had; a wider MLP."""
    global WIDTHS
    import keras

    import tf_blockmomentum as tfbm

    WIDTHS = (784, *(options.scale * n for n in WIDTHS[1:-1]), 10)
    forms = {name: (overlap, compression) for name, overlap, compression in FORMS}
    keras.utils.set_random_seed(0)
    if options.method in forms:
        overlap, compression = forms[options.method]
        strategy = tfbm.MultiWorkerBlockStrategy(compression=compression)
        model, x, y = compile_model(strategy, "mlp", 8, overlap, compression)
        data, blocks = repeated(strategy, x, y), [tfbm.BlockTraining(options.jit)]
    else:
        model, x, y = network("mlp")
        model.compile(
            keras.optimizers.SGD(0.001),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=8,
        )
        import tensorflow as tf

        data, blocks = tf.data.Dataset.from_tensors((x, y)).repeat(), []
    model.fit(data, steps_per_epoch=24, verbose=0, callbacks=blocks)
    status = Path("/proc/self/status").read_text()
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    if not blocks or not strategy.cluster_resolver.task_id:
        size = sum(w.nbytes for w in model.get_weights())
        yield {"method": options.method, "k": 8, "memory": 1024 * int(peak.split()[1]),
               "model_bytes": size}  # fmt: skip


def work_target(options):
    """How many steps each method takes to a training loss; the same on every link."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    rng = np.random.default_rng(0)
    x = rng.normal(size=[8192, WIDTHS[0]]).astype("float32")
    hidden = np.maximum(x @ rng.normal(size=[WIDTHS[0], 32]) / 28, 0)
    y = (hidden @ rng.normal(size=[32, 10])).argmax(1)  # a random network's classes
    size, index = BATCHES["mlp"], strategy.cluster_resolver.task_id
    data = strategy.distribute_datasets_from_function(
        lambda _: (
            tf.data.Dataset.from_tensor_slices((x, y))
            .shuffle(len(x), seed=index)
            .repeat()
            .batch(size)
        )
    )
    steps, window = 1536, 64
    for k, (method, overlap, compression) in (
        (1, ("synchronous fit", False, None)),
        *itertools.product(options.periods, chosen(options)),
    ):
        if k == 1 and overlap:
            continue
        sync = method == "synchronous fit"
        keras.utils.set_random_seed(0)
        model, _, _ = compile_model(strategy, "mlp", k, overlap, compression, sync, rate=0.05)
        timed, blocks = clock(), [] if sync else [tfbm.BlockTraining(options.jit)]
        model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[*blocks, timed])
        each = int(model.steps_per_execution)
        sums = np.array([0.0, *timed.losses]) * each * np.arange(len(timed.losses) + 1)
        wide = max(1, window // each)
        means = (sums[wide:] - sums[:-wide]) / (wide * each)
        below = np.flatnonzero(means <= TARGET)
        if not index:
            reached = int(below[0] + wide) * each if len(below) else None
            yield {"method": method, "k": k, "target_steps": reached}


# -- all of it ------------------------------------------------------------------------------------


def parts(options):
    """What to launch: link, workers, script, its arguments, and what its rows share."""

    def ours(part, link, workers, *arguments, **row):
        given = ["--part", part, "--device", options.device, "--rounds", str(options.rounds)]
        given += ["--jit"] * options.jit + ["--compression", *options.compression]
        row |= {"workers": workers, "link": link}
        return link, workers, Path(__file__).name, [*given, *map(str, arguments)], row

    if "alone" in options.only:
        yield ours("alone", "loopback", 1)
    if "memory" in options.only:
        # Of two sizes: what a process has besides copies of the weights is in both.
        methods = ("Keras fit, no strategy", *(name for name, *_ in chosen(options)))
        for method, scale in itertools.product(methods, (2, 4)):
            workers = 1 if method.startswith("Keras") else 2
            given = "--method", method, "--scale", scale
            yield ours("memory", "loopback", workers, *given, model=f"mlp, {scale} times as wide")
    if "blocks" in options.only:
        for model, workers, link in itertools.product(
            options.models, options.workers, options.links
        ):
            periods = options.periods
            if (model, workers) != ("mlp", 2) and not options.full:
                periods = [k for k in periods if k in (8, 32)] or periods
            slow = ["--slow"] * link.endswith("mbit")
            yield ours(
                "blocks",
                link,
                workers,
                "--model",
                model,
                *slow,
                "--periods",
                *periods,
                model=model,
            )
            if model == "mlp":
                row = {"workers": workers, "link": link, "model": model}
                few = [k for k in periods if k in (8, 32)] or periods
                given = [BATCHES[model], options.rounds, ",".join(map(str, few)), *WIDTHS]
                for script in sorted((HERE / "peers").glob("*.py")):
                    yield link, workers, f"peers/{script.name}", [*map(str, given)], row
    if "target" in options.only:
        yield ours("target", "loopback", 2, "--periods", *options.periods, model="mlp")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", default=["loopback", "10gbit", "1gbit", "100mbit"])
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--periods", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    kinds = ["alone", "memory", "blocks", "target"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="of the parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jit", action="store_true", help="compile local steps with XLA")
    coded = ["float16", "int8", "int4"]
    parser.add_argument(
        "--compression", nargs="*", choices=coded, default=coded[:1], help="besides none"
    )
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="the MLP, two K, two links")
    parser.add_argument("--full", action="store_true", help="all K for all models; many hours")
    parser.add_argument("--report", action="store_true", help="from recorded runs only")
    parser.add_argument("--add", action="store_true", help="to what has been recorded before")
    parser.add_argument("--peers-python", help="a Python that has what the peers require")
    for hidden in ("--part", "--model", "--method"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.links, options.periods = ["loopback", "1gbit"], [8, 32]
        options.models, options.workers, options.only = ["mlp"], [2], ["blocks"]
        options.rounds = 1
    if options.part:
        return work(options)
    if not options.report:
        record(options)
    import speed_report

    return speed_report.write(RUNS)


def record(options):
    """Runs everything, and writes down what came out after each part."""
    rows: list = []
    RUNS.mkdir(parents=True, exist_ok=True)
    if options.add:
        with (RUNS / "speed.csv").open(newline="") as file:
            rows += csv.DictReader(file)
    for link, workers, script, arguments, common in parts(options):
        rate = None if link == "loopback" else link
        what = f"{link}, {workers} workers, {script} {' '.join(arguments[:2])}"
        peer = script.startswith("peers")
        python = (peer and options.peers_python) or sys.executable
        began = time.perf_counter()
        try:
            with cluster.link(rate, workers) as places:
                found = cluster.launch(
                    places,
                    python,
                    HERE / script,
                    arguments,
                    300 if peer else 3600,
                    options.device == "gpu",
                )
        except OSError as error:
            print(f"skipped: {what}: {error}", flush=True)
            continue
        rows += [{**common, **row} for row in found]
        print(f"{what}: {time.perf_counter() - began:.0f} s", flush=True)
        with (RUNS / "speed.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
