"""The algorithm: what a block does to the anchor, the velocity and the replica's weights."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from keras import ops

from tf_blockmomentum import schedules
from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.boundary.exchange import means
from tf_blockmomentum.outer import momentum_step
from tf_blockmomentum.settings import Settings

_chosen = threading.local()


@contextlib.contextmanager
def only(ids: set[int]) -> Iterator[None]:
    """Inside, `trained_variables` and all that goes with them are those of these ids; for this
    thread, since another may trace what travels meanwhile."""
    _chosen.ids = ids
    try:
        yield
    finally:
        del _chosen.ids


class Blocks(Settings):
    """The part of `BlockMomentum` that starts and ends blocks, called by `BlockLoop`.

    All of it is about the variables with block momentum: those of the optimizer's through which
    updates go, and which the step does not assign as well (see `variables`).
    """

    # Made by BlockMomentum.
    inner_optimizer: Any
    outer_optimizer: Any
    inner_state: str
    overlap: float | bool
    _blocks: Any

    without_momentum: set[int] = frozenset()  # type: ignore[assignment]

    _anchors: list[Any]
    _global_step: Any
    _adapted: Any
    _sent: list[Any]
    _in_flight: Any
    _ahead: Any
    _initial_slots: list[tuple[Any, float]]
    _updated: set[int]

    @property
    def built_variables(self) -> list[Any]:
        """All variables it was built with."""
        return _keras.trained_variables(self)

    @property
    def updated(self) -> list[Any]:
        """Those through which an update has gone, in the steps traced so far."""
        return [v for v in self.built_variables if id(v) in self._updated]

    @property
    def trained_variables(self) -> list[Any]:
        """Those with block momentum; all, before the first step."""
        return self._of(self.built_variables)

    @property
    def anchors(self) -> list[Any]:
        """The global weights at the last boundary, in the order of `trained_variables`."""
        return self._of(self._anchors) if self.built else []

    @property
    def pairs(self) -> list[tuple[Any, Any]]:
        """Those with block momentum, each with its anchor."""
        return list(zip(self.trained_variables, self.anchors, strict=True))

    @property
    def shared_state(self) -> list[Any]:
        """Its variables that are the same on all replicas whenever no block has begun, besides
        the anchor: the velocity, counts of blocks and of steps, the learning rate."""
        others = [self._global_step, self._adapted] if self.scheduled else []
        rates = _keras.learning_rates(self.inner_optimizer)
        return [self._blocks, *others, *self.outer_optimizer.variables, *rates]

    def _of(self, variables: list[Any]) -> list[Any]:
        """From a list with one for each of the built variables, those with block momentum."""
        having = self._updated or {id(v) for v in self.built_variables}
        having = having - self.without_momentum
        part = getattr(_chosen, "ids", None)
        having = having if part is None else having & part
        return [x for x, v in zip(variables, self.built_variables, strict=True) if id(v) in having]

    def deltas(self, under_way: bool | None = None) -> list[tf.Tensor]:
        """How far this replica's weights have moved in this block, in replica context. With
        `overlap`: `under_way`, whether the block before has not landed yet, if it is known."""
        pairs = zip(self.trained_variables, self.begins(under_way), strict=True)
        return [tf.convert_to_tensor(w) - x for w, x in pairs]

    def end_block(self, sums: list[tf.Tensor], active: tf.Tensor, steps: tf.Tensor) -> None:
        """Ends a block in this replica: the outer step, and back to the anchor.

        Called by `BlockLoop` in replica context, if any replica took a step.

        Args:
            sums: of the replicas' deltas, a tensor for each variable with block momentum.
            active: how many replicas are in them.
            steps: the replicas' mean number of steps.
        """
        self.take_outer_step(sums, active)
        self._reset_inner_state()
        self._count_block(steps)

    def _count_block(self, steps: tf.Tensor) -> None:
        self._blocks.assign_add(1)
        if self.scheduled:
            self._global_step.assign_add(tf.cast(tf.round(steps), "int64"))

    def _reset_inner_state(self) -> None:
        if self.inner_state == "reset":
            for slot, initial in self._initial_slots:
                slot.assign(ops.full(slot.shape, initial, slot.dtype))

    def take_outer_step(self, sums: list[tf.Tensor], active: tf.Tensor) -> None:
        """Moves the anchor by the replicas' mean delta, and this replica to the anchor; the
        arguments are `end_block`'s."""
        self._move_anchor(sums, active)
        self.discard_block()

    @property
    def fused(self) -> bool:
        """Whether what a boundary does to each variable is one operation of TensorFlow's, so that
        nothing is gained by compiling it (`momentum_step`)."""
        plain = self.block_momentum is not None and self.inner_state != "reset"
        more = self._warm_up or self.measures_drift
        return plain and not more and all(w.constraint is None for w in self.trained_variables)

    def _move_anchor(self, sums: list[tf.Tensor], active: tf.Tensor) -> None:
        anchors = self.anchors
        if self.fused:
            momentum_step(self.outer_optimizer, anchors, sums, active)
            return
        d = means(sums, active)

        def rest() -> None:  # of the block momentum, while warming up
            for anchor, x in zip(anchors, d, strict=True):
                anchor.assign_add(x)

        def outer_step() -> None:
            self.outer_optimizer.apply([-x for x in d], anchors)  # v = beta v + d; anchor += v

        if self._warm_up:
            tf.cond(self._global_step < self._warm_up, rest, outer_step)
        else:
            outer_step()
        for w, anchor in zip(self.trained_variables, anchors, strict=True):
            if w.constraint is not None:
                anchor.assign(w.constraint(anchor))

    def velocities(self) -> list[Any]:
        """The velocity of each variable with block momentum, in the order of `anchors`; none
        without block momentum or with an `outer_optimizer` of the user's."""
        return [v for v in self._velocities() if v is not None] if self.block_momentum else []

    # -- overlap: the outer step comes within the next block ----------------------------------

    def keep_deltas(self, deltas: list[tf.Tensor]) -> None:
        """Ends a block in this replica: these are on their way from now on."""
        for x, delta in zip(self.sent, deltas, strict=True):
            x.assign(delta)
        self._in_flight.assign(True)

    def begin_next(self) -> None:
        """Begins the next block where the outer step to come would lead if all replicas' deltas
        were this one's, or where the replica is if that cannot be foretold."""
        self._reset_inner_state()
        beta, zeta = self.block_momentum, self.block_learning_rate
        if beta is None or zeta is None:  # an outer optimizer
            ahead = (0.0, 1.0)
        elif self.nesterov:  # beta (beta v + zeta delta) + zeta delta
            ahead = (beta * beta, (beta + 1) * zeta)
        else:
            ahead = (beta, zeta)
        self._ahead.assign(ahead)
        for w, x in zip(self.trained_variables, self.begins(under_way=True), strict=True):
            w.assign(x)

    @property
    def steps_aside(self) -> bool:
        """Whether what a mean that lands within a block changes of this replica's weights can be
        told before the outer step (`step_aside`): it is then one pass over them, and not two."""
        constrained = any(w.constraint is not None for w in self.trained_variables)
        return self.block_momentum is not None and not self._warm_up and not constrained

    def step_aside(self, d: list[tf.Tensor] | None) -> None:
        """Before the outer step of the block before lands within the next one, in place of
        `step_off` and `step_on`: anchor + (w_j - start_j), which is w_j + (v - what was foretold).

        Args:
            d: the means that land, or None if nothing does.
        """
        self._in_flight.assign(False)
        beta, zeta = self.block_momentum, self.block_learning_rate
        steps = [-foretold for foretold in self._foretold()]
        if d is not None:
            for i, (v, mean) in enumerate(zip(self._velocities(), d, strict=True)):
                velocity = zeta * mean if v is None else beta * v + zeta * mean
                steps[i] += beta * velocity + zeta * mean if self.nesterov else velocity
        for w, step in zip(self.trained_variables, steps, strict=True):
            w.assign_add(step)

    def step_off(self) -> None:
        """Before the outer step of the block before lands within the next one: what this replica
        has moved since that began takes the place of its weights."""
        for w, delta in zip(self.trained_variables, self.deltas(under_way=True), strict=True):
            w.assign(delta)

    def land(self, sums: list[tf.Tensor], active: tf.Tensor, steps: tf.Tensor) -> None:
        """The outer step of the block before; the arguments are `end_block`'s."""
        self._move_anchor(sums, active)
        self._count_block(steps)

    def step_on(self) -> None:
        """After it: w_j = anchor + (w_j - start_j). What was moved meanwhile belongs to the delta
        of this block."""
        self._in_flight.assign(False)
        for w, anchor in zip(self.trained_variables, self.anchors, strict=True):
            value = ops.add(anchor, w)
            w.assign(value if w.constraint is None else w.constraint(value))

    @property
    def sent(self) -> list[Any]:
        """This replica's deltas in flight, a variable for each one with block momentum."""
        return self._of(self._sent)

    @property
    def in_flight(self) -> bool:
        """Whether there are any, a bool."""
        return bool(self.overlap and self._in_flight.numpy())

    @property
    def under_way(self) -> tf.Tensor:
        """As `in_flight`, in replica context: a tensor."""
        return ops.convert_to_tensor(self._in_flight)

    def _velocities(self) -> list[Any]:
        """The velocity of each variable with block momentum, or None where there is none."""
        outer, anchors = self.outer_optimizer, self.anchors
        if self.block_momentum is None or not outer.momentums:
            return [None] * len(anchors)
        return [outer.momentums[_keras.index_of(outer, a)] for a in anchors]

    def _foretold(self) -> list[tf.Tensor]:
        """How far from the anchor this replica began the block, the block before being under
        way: what that one's outer step was foretold to be."""
        # As they were when the block began: they may have been set since.
        of_velocity, of_sent = tf.unstack(ops.convert_to_tensor(self._ahead))
        steps = []
        for sent, v in zip(self.sent, self._velocities(), strict=True):
            sent = ops.convert_to_tensor(sent)
            step = tf.cast(of_sent, sent.dtype) * sent
            if v is not None:
                step = tf.cast(of_velocity, sent.dtype) * ops.convert_to_tensor(v) + step
            steps.append(step)
        return steps

    def begins(self, under_way: bool | None = None) -> list[Any]:
        """Where this replica began the block, in replica context: until the mean of the block
        before has landed start_j, which its state tells, and from then on the anchor. If it is
        known which, `under_way` spares the passes over what the other would take."""
        if not self.overlap or under_way is False:
            return list(map(ops.convert_to_tensor, self.anchors))
        begins, in_flight = [], self.under_way
        for w, anchor, step in zip(
            self.trained_variables, self.anchors, self._foretold(), strict=True
        ):
            anchor = ops.convert_to_tensor(anchor)
            begin = anchor + step
            if w.constraint is not None:
                begin = w.constraint(begin)
            begins.append(begin if under_way else tf.where(in_flight, begin, anchor))
        return begins

    def drift(self, d: list[tf.Tensor], square: tf.Tensor) -> tf.Tensor:
        """The drift, or 0 where it is not measured.

        Args:
            d: the mean delta.
            square: the replicas' mean square norm of theirs.
        """
        if not self.measures_drift:
            return tf.constant(0.0)
        spread = tf.maximum(square - square_norm(d), 0)  # mean |w_j|^2 - |mean w|^2
        return tf.sqrt(tf.math.divide_no_nan(spread, square_norm(self.anchors)))

    @property
    def averaged_state(self) -> list[Any]:
        """Variables of the inner optimizer that are averaged at a boundary."""
        return _keras.slots(self.inner_optimizer) if self.inner_state == "average" else []

    # -- how long a block is -----------------------------------------------------------------

    @property
    def scheduled(self) -> bool:
        """Whether `sync_period` is a schedule."""
        return not isinstance(self.sync_period, int)

    @property
    def _warm_up(self) -> int:
        return getattr(self.sync_period, "warm_up", 0)

    @property
    def measures_drift(self) -> bool:
        """Whether the schedule of `sync_period` wants to know the drift."""
        return getattr(self.sync_period, "measures_drift", False)

    @property
    def warming_up(self) -> bool:
        """Whether the block that begins is a step of a synchronous warm start."""
        return self._warm_up > 0 and int(self._global_step.numpy()) < self._warm_up

    @property
    def reads_rate(self) -> bool:
        """Whether the schedule of `sync_period` wants to know the inner learning rate."""
        return getattr(self.sync_period, "reads_rate", False)

    @property
    def period(self) -> int:
        """K of the block that begins where all blocks have landed, an int."""
        return self.period_after(0)

    def period_after(self, steps: int) -> int:
        """K of the block that begins after so many steps of blocks that have not landed."""
        if isinstance(self.sync_period, int):
            return self.sync_period
        begins, adapted = int(self._global_step.numpy()) + steps, int(self._adapted.numpy())
        if not self.reads_rate:
            return schedules.period_of(self.sync_period, begins, adapted)
        if steps or not adapted:  # the block begins
            rate = _keras.rate_of(self.inner_optimizer)
            adapted = schedules.period_of(self.sync_period, begins, adapted, rate)
            if not steps:  # in a variable, for a backup in the middle of it
                self._adapted.assign(adapted)
        return adapted

    def adapt_period(self, period: int, steps: int, drift: float) -> None:
        """Tells the schedule of a block that has ended, `steps` of its `period` long."""
        if self.reads_rate:
            self._adapted.assign(0)
        elif self.measures_drift and steps:
            before = int(self._adapted.numpy())
            begun = int(self._global_step.numpy()) - steps
            schedule: Any = self.sync_period
            adapted = schedule.adapt(begun, period, drift)
            self._adapted.assign(adapted if steps >= period else min(adapted, before))

    def restart_block(self) -> None:
        """Takes the present weights for the anchor, on every replica of this worker: they
        may have been set or loaded since the last boundary."""
        if self.overlap:
            self._in_flight.assign(False)
        for w, anchor in zip(self.built_variables, self._anchors, strict=True):
            if anchor is not None:
                anchor.assign(w)
                w.assign(anchor)

    def discard_block(self) -> None:
        """Takes the anchor for the present weights: the reverse of `restart_block`."""
        if self.overlap:
            self._in_flight.assign(False)
        for w, anchor in zip(self.trained_variables, self.anchors, strict=True):
            w.assign(anchor)


def square_norm(tensors: Sequence[Any]) -> tf.Tensor:
    """The sum of the squares of all their elements, in float32."""
    return tf.add_n([tf.reduce_sum(tf.square(tf.cast(t, tf.float32))) for t in tensors])


def square_sum(tensors: Sequence[Any]) -> tf.Tensor:
    """As `square_norm`, in one pass without XLA."""
    return tf.add_n([2 * tf.nn.l2_loss(tf.cast(t, tf.float32)) for t in tensors])


def inner_product(tensors: Sequence[Any], others: Sequence[Any]) -> tf.Tensor:
    """The sum of the products of their elements, in float32 and in one pass without XLA."""
    products = []
    for t, o in zip(tensors, others, strict=True):
        row, column = tf.reshape(t, [1, -1]), tf.reshape(o, [-1, 1])
        products.append(tf.cast(row, tf.float32) @ tf.cast(column, tf.float32))
    return tf.squeeze(tf.add_n(products))
