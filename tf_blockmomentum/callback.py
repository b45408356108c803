"""BlockTraining: makes `model.fit` run in blocks."""

import contextlib

import keras
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.loop import BlockLoop, check_on_nonfinite
from tf_blockmomentum.optimizer import find
from tf_blockmomentum.steps import explaining_xla, make_local_steps, resolve_jit
from tf_blockmomentum.strategy import worker_of


class BlockTraining(keras.callbacks.Callback):
    """Runs `model.fit` in blocks of local steps. Put it first in the list of callbacks.

    It gives the model its training function for the length of fit. A block is cut
    short at the end of an epoch, before validation, so that validation, checkpoints
    and saved models are those of the anchor, the same on every replica.
    BatchNormalization's moving statistics are averaged at every boundary. Replicas
    draw different dropout masks.

    Communication: one all-reduce at a boundary, in a few packed messages, and the
    metrics at the end of an epoch. The logs of a batch (the progress bar's) are this
    worker's own; the logs of an epoch are those of all examples of all workers.
    A worker that sets `model.stop_training` during an epoch stops all workers at the
    next boundary, and then they end the epoch together. After every callback has seen
    the end of an epoch the workers agree once more (one number is summed), so that one
    whose callback stops there, or in validation, does not leave the others waiting.

    Args:
        jit_compile: True compiles every replica's step with XLA; False does not;
            "auto" does where a GPU is present or the model was compiled with
            `jit_compile=True`.
        on_nonfinite: "raise" or "skip", for a replica with NaN or infinite weights at a
            boundary, as in `BlockLoop`; the count is in `skipped`. A loss that was NaN
            stays in its epoch's metrics.

    Raises:
        ValueError: at the start of fit, if the model's optimizer is no BlockMomentum,
            or XLA is asked for and a layer does not support it.
        FloatingPointError: from fit, on every worker: a replica is not finite.

    Example:

    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
    >>> model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=4), "mse")
    >>> history = model.fit(np.ones([64, 4]), np.ones([64, 1]), batch_size=8, verbose=0,
    ...                     callbacks=[tfbm.BlockTraining()])
    >>> int(model.optimizer.blocks)
    2
    """

    def __init__(self, jit_compile="auto", on_nonfinite="raise"):
        super().__init__()
        resolve_jit(jit_compile)
        self.jit_compile = jit_compile
        self.on_nonfinite = check_on_nonfinite(on_nonfinite)
        self._loop: BlockLoop | None = None
        self._begin = 0

    @property
    def skipped(self):
        """How many times a replica was left out of a block because it was not finite."""
        return self._loop.skipped if self._loop else 0

    @property
    def drift(self):
        """The replicas' drift at the last boundary, as `BlockLoop.drift`."""
        return self._loop.drift if self._loop else 0.0

    # -- Keras calls these ----------------------------------------------------------------------

    def set_model(self, model):
        super().set_model(model)
        block_momentum = find(model.optimizer)
        if block_momentum is None:
            raise ValueError(
                "BlockTraining needs a model compiled with BlockMomentum. Received: optimizer="
                f"{model.optimizer!r}. Wrap it: model.compile(optimizer=tfbm.BlockMomentum(...))."
            )
        block_momentum.check_same_scope("model", model.distribute_strategy)
        # A fit leaves its callback's `_not_fitting` on the model; compile takes it away.
        earlier = getattr(model.train_function, "__self__", None)
        settings = (self.jit_compile, self.on_nonfinite)
        if isinstance(earlier, BlockTraining) and settings == (
            earlier.jit_compile,
            earlier.on_nonfinite,
        ):
            self._loop = earlier._loop  # compiled already
        else:
            self._loop = None
        if block_momentum.built:
            self._prepare()
        model.train_function = self._train_function

    def on_epoch_begin(self, epoch, logs=None):
        """A new epoch: nobody's data has ended."""
        if self._loop is not None:
            self._loop.begin_epoch()

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = batch

    def on_test_begin(self, logs=None):
        self._flush()

    def on_epoch_end(self, epoch, logs=None):
        self._flush()

    def on_train_end(self, logs=None):
        self.model.train_function = self._not_fitting

    # -- the training function --------------------------------------------------------------------

    def _train_function(self, iterator):
        """What fit calls: `steps_per_execution` local steps, fewer at the end of an epoch."""
        model = self.model
        loop = self.ready_loop(iterator.element_spec)
        total = self.params["steps"]  # None: not known
        steps = model.steps_per_execution
        left = steps if total is None else total - self._begin
        with _eagerly(model.run_eagerly):
            logs = loop._run(
                iterator,
                min(steps, left),
                last=total is not None and left <= steps,
                peek=total is None,
            )
        if loop.stopping:
            model.stop_training = True
        return logs

    def ready_loop(self, element_spec):
        """The loop; builds model and optimizer from the spec of a batch if need be."""
        if self._loop is None:
            _keras.build(self.model, element_spec)
            self._prepare()
        assert self._loop is not None
        return self._loop

    def before_epoch_logs(self):
        """Called where fit is about to reduce an epoch's metrics over the replicas: brings
        all workers here."""
        loop = self._fitting_loop()
        if loop is not None:
            loop.end_epoch(stopping=self.model.stop_training)
            self.model.stop_training |= loop.stopping

    def after_callbacks(self):
        """Called at the end of an epoch after all callbacks: brings all workers to the same
        decision whether to stop."""
        loop = self._fitting_loop()
        if loop is not None:
            self.model.stop_training = loop.any_worker(self.model.stop_training)

    def _fitting_loop(self):
        return self._loop if self.model.train_function == self._train_function else None

    def _prepare(self):
        """Once model and optimizer are built."""
        model, optimizer = self.model, find(self.model.optimizer)
        if self._loop is None:
            if model.optimizer is not optimizer:  # mixed_float16's LossScaleOptimizer
                _keras.make_local(model.optimizer)
            self._loop = BlockLoop(
                model.train_step,
                model.optimizer,
                model.distribute_strategy,
                averaged_variables=_keras.statistics(model),
                jit_compile=model_jit(model, self.jit_compile),
                on_nonfinite=self.on_nonfinite,
            )
        if self._loop.at_anchor:
            optimizer.restart_block()
        generators = _keras.seed_generators(model)
        ids = replica_ids(model.distribute_strategy) if generators else []
        for generator in generators:
            give_replicas_different_seeds(generator, model.distribute_strategy, ids)

    def _flush(self):
        if self._loop is not None:
            self._loop.flush()

    def _not_fitting(self, iterator):
        raise RuntimeError(
            "This model was compiled with BlockMomentum, so fit needs "
            "callbacks=[tfbm.BlockTraining()]. Without it replicas would train without ever "
            "being averaged. For stock training, compile with another optimizer."
        )


class ChiefOnly(keras.callbacks.Callback):
    """Runs a callback that writes files on the first worker only.

    For ModelCheckpoint, CSVLogger, TensorBoard and the like, whose copies on several workers
    would write to the same path at the same time. They read weights without communication,
    so the first worker may do so alone, and at the end of an epoch all replicas have the
    same. A callback that evaluates the model or stops training must run on all workers, as
    EarlyStopping, ReduceLROnPlateau and TerminateOnNaN do: not for this.

    Args:
        callback: a Keras callback; on other workers none of its methods is called.

    Example:

    >>> checkpoint = tfbm.ChiefOnly(keras.callbacks.ModelCheckpoint("best.keras"))
    """

    def __init__(self, callback):
        super().__init__()
        self.callback = callback
        self._calls = False  # until the model tells which worker this is

    def set_model(self, model):
        super().set_model(model)
        self._calls = worker_of(model.distribute_strategy)[0] == 0
        if self._calls:
            self.callback.set_model(model)
            self.callback.set_params(self.params)

    def set_params(self, params):
        """Passes them on, if the model came first, as in Keras's CallbackList."""
        super().set_params(params)
        if self._calls:
            self.callback.set_params(params)


def _passed_on(hook):
    def method(self, *args, **kwargs):
        if self._calls:
            getattr(self.callback, hook)(*args, **kwargs)

    method.__doc__ = f"The callback's own `{hook}`, on the first worker."
    return method


for _hook in dir(keras.callbacks.Callback):
    if _hook.startswith("on_"):
        setattr(ChiefOnly, _hook, _passed_on(_hook))


def make_test_function(model):
    """What evaluate calls under a block strategy: steps without communication; the metrics
    are reduced over the replicas when Keras reads them, once at the end."""
    jit_compile = model_jit(model, "auto")
    local_steps = make_local_steps(model.test_step, model.distribute_strategy, jit_compile)

    def test_function(iterator):
        with _eagerly(model.run_eagerly), explaining_xla(jit_compile):
            taken, logs, _ = local_steps(iterator, model.steps_per_execution)
        progress.note("evaluates")
        if not taken:
            raise StopIteration
        return logs

    return test_function


_keras.install(make_test_function)


def model_jit(model, jit_compile):
    """Whether to compile a model's steps with XLA; an error if its layers cannot be."""
    unsupported = [layer.name for layer in _keras.layers_of(model) if not layer.supports_jit]
    if jit_compile is True and unsupported:
        raise ValueError(
            "XLA cannot compile this model. Received: BlockTraining(jit_compile=True) and layers "
            f"that do not support it: {', '.join(unsupported)}. Use jit_compile=False, or move "
            "those layers into the tf.data pipeline."
        )
    if model.run_eagerly:
        return False
    if jit_compile == "auto":
        return not unsupported and (bool(model.jit_compile) or resolve_jit("auto"))
    return jit_compile


# Odd and without pattern: seeds that a user numbered 1, 2, 3 stay apart.
_ODD = 2654435769


def give_replicas_different_seeds(generator, strategy, ids):
    """Moves a seed generator's seed apart on each of this worker's replicas, which have these
    `replica_ids`; replica 0 keeps its own.

    Under tf.distribute all replicas start from one state and would drop the same units.
    Weights loaded later bring one state for all again, so this is done before every fit.
    """
    states = strategy.experimental_local_results(generator.state.value)
    seeds = [int(state.numpy()[0]) for state in states]
    offsets = [i * _ODD for i in ids]
    base = getattr(generator, "_tfbm_seed", None)
    if base is not None and seeds == [(base + offset) % 2**32 for offset in offsets]:
        return
    generator._tfbm_seed = seeds[0]
    for state, offset in zip(states, offsets, strict=True):
        seed = tf.constant((seeds[0] + offset) % 2**32, state.dtype)
        state.assign(tf.stack([seed, state[1]]))


def keep_seeds(generator, strategy, ids):
    """Takes restored seeds for those that `give_replicas_different_seeds` gave."""
    state = strategy.experimental_local_results(generator.state.value)[0]
    offset = ids[0] * _ODD
    generator._tfbm_seed = (int(state.numpy()[0]) - offset) % 2**32


def replica_ids(strategy):
    """The numbers of this worker's replicas among all replicas."""
    ids = tf.function(lambda: strategy.run(_replica_id), autograph=False)()
    return [int(i) for i in strategy.experimental_local_results(ids)]


def _replica_id():
    return tf.identity(tf.distribute.get_replica_context().replica_id_in_sync_group)


@contextlib.contextmanager
def _eagerly(run_eagerly):
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(before or run_eagerly)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
