"""BlockLoop: compiled local steps, and the boundary that ends a block."""

import contextlib
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.boundary.ending import Ending
from tf_blockmomentum.checks import check_number, check_on_nonfinite
from tf_blockmomentum.data import Data
from tf_blockmomentum.feed import is_there
from tf_blockmomentum.optimizer import BlockMomentum, find
from tf_blockmomentum.start import start_alike
from tf_blockmomentum.statistics.batches import LastBatches, batches_of
from tf_blockmomentum.statistics.refresh import Refresh
from tf_blockmomentum.steps import LocalSteps, explaining_xla, resolve_jit
from tf_blockmomentum.strategy import check_strategy


class BlockLoop:
    """Runs a step function in blocks: K local steps, then the boundary.

    The local steps loop in one compiled `tf.function` and do not communicate. The
    boundary is a second one: an all-reduce of a few packed messages, the outer step,
    and the copy back to the replica. Where a block ends is decided in Python, since
    a collective cannot stand in a graph's loop under `MultiWorkerMirroredStrategy`;
    every worker must therefore call `run` and `flush` alike.

    A replica that took no step in a block (its data ended first) is left out of
    that block's mean. When data ends, the block ends too. A replica whose weights are
    not finite at a boundary is left out of the mean as well, so the anchor stays finite.

    Args:
        step_fn: function of one batch (one replica's share), run in every replica. It
            computes gradients and calls `optimizer.apply`, and returns scalars or
            other tensors of fixed shape, in any structure, or None. The loss is that of
            one device: inside, there is one replica, and nothing is divided by P.
        optimizer: a `BlockMomentum`, or Keras's LossScaleOptimizer around one, or a
            list of several (a GAN's), whose `sync_period` must then be the same number.
            One that is not built yet is built with the variables it is applied to.
        strategy: a block strategy, or None for one replica.
        averaged_variables: per-replica variables that are replaced by their means at
            a boundary whatever the step does with them. Keras variables that the step
            assigns, such as BatchNormalization's moving statistics, need not be named:
            docs/your_script.md has the rule for each.
        jit_compile: True compiles a replica's step with XLA; False does not; "auto"
            does where a GPU is present.
        on_nonfinite: what to do about a replica with NaN or infinite weights or
            statistics at a boundary. "raise" stops all workers. "skip" warns, counts it
            in `skipped`, and lets that replica go on from the anchor; what is not finite
            in its inner optimizer's state becomes 0.

    Raises:
        TypeError: `optimizer` is not a BlockMomentum.
        ValueError: a strategy without per-replica variables, a `jit_compile` or
            `on_nonfinite` that is none of the above, or optimizers whose blocks differ.
        FloatingPointError: from `run` and `flush`, on every worker: a replica is not finite
            and `on_nonfinite="raise"`, or no replica is.
        RuntimeError: from `run` and `flush`: the workers have come to train different models.

    Example:

    >>> w = keras.Variable([0.0])
    >>> optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.5), sync_period=2)
    >>> optimizer.build([w])
    >>> def step(x):
    ...     with tf.GradientTape() as tape:
    ...         loss = tf.reduce_mean((w - x) ** 2)
    ...     optimizer.apply([tape.gradient(loss, w.value)], [w])
    ...     return loss
    >>> loop = tfbm.BlockLoop(step, optimizer, strategy=None)
    >>> data = iter(tf.data.Dataset.from_tensors([2.0]).repeat(4))
    >>> float(loop.run(data, steps=4)), int(optimizer.blocks)
    (0.0, 2)
    """

    def __init__(
        self,
        step_fn: Callable[..., Any],
        optimizer: BlockMomentum | Any | Sequence[Any],
        strategy: tf.distribute.Strategy | None = None,
        averaged_variables: Iterable[Any] = (),
        jit_compile: bool | str = "auto",
        on_nonfinite: str = "raise",
    ) -> None:
        wrappers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        self.optimizers = check_together(wrappers)
        self._wrappers = wrappers
        for wrapper in wrappers:
            _keras.make_local(wrapper)  # loss scaling asks all replicas, else
        self._strategy = strategy or tf.distribute.get_strategy()
        check_strategy(self._strategy)
        self._jit = resolve_jit(jit_compile)
        self.ending = Ending(
            self.optimizers,
            wrappers,
            self._strategy,
            averaged_variables,
            self._jit,
            check_on_nonfinite(on_nonfinite),
        )
        self._position = 0  # local steps since the last boundary
        self.data = Data(self._strategy)
        self._traced = False
        self.wants_to_stop = False  # this worker, at the next boundary, with all others
        self.wants_to_leave = False  # and to end the process
        self._begun: Callable[[], None] | None = None
        self._epoch_begins = True
        self._assignments = -1  # outside any step, when variables were looked through last
        self.begin_fit()

        self._step_fn = step_fn
        self.kept: LastBatches | None = None  # of this epoch
        self._refresh: Refresh | None = None  # made when first used

        def local_step(data: Any) -> Any:
            with self._local_step(), self.ending.rules.recording():
                return step_fn(data)

        steps = self.ending.replica.steps
        self._local_steps = LocalSteps(
            local_step,
            self._strategy,
            self._jit,
            after_step=lambda: steps.assign_add(1),
            optimizers=wrappers,
        )

        self.take_steps: Callable[..., Any] = self._local_steps

    @property
    def position(self) -> int:
        """Local steps since the last boundary, from 0 to K - 1."""
        return self._position

    @property
    def at_anchor(self) -> bool:
        """Whether no block has begun, and no deltas are in flight."""
        return self._position == 0 and not self.ending.flight.under_way

    @property
    def drift(self) -> float:
        """The replicas' drift at the last boundary, if the schedule of `sync_period` measures it
        (0 if not): how far they were from their mean, relative to the anchor's norm."""
        return self.ending.drift

    @property
    def skipped(self) -> int:
        """How many times a replica was left out of a block because it was not finite."""
        return self.ending.skipped

    def run(self, iterator: Any, steps: int) -> Any:
        """Takes up to `steps` local steps, ending every block that becomes full.

        The first call compares the workers' weights, and all take the chief's if they differ.
        Weights that were set since the last call (`set_weights`, `load_weights`, an assignment)
        are the new anchor; set them on all workers alike.

        Args:
            iterator: from `iter(strategy.experimental_distribute_dataset(dataset))`, or
                from a tf.data dataset when there is no strategy.
            steps: how many batches to take, at least 1.

        Returns:
            What `step_fn` returned for the last batch, averaged over this worker's
            replicas (no communication).

        Raises:
            StopIteration: there was no batch left; all replicas have then ended.
        """
        return self._run(iterator, steps)

    def flush(self) -> None:
        """Ends the current block early, if it has begun, and with `overlap` lands what is in
        flight: all replicas are at the anchor then, and all other state is the same on all
        replicas too, but the inner optimizers'. All workers call it alike."""
        self._notice_weights_set()
        self._end_block_begun()
        self.ending.settle()

    def refresh(self, batches: Any) -> None:
        """Flushes, and estimates the moving statistics (BatchNormalization's) of the layers that
        the step function calls anew at the anchor, before somebody validates or saves.

        The step function is run on each batch with its optimizers' updates left out, and all
        that it assigns but the statistics is put back; what it returns is thrown away. The
        statistics become those of all examples of all replicas together, as in
        `tfbm.refresh_statistics`. All workers call it alike, with as many batches as each has.

        Args:
            batches: this worker's: a distributed dataset (with no strategy a tf.data dataset), an
                iterator over one, of which all that is left is taken, or a list of batches. Some
                ten are enough.

        Raises:
            FloatingPointError, RuntimeError: as from `flush`.
        """
        self.flush()
        spec = getattr(batches, "element_spec", None)
        self.refresh_with(batches_of(batches, self._strategy), spec)

    def refresh_with(
        self, batches: Iterable[Any], spec: Any = None, layers: Iterable[Any] | None = None
    ) -> None:
        """As `refresh`, after a flush. `layers`: where to look for statistics, if known."""
        if self._refresh is None:
            self._refresh = Refresh(
                self._step_fn, self._strategy, self._jit, self._wrappers, layers, self._local_step
            )
        self._refresh(batches, spec)

    def keep(self, batches: int) -> None:
        """Keeps the last batches of an epoch from now on; before the first step."""
        self.kept = LastBatches(batches)
        self._local_steps.feed.kept = self.kept

    @contextlib.contextmanager
    def _local_step(self) -> Iterator[None]:
        """Around the step function: its optimizers may be applied."""
        with contextlib.ExitStack() as stack:
            for block_momentum in self.optimizers:
                stack.enter_context(block_momentum.local_step())
            yield

    # -- Python decides where blocks end ------------------------------------------------------

    def _run(self, iterator: Any, steps: int, last: bool = False, peek: bool = False) -> Any:
        """As `run`. `last`: this worker's data ends with these steps. `peek`: it may end
        anywhere, so look for the next batch, to know the last block for the last."""
        if not isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            raise TypeError(
                "BlockLoop.run takes an iterator over a distributed dataset, as in "
                "iter(strategy.experimental_distribute_dataset(dataset)). Received: "
                f"{type(iterator).__name__}."
            )
        check_number("steps", steps, numbers.Integral, "a whole number of at least 1", 1)
        if self.data.has_finished(iterator):
            raise StopIteration
        peek = peek or self._local_steps.feed.copies(iterator)  # one batch is asked for ahead
        self.prepare(lambda: self._local_steps.trace(iterator, peek))
        self.begin()
        logs, remaining = None, steps
        while remaining > 0:
            wanted = min(remaining, max(self.ending.next_stop - self._position, 1))
            first = self.data.take_seen(iterator)
            span = self.ending.observer.span("steps", lambda: self._local_steps.traces)
            with explaining_xla(self._jit), span:
                taken, new_logs, following = self.take_steps(iterator, wanted, first, peek)
            self._position += taken
            self.data.count(iterator, taken)
            remaining -= taken
            if taken:
                logs = new_logs
            ended = taken < wanted or (last and remaining == 0)
            if peek and is_there(following):
                self.data.note_seen(iterator, following)
            elif peek:
                ended = True
            self._come_to_a_stop(ended)
            if ended:
                self.data.note_end(iterator, over=taken < wanted or not last)
                break
        if remaining == steps:
            raise StopIteration
        return logs

    def run_batch(self, data: Any) -> Any:
        """One local step on a batch that is this worker's own, for `train_on_batch`."""
        self.prepare(lambda: None)
        self.begin()
        logs = self._local_steps.one_step(data)[0]
        self._position += 1
        self._come_to_a_stop(ended=False)
        return logs

    def prepare(self, trace: Callable[[], Any]) -> None:
        """Traces a step before the first is taken: it tells which variables are updated and
        assigned, and builds optimizers that nobody has built."""
        if not self._traced and not tf.config.functions_run_eagerly():
            trace()
            self.ending.ready()
        self._traced = True

    def prepare_spec(self, element_spec: Any) -> None:
        """As `prepare`, from the spec of a batch."""
        self.prepare(lambda: self._local_steps.trace_spec(element_spec))

    def begin_fit(self, variables: Callable[[], Iterable[Any]] = tuple, data: int = 0) -> None:
        """A new fit, whose first step compares the workers' variables, besides those of the
        optimizers, and what they say of their data."""

        def begun() -> None:
            self._position = 0
            self.ending.drop()
            built = [w for w, o in zip(self._wrappers, self.optimizers, strict=True) if o.built]
            others = [*variables(), *self.ending.rules.changed]
            start_alike(self._strategy, built, others, data)
            self._epoch_begins, self._assignments = False, -1

        self._begun = begun

    def begin(self) -> None:
        """Before a step: compares, if it is the first, and notices weights that were set."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun()
        self._notice_weights_set()

    def _notice_weights_set(self) -> None:
        """Weights that a callback has set, on all workers, are the new anchor."""
        optimizers, everything = self.optimizers, self._epoch_begins and self.at_anchor
        self._epoch_begins, assignments = False, _keras.assignments_outside()
        if assignments == self._assignments and not everything:
            return
        trained = [v for o in optimizers if o.built for v in o.trained_variables]
        assigned = _keras.take_assigned(trained)
        self._assignments = assignments if trained else -1
        if not trained or not (assigned or everything):
            return
        if self.at_anchor:
            found = self.ending.set_between()
            values = [tf.convert_to_tensor(v) for v in found]
        else:  # they were set in the middle of a block, which ends here without them
            found, values = assigned, [tf.convert_to_tensor(v) for v in assigned]
            self.ending.go_back(found)
            self.ending.weights_set = True
            self._end_block_begun()
            if self.ending.flight.under_way:
                self.ending.land(flush=True)
        anchors = {id(v): a for o in optimizers for v, a in o.pairs}
        for v, value in zip(found, values, strict=True):
            v.assign(value)
            anchors[id(v)].assign(value)
        _keras.take_assigned(trained)
        self.ending.weights_set |= bool(found)

    @property
    def variables(self) -> list[Any]:
        """Its own state besides `position`."""
        return self.ending.replica.variables

    def go_on(self, position: int) -> None:
        """Goes on in the middle of a block whose variables have been restored."""
        self._begun = None
        self._epoch_begins, self._assignments = False, -1
        self._position = position
        self.ending.go_on()
        self.ending.forget_assignments()

    def begin_epoch(self) -> None:
        """Forgets that data had ended, and whether to stop."""
        self.ending.ended, self.ending.stopping, self.wants_to_stop = 0, False, False
        self._epoch_begins = True

    def end_epoch(self) -> None:
        """Ends this worker's part of an epoch, however it came to its end."""
        self.begin()
        if not self.ending.all_ended:
            self._end_block(ended=True)

    @property
    def log_specs(self) -> Any:
        """What a step returns, if one has been traced."""
        return self._local_steps.specs

    def _come_to_a_stop(self, ended: bool) -> None:
        """What is to be done at this step, if anything: the block ends, or the mean of the one
        before lands in it."""
        if ended or self._position >= self.ending.period:
            self._end_block(ended)
        elif self.ending.flight.under_way and self._position >= self.ending.next_stop:
            self.ending.land_within()

    def _end_block_begun(self) -> None:
        if self._position:
            self._end_block(ended=False)

    def _end_block(self, ended: bool) -> None:
        self._position = 0
        self.ending.end(ended, self.wants_to_stop, self.wants_to_leave)


def check_together(wrappers: Sequence[Any]) -> list[BlockMomentum]:
    """Returns the BlockMomentum optimizers of a loop, if their blocks can end together."""
    found = [optimizer for optimizer in map(find, wrappers) if optimizer is not None]
    if not found or len(found) < len(wrappers):
        received = wrappers[0] if len(wrappers) == 1 else list(wrappers)
        raise TypeError(
            f"BlockLoop needs a BlockMomentum optimizer. Received: optimizer={received!r}. "
            "Wrap yours: tfbm.BlockMomentum(optimizer)."
        )
    alike = {(o.sync_period if isinstance(o.sync_period, int) else None, o.overlap) for o in found}
    if len(found) > 1 and (len(alike) > 1 or None in {period for period, _ in alike}):
        received = ", ".join(f"{o.sync_period!r} (overlap={o.overlap})" for o in found)
        raise ValueError(
            "Several BlockMomentum optimizers of one model end their blocks together: they need "
            f"the same number for `sync_period`, and the same `overlap`. Received: {received}."
        )
    return found
