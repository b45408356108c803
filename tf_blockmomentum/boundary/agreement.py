"""Before somebody looks: what boundaries leave alone becomes the same on all replicas."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.boundary.exchange import share_of, sum_over_replicas, zero_unless
from tf_blockmomentum.variables import FIRST, MAXIMUM, MINIMUM, ROUNDED, SUM, Rules


class Agreement:
    """What a replica does to have the same state as all others.

    Args:
        optimizers: the BlockMomentum optimizers, whose blocks end together.
        strategy: of which the replicas are.
        rules: what becomes of the variables that are none of the optimizers'.
    """

    def __init__(
        self, optimizers: list[Any], strategy: tf.distribute.Strategy, rules: Rules
    ) -> None:
        self._optimizers = optimizers
        self._strategy = strategy
        self._rules = rules

    @property
    def variables(self) -> list[Any]:
        """Those that `settle` makes the same on all replicas."""
        return [*self._averages, *self._rules.of(SUM, FIRST, MAXIMUM, MINIMUM, ROUNDED)]

    @property
    def _averages(self) -> list[Any]:
        """The inner optimizers' moving averages of the weights. Their mean may be taken at any
        later time with the same result, so it is before somebody looks at them."""
        return [
            average
            for optimizer in self._optimizers
            for average, _ in _keras.moving_averages(optimizer.inner_optimizer)
        ]

    @property
    def _trained(self) -> list[Any]:
        return [v for optimizer in self._optimizers for v in optimizer.trained_variables]

    def settle(self) -> None:
        """Makes the rest of the state the same on all replicas, by each variable's rule."""
        rules, replicas = self._rules, self._strategy.num_replicas_in_sync
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        mean, total, first = self._averages, rules.of(SUM), rules.of(FIRST)
        extrema = [(v, tf.reduce_max) for v in rules.of(MAXIMUM)]
        extrema += [(v, tf.reduce_min) for v in rules.of(MINIMUM)]
        only_first = [zero_unless(tf.equal(replica, 0), v) for v in first]
        plain = [tf.convert_to_tensor(v) for v in [*mean, *total]]
        rounded = rules.of(ROUNDED)
        wide = [tf.cast(v, tf.float64) for v in rounded]
        sums = iter(sum_over_replicas([*plain, *only_first, *wide]))
        largest = self._extrema(extrema)
        for v in mean:
            v.assign(next(sums) * share_of(replicas, v.dtype))
        for v, start in zip(total, rules.starts, strict=True):
            value = next(sums) - (replicas - 1) * tf.convert_to_tensor(start)
            v.assign(value)
            start.assign(value)
        for v in first:
            v.assign(next(sums))
        for v in rounded:
            v.assign(tf.cast(tf.round(next(sums) / replicas), v.dtype))
        for (v, _), value in zip(extrema, largest, strict=True):
            v.assign(value)

    def _extrema(self, wanted: list[tuple[Any, Callable[..., Any]]]) -> list[tf.Tensor]:
        """The largest or smallest value on any replica, by the function beside the variable."""
        place = tf.equal(
            tf.range(self._strategy.num_replicas_in_sync),
            tf.distribute.get_replica_context().replica_id_in_sync_group,
        )
        rows = [
            tf.where(tf.reshape(place, [-1] + [1] * len(v.shape)), v, tf.zeros([], v.dtype))
            for v, _ in wanted
        ]
        sums = sum_over_replicas(rows)
        return [reduce(row, axis=0) for row, (_, reduce) in zip(sums, wanted, strict=True)]

    def align(self) -> None:
        """Gives the inner optimizers' counts of steps the largest value of any replica, so that
        schedules give all the same learning rate."""
        counters = [v for o in self._optimizers for v in _keras.counters(o.inner_optimizer)]
        largest = self._extrema([(v, tf.reduce_max) for v in counters])
        for v, value in zip(counters, largest, strict=True):
            v.assign(value)

    def average_anchors(self) -> None:
        """Anchors that were set to unlike values become their means; so does this replica."""
        anchors = [a for optimizer in self._optimizers for a in optimizer.anchors]
        replicas = self._strategy.num_replicas_in_sync
        sums = sum_over_replicas(list(map(tf.convert_to_tensor, anchors)))
        for v, anchor, total in zip(self._trained, anchors, sums, strict=True):
            anchor.assign(total * share_of(replicas, anchor.dtype))
            v.assign(anchor)

    def go_back(self, which: list[tf.Tensor]) -> None:
        """This replica to where it began the block, for the variables that `which` says."""
        begins = [x for optimizer in self._optimizers for x in optimizer.begins()]
        for v, begin, back in zip(self._trained, begins, which, strict=True):
            v.assign(tf.where(back, begin, v))

    def moved(self) -> tf.Tensor:
        """For each trained variable whether it is not at the anchor."""
        anchors = [a for optimizer in self._optimizers for a in optimizer.anchors]
        pairs = zip(self._trained, anchors, strict=True)
        return tf.stack([tf.reduce_any(tf.not_equal(v, a)) for v, a in pairs])
