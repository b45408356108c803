"""BlockTraining: makes `model.fit` run in blocks."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum._private import models as _models
from tf_blockmomentum._private.tensorflow import InUse
from tf_blockmomentum._private.trainer import Fit, fit_of, install
from tf_blockmomentum.boundary.observer import Observer
from tf_blockmomentum.checks import check_on_nonfinite
from tf_blockmomentum.loop import BlockLoop, check_together
from tf_blockmomentum.optimizer import BlockMomentum, find
from tf_blockmomentum.seeds import give_replicas_different_seeds, replica_ids
from tf_blockmomentum.statistics.layers import with_statistics
from tf_blockmomentum.statistics.refresh import DEFAULT, check_refresh_statistics
from tf_blockmomentum.steps import LocalSteps, eagerly, explaining_xla, resolve_jit
from tf_blockmomentum.strategy import BlockStrategy, worker_of


class BlockTraining(keras.callbacks.Callback):
    """Runs `model.fit` in blocks of local steps. Put it first in the list of callbacks.

    It gives the model its training function for the length of fit. A block is cut
    short at the end of an epoch, before validation, so that validation, checkpoints
    and saved models are those of the anchor, the same on every replica.
    BatchNormalization's moving statistics are averaged at every boundary, and there they are
    estimated anew, since the anchor is not where they were taken; docs/your_script.md
    has the rule for each kind of variable. Replicas draw different dropout masks.

    Before its first step a fit compares the workers: if their weights differ, all take the
    chief's, and its optimizer state. Weights that a callback sets on all workers are the new
    anchor, and no movement for block momentum.

    Communication: one all-reduce at a boundary, in a few packed messages, and the
    metrics at the end of an epoch. The logs of a batch (the progress bar's) are this
    worker's own; the logs of an epoch are those of all examples of all workers.
    A worker that sets `model.stop_training` during an epoch stops all workers at the
    next boundary, and then they end the epoch together (one process alone stops at once).
    After every callback has seen
    the end of an epoch the workers agree once more (one number is summed), so that one
    whose callback stops there, or in validation, does not leave the others waiting.

    Args:
        jit_compile: True compiles every replica's step with XLA; False does not;
            "auto" does where a GPU is present or the model was compiled with
            `jit_compile=True`.
        on_nonfinite: "raise" or "skip", for a replica with NaN or infinite weights at a
            boundary, as in `BlockLoop`; the count is in `skipped`. A loss that was NaN
            stays in its epoch's metrics. With Keras's TerminateOnNaN in the same fit, "raise"
            stops all workers without an error instead.
        refresh_statistics: with how many of each replica's last batches of an epoch the moving
            statistics of BatchNormalization (and of layers alike, see
            `tfbm.refresh_statistics`) are estimated anew at the anchor; 0: never; default 16.
            For it the training step is run on them once more, its optimizers' updates left out;
            all else that it assigns (metrics, seeds, counters) is put back. Training itself is
            not changed by it. Memory: these batches, from when they are trained on until the
            epoch ends; in a backup within an epoch they are on disk too. Time: as many forward
            passes an epoch, and another trace of the step. No cost without such layers. Batches
            of `train_on_batch` are not counted, and what is saved within an epoch has the
            replicas' mean statistics.

    Raises:
        ValueError: an argument out of its range; at the start of fit, if the model's
            optimizer is no BlockMomentum, or XLA is asked for and a layer does not support it.
        FloatingPointError: from fit, on every worker: a replica is not finite.

    Example:

    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
    >>> model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=4), "mse")
    >>> history = model.fit(np.ones([64, 4]), np.ones([64, 1]), batch_size=8, verbose=0,
    ...                     callbacks=[tfbm.BlockTraining()])
    >>> int(model.optimizer.blocks)
    2
    """

    def __init__(
        self,
        jit_compile: bool | str = "auto",
        on_nonfinite: str = "raise",
        refresh_statistics: int = DEFAULT,
    ) -> None:
        super().__init__()
        resolve_jit(jit_compile)
        self.jit_compile = jit_compile
        self.on_nonfinite = check_on_nonfinite(on_nonfinite)
        self.refresh_statistics = check_refresh_statistics(refresh_statistics)
        self._loop: BlockLoop | None = None
        self._begin = 0
        self._fit = Fit()
        self._observer = Observer()

    @property
    def skipped(self) -> int:
        """How many times a replica was left out of a block because it was not finite."""
        return self._loop.skipped if self._loop else 0

    @property
    def drift(self) -> float:
        """The replicas' drift at the last boundary, as `BlockLoop.drift`."""
        return self._loop.drift if self._loop else 0.0

    # -- Keras calls these ----------------------------------------------------------------------

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._observer = Observer()  # that of an earlier fit, which may have failed
        self.attach(model)
        model.train_function = self._train_function

    def observe(self, observer: Observer) -> BlockLoop | None:
        """Has the loop tell somebody what it does, from now on until the end of fit. Returns the
        loop, if there is one yet."""
        self._observer = observer
        if self._loop is not None:
            self._loop.ending.observer = observer
        return self._loop

    @property
    def optimizer(self) -> BlockMomentum:
        """The first of the model's BlockMomentum optimizers."""
        return check_together(self._wrappers)[0]

    @property
    def is_fitting(self) -> bool:
        """Whether a fit is under way."""
        return self._model.train_function == self._train_function

    def attach(self, model: keras.Model) -> None:
        """Takes the model's training over, with the loop of an earlier fit if it fits."""
        self._model = model
        _models.unwrap_second_loss_scaling(model)
        wrappers = _models.optimizers_of(model, find)
        if not wrappers:
            raise ValueError(
                "BlockTraining needs a model compiled with BlockMomentum. Received: optimizer="
                f"{model.optimizer!r}. Wrap it: model.compile(optimizer=tfbm.BlockMomentum(...))."
            )
        for block_momentum in check_together(wrappers):
            block_momentum.check_same_scope("model", model.distribute_strategy)
        # A fit leaves its callback on the model; compile takes it away.
        earlier = getattr(model.train_function, "__self__", None)
        if isinstance(earlier, BlockTraining) and self._settings == earlier._settings:
            self._loop = earlier._loop  # compiled already
        else:
            self._loop = None
        self._wrappers = wrappers

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.jit_compile, self.on_nonfinite, self.refresh_statistics

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """A new fit: before its first step the workers compare what they start from."""
        self._fit = fit_of(self.model)
        if self._loop is not None:
            self._begin_fit()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """A new epoch: nobody's data has ended."""
        progress.note_epoch(epoch + 1, self.params.get("epochs") or 0)
        if self._loop is not None:
            self._loop.begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._begin = batch

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.flush()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.model.train_function = self._between_fits
        self.observe(Observer())
        progress.note("has ended fit")

    # -- the training function --------------------------------------------------------------------

    def _train_function(self, iterator: Any) -> Any:
        """What fit calls: `steps_per_execution` local steps, fewer where the data ends. With
        `steps_per_epoch` Keras counts whole executions, which may be more than it asks for."""
        model = self.model
        self._fit.in_use.hold(iterator)
        loop = self.ready_loop(iterator.element_spec)
        total = self.params["steps"]  # None: not known
        steps = model.steps_per_execution
        left = steps if total is None else max(total - self._begin, 1)  # 0 batches end too
        with eagerly(model.run_eagerly):
            logs = loop._run(
                iterator,
                steps if self._fit.counts_steps else min(steps, left),
                last=total is not None and left <= steps,
                peek=total is None,
            )
        if loop.ending.stopping:
            model.stop_training = True
        return logs

    def ready_loop(self, element_spec: Any) -> BlockLoop:
        """The loop; builds model and optimizer from the spec of a batch if need be."""
        if self._loop is None:
            model = self._model
            _models.check_layers(model)
            _models.build(model, element_spec)
            if isinstance(model.distribute_strategy, BlockStrategy):
                _models.bring_into_scope(model)
            self._loop = BlockLoop(
                model.train_step,
                self._wrappers,
                model.distribute_strategy,
                jit_compile=model_jit(model, self.jit_compile),
                on_nonfinite=self.on_nonfinite,
            )
            if self.refresh_statistics and with_statistics(_models.layers_of(model)):
                self._loop.keep(self.refresh_statistics)
            self._begin_fit()
        return self._loop

    def after_batch_callbacks(self) -> None:
        """Called at the end of a batch after all callbacks. One that wants to stop is heard of at
        the next boundary, at which all workers stop together."""
        loop = self._loop
        if loop is None or not self.model.stop_training or loop.ending.stopping:
            return
        if worker_of(self.model.distribute_strategy)[1] > 1:
            loop.wants_to_stop, self.model.stop_training = True, False

    def before_epoch_logs(self) -> None:
        """Called where fit is about to reduce an epoch's metrics over the replicas: brings
        all workers here."""
        loop = self._fitting_loop()
        if loop is not None:
            loop.wants_to_stop |= bool(self.model.stop_training)
            loop.end_epoch()
            self.model.stop_training |= loop.ending.stopping
            if loop.kept is not None:
                self.flush()
                with eagerly(self.model.run_eagerly):
                    loop.refresh_with(loop.kept.take(), layers=_models.layers_of(self.model))

    def after_callbacks(self) -> None:
        """Called at the end of an epoch after all callbacks: brings all workers to the same
        decision whether to stop, and whether to leave."""
        loop = self._fitting_loop()
        if loop is not None:
            leaving = loop.wants_to_leave or loop.ending.leaving
            wish = loop.ending.largest(2 * leaving + bool(self.model.stop_training))
            self.model.stop_training, loop.ending.leaving = wish > 0, wish > 1

    def _fitting_loop(self) -> BlockLoop | None:
        return self._loop if self.is_fitting else None

    @property
    def log_specs(self) -> Any:
        """What a step returns, if one has been traced."""
        return self._loop.log_specs if self._loop else None

    def _begin_fit(self) -> None:
        """The model's weights may be others than at the last fit's end, and its seeds."""
        assert self._loop is not None
        model = self._model
        self._loop.ending.observer = self._observer
        self._loop.begin_fit(lambda: _models.shared_variables(model), self._fit.data)
        if self._loop.kept is not None:
            self._loop.kept.take()  # of a fit that was interrupted
        stops = self._fit.stops_on_nan and self.on_nonfinite == "raise"
        self._loop.ending.on_nonfinite = "stop" if stops else self.on_nonfinite
        generators = _models.seed_generators(model)
        ids = replica_ids(model.distribute_strategy) if generators else []
        for generator in generators:
            give_replicas_different_seeds(generator, model.distribute_strategy, ids)

    def flush(self) -> None:
        """Before somebody looks at the model."""
        if self._loop is not None:
            with eagerly(self._model.run_eagerly):
                self._loop.flush()

    def flush_between_fits(self) -> None:
        """As `flush`, unless a fit is under way."""
        if not self.is_fitting:
            self.flush()

    def _between_fits(self, data: Any) -> Any:
        """What `train_on_batch` calls: one local step. The loop goes on from batch to batch."""
        if isinstance(data, tf.data.Iterator | tf.distribute.DistributedIterator):
            raise RuntimeError(
                "This model was compiled with BlockMomentum, so fit needs "
                "callbacks=[tfbm.BlockTraining()]. Without it replicas would train without ever "
                "being averaged. For stock training, compile with another optimizer."
            )
        batch = next(iter(data))
        loop = self.ready_loop(tf.nest.map_structure(_spec_of, batch))
        with eagerly(self._model.run_eagerly):
            return loop.run_batch(batch)


def between_fits(model: keras.Model) -> Callable[[Any], Any]:
    """The training function of a model for which no fit is under way."""
    training = BlockTraining()
    training.attach(model)
    return training._between_fits


def make_test_function(model: keras.Model) -> Callable[[Any], Any]:
    """What evaluate calls under a block strategy: steps without communication; the metrics
    are reduced over the replicas when Keras reads them, once at the end."""
    jit_compile = model_jit(model, "auto")
    local_steps = LocalSteps(model.test_step, model.distribute_strategy, jit_compile)
    in_use = InUse()

    def test_function(iterator: Any) -> Any:
        in_use.hold(iterator)
        with eagerly(model.run_eagerly), explaining_xla(jit_compile):
            taken, logs, _ = local_steps(iterator, model.steps_per_execution)
        progress.note("evaluates")
        if not taken:
            raise StopIteration
        return logs

    test_function.steps = local_steps  # type: ignore[attr-defined]
    test_function.in_use = in_use  # type: ignore[attr-defined]
    return test_function


install(make_test_function, between_fits)


def model_jit(model: keras.Model, jit_compile: bool | str) -> bool:
    """Whether to compile a model's steps with XLA; an error if its layers cannot be."""
    unsupported = [layer.name for layer in _models.layers_of(model) if not layer.supports_jit]
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
    return bool(jit_compile)


def _spec_of(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, tf.SparseTensor | tf.RaggedTensor):
        return leaf
    return tf.TensorSpec(np.shape(leaf), getattr(leaf, "dtype", "float32"))
