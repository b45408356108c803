"""What the workers of speed.py run: one function for each part of the benchmark."""

import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

from cluster import bytes_sent
from speed import BATCHES, FORMS, HERE, NO_SYNC, PLAIN, TARGET, WIDTHS
from speed_growth import work_growth

NO_STRATEGY = "blocks, no strategy"
OUTSIDE = (PLAIN, NO_STRATEGY)  # trained where there is no strategy


def chosen(options):
    """Those of the forms that the command line asks for: name, overlap, compression."""
    return [(name, *FORMS[name]) for name in options.forms]


def work(options):
    """One part of the benchmark; worker 0 prints a JSON line for each contender."""
    import tensorflow as tf

    if options.device == "gpu" and not tf.config.list_physical_devices("GPU"):
        sys.exit("TensorFlow finds no GPU")
    part = work_growth if options.part == "growth" else globals()[f"work_{options.part}"]
    for row in part(options):
        print(json.dumps({"family": "ours", **row}), flush=True)


def network(name, widths=WIDTHS):
    """A model, built, and one batch for it."""
    import keras
    import numpy as np

    rng, size = np.random.default_rng(0), BATCHES[name]
    if name == "dot":  # nothing to compute: what is left is Python and TensorFlow's own
        x, y = np.zeros([1, 1], "float32"), np.zeros([1], "int32")
        return keras.Sequential([keras.Input([1]), keras.layers.Dense(1)]), x, y
    if name == "resnet50":
        x = rng.normal(size=[size, 32, 32, 3]).astype("float32")
        model = keras.applications.ResNet50(
            weights=None, input_shape=x.shape[1:], classes=10, classifier_activation=None
        )
        return model, x, rng.integers(10, size=size)
    if name == "mlp":
        layers = [keras.layers.Dense(n, activation="relu") for n in widths[1:-1]]
        layers = [keras.Input([widths[0]]), *layers, keras.layers.Dense(widths[-1])]
        x, y = rng.normal(size=[size, widths[0]]).astype("float32"), rng.integers(10, size=size)
        return keras.Sequential(layers), x, y
    sys.path.insert(0, str(HERE.parent / "examples"))
    if name == "resnet":  # of a quarter of the usual width; 62 variables, 40 statistics
        from cifar10_resnet import resnet18

        x = rng.normal(size=[size, 32, 32, 3]).astype("float32")
        return resnet18(16, pre_activation=False), x, rng.integers(10, size=size)
    from text_transformer import transformer

    x = rng.integers(256, size=[2, size, 64])
    return transformer(64, layers=2, width=256), x[0], x[1]


def compile_model(strategy, name, form, k=NO_SYNC, rate=0.001, widths=WIDTHS):
    """A model of one contender, and a batch for it.

    Args:
        strategy: ours; plain Keras knows nothing of it.
        name: of the network.
        form: of blocks, "synchronous fit", PLAIN, or NO_STRATEGY for blocks without one.
        k: how long blocks are.
        rate: of learning.
        widths: of the MLP.
    """
    import keras
    import tensorflow as tf

    import tf_blockmomentum as tfbm

    plain, sync = form == PLAIN, form == "synchronous fit"
    overlap, compression = FORMS.get(form, (False, None))
    strategy.compression = compression
    with (tf.distribute.get_strategy() if form in OUTSIDE else strategy).scope():
        model, x, y = network(name, widths)
        optimizer = keras.optimizers.SGD(rate)
        if not plain and not sync:
            optimizer = tfbm.BlockMomentum(
                optimizer, sync_period=k, block_momentum=0.5, overlap=overlap
            )
        model.compile(
            optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=1 if sync else max(k, 8),
        )  # fmt: skip
        if not plain:
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


def batches(strategy, form, x, y):
    """One batch again and again, as a contender takes it."""
    import tensorflow as tf

    def dataset(_=None):
        return tf.data.Dataset.from_tensors((x, y)).repeat()

    return dataset() if form in OUTSIDE else strategy.distribute_datasets_from_function(dataset)


def work_blocks(options):
    """Step seconds of every form and K, `rounds` times in turn, and of a bare all-reduce."""
    import keras
    import tensorflow as tf

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    keras.utils.set_random_seed(0)
    # K is not compiled, so that all K share a model.
    models, contenders = {}, {}
    for form in (PLAIN, "synchronous fit", "no communication", *options.forms):
        model, x, y = compile_model(strategy, options.model, form)
        blocks = [tfbm.BlockTraining(options.jit)] if hasattr(model.optimizer, "blocks") else []
        models[form] = model, blocks, strategy.compression, clock(), batches(strategy, form, x, y)
    # Short blocks take some at each execution: the Python of `fit` weighs alike on all.
    contenders["synchronous fit", 1] = "synchronous fit", 1, 1
    for k in options.periods:
        each = max(k, 8)
        contenders[PLAIN, each] = PLAIN, None, each
        contenders["no communication", each] = "no communication", NO_SYNC, each
        for form, overlap, _ in chosen(options):
            if k > 1 or not overlap:
                contenders[form, k] = form, k, each
    results: dict = {key: [] for key in contenders}
    bare, one, wire = [], [], {}
    for n in range(options.rounds + 1):  # the first one compiles
        for key, (form, k, each) in contenders.items():
            model, blocks, strategy.compression, timed, data = models[form]
            if blocks:
                model.optimizer.sync_period = k
            model.steps_per_execution = each
            if form == PLAIN:
                model.train_function = None  # which it would go on with, whatever that says
            executions = 24 if each == 1 else 4 if options.slow else max(5, 64 // each)
            if n == 0:
                executions = 2
            strategy.mean_over_workers(tf.constant(0.0))  # all begin at once
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
    yield {"method": "copy", "step_seconds": copy_seconds(size), "model_bytes": size}


def copy_seconds(size):
    """The median of a few copies of so many bytes in memory."""
    import numpy as np

    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


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
    """One worker: local steps without a boundary beside Keras's own `fit` on one device, and what
    a boundary takes where there is no link."""
    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    contenders = {}
    without = [(form, NO_SYNC) for form in (*OUTSIDE, "blocks, one worker")]
    for name in options.alone:
        cases = list(itertools.product((1, 8) if name == "resnet50" else (1, 8, 32), without))
        if name == "mlp":
            cases += [(8, (form, 8)) for form in options.forms]
        for each, (method, k) in cases:
            model, x, y = compile_model(strategy, name, method, k)
            model.steps_per_execution = each
            timed = clock()
            training = [] if method == PLAIN else [tfbm.BlockTraining(options.jit)]
            data = batches(strategy, method, x, y)
            callbacks = [*training, timed]
            contenders[name, method, each, k] = model, data, callbacks, timed, strategy.compression
    results: dict = {key: [] for key in contenders}
    for n in range(options.rounds + 1):
        for (name, method, each, k), contender in contenders.items():
            model, data, callbacks, timed, strategy.compression = contender
            steps = {"dot": 512, "mlp": 128}.get(name, 48)
            model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=callbacks)
            if n:
                spans = [b - a for a, b in itertools.pairwise(timed.ends[:-1])]
                results[name, method, each, k].append(statistics.median(spans) / each)
    for (name, method, each, k), seconds in results.items():
        yield {"model": name, "method": method, "steps": each, "k": 0 if k == NO_SYNC else k,
               "step_seconds": statistics.median(seconds)}  # fmt: skip


def work_memory(options):
    """The most memory that one contender's process ever had; a wider MLP."""
    import keras

    import tf_blockmomentum as tfbm

    widths = (WIDTHS[0], *(options.scale * n for n in WIDTHS[1:-1]), WIDTHS[-1])
    keras.utils.set_random_seed(0)
    form, k, name = options.method, 8, "mlp"
    strategy = tfbm.MultiWorkerBlockStrategy()
    model, x, y = compile_model(strategy, name, form, k, widths=widths)
    model.steps_per_execution = 8
    blocks = [tfbm.BlockTraining(options.jit)] if form != PLAIN else []
    data = batches(strategy, form, x, y)
    model.fit(data, steps_per_epoch=24, verbose=0, callbacks=blocks)
    status = Path("/proc/self/status").read_text()
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    if not strategy.cluster_resolver.task_id:
        size = sum(w.nbytes for w in model.get_weights())
        yield {"method": form, "k": k, "memory": 1024 * int(peak.split()[1]),
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
    pairs = itertools.product(options.periods, options.forms)
    for k, method in ((1, "synchronous fit"), *pairs):
        if k == 1 and FORMS.get(method, (False, None))[0]:
            continue
        keras.utils.set_random_seed(0)
        model, _, _ = compile_model(strategy, "mlp", method, k, rate=0.05)
        sync = method == "synchronous fit"
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
