"""A run of a method on a task with the library: P replicas on logical devices of one process."""

import functools
import math
import os

import numpy as np
from evidence_records import SEARCH
from evidence_tasks import schedule, shuffled, task

# Steps between the evaluations of a run that is reported; a longer block is evaluated at its end.
EVERY = {"images": 64, "language": 96}
AT_ONCE = 256  # examples of an evaluation's call
STATISTICS = 32  # batches from which BatchNormalization's statistics are estimated anew

# The inner optimizer of methods that have another than the task's.
INNER = {"images": "sgd", "digits": "sgd", "language": "adamw"}
METHODS: dict[str, dict] = {
    "synchronous SGD": {},
    "synchronous momentum SGD": {},
    "K-AVG": {"beta": 0.0},
    "M-AVG": {},
    "K-AVG, momentum inside": {"inner": "momentum"},
    "M-AVG, momentum inside": {"inner": "momentum"},
    "SlowMo": {"outer": "SlowMo"},
    "DiLoCo": {"inner": "adamw", "nesterov": True, "zeta": 0.7},
    "EASGD": {"outer": "elastic"},
    "EAMSGD": {"outer": "elastic", "inner": "nesterov"},
    # One replica that takes the batches of all: no mean of weights is a mean of Adam's gradients.
    "synchronous AdamW": {"inner": "adamw", "alone": True},
    "Lookahead": {"inner": "momentum", "alone": True, "zeta": 0.5},
}


def start_devices(count):
    """Makes this process one with so many logical CPU devices, if it has not begun yet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    if not tf.config.get_logical_device_configuration(cpu):
        tf.config.threading.set_intra_op_parallelism_threads(1)
        devices = [tf.config.LogicalDeviceConfiguration()] * count
        tf.config.set_logical_device_configuration(cpu, devices)


@functools.cache
def strategy_of(replicas):
    """One of a size: those of one process would take each other's messages for theirs."""
    import tf_blockmomentum as tfbm

    return tfbm.MultiDeviceBlockStrategy([f"CPU:{i}" for i in range(replicas)])


class Trainers:
    """Runs settings; keeps what was compiled for the last."""

    def __init__(self, quick=False):
        self.quick = quick
        self._tasks: dict = {}
        self._last: tuple = (None, None)

    def run(self, setting):
        """The row of a setting that has been run."""
        name = setting["task"]
        if name not in self._tasks:
            self._tasks[name] = task(name, self.quick)
        key = tuple(setting[n] for n in ("task", "method", "replicas", "option"))
        if setting["method"] in ("K-AVG", "M-AVG", "synchronous SGD", "synchronous momentum SGD"):
            key = (name, "M-AVG", *key[2:])  # beta and K can be set
        if METHODS[setting["method"]].get("outer") == "SlowMo":
            key += (setting["block_momentum"],)
        if self._last[0] != key:
            alone = METHODS[setting["method"]].get("alone")
            strategy = strategy_of(1 if alone else setting["replicas"])
            trainer = Trainer(self._tasks[name], setting, strategy, jit=not self.quick)
            self._last = key, trainer
        row = self._last[1].run(setting)
        if not math.isfinite(float(row["validation_loss"])):
            self._last = None, None  # a loop that stopped with an error
        return row


class Trainer:
    """What is compiled for settings that differ in K, beta, rate and seed."""

    def __init__(self, task, setting, strategy, jit=True):
        import keras
        import tensorflow as tf

        import tf_blockmomentum as tfbm

        method = METHODS[setting["method"]]
        self.task, self.method = task, method
        self.strategy, option = strategy, setting["option"]
        parts = option.split(", ")
        codes = [part for part in parts if part in ("float16", "int8", "int4")]
        strategy.compression = codes[0] if codes else None
        self.per_step = task.batch * setting["replicas"]
        self.steps = task.samples // self.per_step
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        with strategy.scope():
            self.network = task.other if "CNN" in parts else task.network
            model = self.network()
            self.peak = keras.Variable(0.0, trainable=False)
            inside = [part.removesuffix(" inside") for part in parts if part.endswith(" inside")]
            inner = inner_optimizer(
                inside[0] if inside else method.get("inner", INNER[task.name]),
                falling(self.peak, schedule(self.steps, task.warm_up)),
            )
            self.optimizer = optimizer = block_optimizer(
                method, inner, setting["block_momentum"], parts
            )
            optimizer.build(model.trainable_variables)

        def gradients(model, x, y):
            with tf.GradientTape() as tape:
                value = loss(y, model(x, training=True))
            return value, tape.gradient(value, [v.value for v in model.trainable_variables])

        def step(data):
            value, found = gradients(model, *data)
            optimizer.apply(found, model.trainable_variables)
            return value

        self.model = model
        self.loop = tfbm.BlockLoop(
            step, optimizer, strategy, jit_compile=jit and task.name != "digits"
        )
        self.start = [v.numpy() for v in optimizer.variables]
        self._prepare_evaluation(loss, gradients)

    def _prepare_evaluation(self, loss, gradients):
        import keras
        import tensorflow as tf

        import tf_blockmomentum as tfbm

        self.alone = alone = self.network()
        idle = tfbm.BlockMomentum(keras.optimizers.SGD(0.0), 1, 0.0)
        idle.build(alone.trainable_variables)

        def step(data):
            idle.apply(gradients(alone, *data)[1], alone.trainable_variables)

        self.at_anchor = tfbm.BlockLoop(step, idle, None)

        @tf.function(jit_compile=False)
        def measure(x, y):
            logits = alone(x, training=False)
            hits = tf.equal(tf.argmax(logits, -1, output_type=y.dtype), y)
            return loss(y, logits), tf.reduce_mean(tf.cast(hits, tf.float32))

        self.measure = measure

    def run(self, setting):
        """Trains from the seed's initial weights on the seed's batches; the setting's row."""
        import keras

        optimizer, seed = self.optimizer, setting["seed"]
        for variable, value in zip(optimizer.variables, self.start, strict=True):
            variable.assign(value)
        self.peak.assign(setting["rate"])
        optimizer.sync_period = setting["sync_period"]
        if optimizer.block_momentum not in (None, setting["block_momentum"]):
            optimizer.block_momentum = setting["block_momentum"]  # which compiles anew
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.network().get_weights())
        optimizer.restart_block()

        order, searching = self.order(setting), seed >= SEARCH
        iterator = self.batches(order)
        at_end = searching or self.task.name == "digits"  # an evaluation lands what is in flight
        every = self.steps if at_end else max(EVERY[self.task.name], setting["sync_period"])
        samples, curve = [], []
        row = {**setting}
        try:
            for done in range(0, self.steps, every):
                self.loop.run(iterator, min(every, self.steps - done))
                self.loop.flush()
                self.go_to_anchor(order[: (done + every) * self.per_step])
                samples.append(min(done + every, self.steps) * self.per_step)
                curve.append(self.loss_of(self.task.validation))
        except FloatingPointError:  # diverged
            samples.append(self.steps * self.per_step)
            curve.append((math.inf, 0.0))
        row |= {
            "validation_loss": f"{curve[-1][0]:.5g}",
            "validation_accuracy": f"{curve[-1][1]:.4f}",
        }
        alone = self.method.get("alone")
        row["boundaries"] = self.steps if alone else optimizer.blocks
        if not searching and math.isfinite(curve[-1][0]):
            loss, accuracy = self.loss_of(self.task.test)
            row |= {"test_loss": f"{loss:.5g}", "test_accuracy": f"{accuracy:.4f}"}
            count = min(4096, len(self.task.training[0]))
            if self.task.name == "language":
                count = 256
            row["training_loss"] = (
                f"{self.loss_of(tuple(a[:count] for a in self.task.training))[0]:.5g}"
            )
        row["samples"] = " ".join(map(str, samples))
        row["curve"] = " ".join(f"{loss:.5g}" for loss, _ in curve)
        return row

    def order(self, setting):
        """The indices of all examples in the order in which they are trained on."""
        rng = np.random.default_rng(setting["seed"])
        labels, count = self.task.training[1], self.steps * self.per_step
        if "by class" not in setting["option"]:
            return shuffled(np.arange(len(labels)), count, rng)
        parts = np.array_split(np.argsort(labels, kind="stable"), setting["replicas"])
        parts = [shuffled(part, self.steps * self.task.batch, rng) for part in parts]
        parts = [part.reshape(self.steps, self.task.batch) for part in parts]
        return np.stack(parts, axis=1).ravel()

    def batches(self, order):
        """An iterator over the batches of all replicas, a batch being shared out in order."""
        import tensorflow as tf

        x, y = (tf.constant(a) for a in self.task.training)
        indices = tf.data.Dataset.from_tensor_slices(order.reshape(-1, self.per_step))
        data = indices.map(lambda i: (tf.gather(x, i), tf.gather(y, i)))
        return iter(self.strategy.experimental_distribute_dataset(data))

    def go_to_anchor(self, trained_on):
        """Gives the model that is evaluated the anchor (elastic averaging's centre), and where it
        has BatchNormalization statistics estimated anew."""
        import tensorflow as tf

        pairs = zip(self.model.trainable_variables, self.optimizer.anchors, strict=True)
        anchors = {id(variable): anchor for variable, anchor in pairs}
        self.alone.set_weights([anchors.get(id(v), v).numpy() for v in self.model.variables])
        if self.alone.non_trainable_variables:
            last = trained_on[-STATISTICS * self.task.batch :].reshape(-1, self.task.batch)
            x, y = self.task.training
            self.at_anchor.refresh([(tf.constant(x[i]), tf.constant(y[i])) for i in last])

    def loss_of(self, data):
        """Mean loss, in the task's unit, and accuracy."""
        import tensorflow as tf

        found, sizes = [], []
        for i in range(0, len(data[0]), AT_ONCE):
            x, y = (tf.constant(a[i : i + AT_ONCE]) for a in data)
            found.append([float(value) for value in self.measure(x, y)])
            sizes.append(len(x))
        loss, accuracy = np.average(found, axis=0, weights=sizes)
        return float(loss) * self.task.unit, float(accuracy)


def falling(peak, factors):
    """A Keras schedule: `peak`, which can be set, times the step's factor."""
    import keras
    import tensorflow as tf

    class Falling(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            step = tf.minimum(tf.cast(step, tf.int32), len(factors) - 1)
            return peak * tf.gather(tf.constant(factors, tf.float32), step)

        def get_config(self):
            raise NotImplementedError("It is not saved.")

    return Falling()


def inner_optimizer(name, rate):
    import keras

    return {
        "sgd": lambda: keras.optimizers.SGD(rate),
        "momentum": lambda: keras.optimizers.SGD(rate, momentum=0.9),
        "nesterov": lambda: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        "adam": lambda: keras.optimizers.Adam(rate),
        "adamw": lambda: keras.optimizers.AdamW(rate, weight_decay=0.1, global_clipnorm=1.0),
    }[name]()


def block_optimizer(method, inner, beta, options):
    import tf_blockmomentum as tfbm

    if method.get("outer") == "elastic":
        from elastic import ElasticAveraging

        return ElasticAveraging(inner, sync_period=1)
    if method.get("outer") == "SlowMo":
        return tfbm.BlockMomentum(inner, 1, outer_optimizer=tfbm.SlowMo(momentum=beta))
    overlap = [part.split("=")[1] for part in options if part.startswith("overlap=")]
    states = [part for part in options if part in ("reset", "average")]
    return tfbm.BlockMomentum(
        inner,
        sync_period=1,
        block_momentum=0.5,
        nesterov=method.get("nesterov", False),
        block_learning_rate=method.get("zeta", 1.0),
        inner_state=states[0] if states else "keep",
        overlap=float(overlap[0]) if overlap else False,
    )
