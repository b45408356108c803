"""For a report: when the parts of a boundary were over, and how far the deltas went."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_blockmomentum.algorithm import inner_product, square_sum
from tf_blockmomentum.boundary.exchange import share_of


class Measuring:
    """What a replica measures at a boundary; nothing unless it is `on`.

    Args:
        optimizers: the BlockMomentum optimizers, whose blocks end together.
        strategy: of which the replicas are.
    """

    def __init__(self, optimizers: list[Any], strategy: tf.distribute.Strategy) -> None:
        self._optimizers = optimizers
        self._strategy = strategy
        self.on = False
        self.bytes = 0  # that a replica gives to the all-reduce, once traced
        with strategy.scope():
            # The drift, the norms of mean delta and velocity, and their cosine; when all was
            # packed, and when the sums had arrived.
            self._measured = tf.Variable([0.0] * 4, trainable=False, name="measured")
            self._times = tf.Variable([0.0] * 2, False, dtype=tf.float64, name="times")

    @property
    def times(self) -> tuple[float, float]:
        """Without overlap: when the last block was packed, and when its sums had arrived; seconds
        of the day's clock, on this worker's first replica."""
        packed, arrived = self._local(self._times).tolist()
        return packed, arrived

    @property
    def measured(self) -> list[float]:
        """Of the last block that was measured: the drift, the norms of the mean delta and of the
        velocity before it, and their cosine."""
        return self._local(self._measured).tolist()

    def _local(self, variable: Any) -> Any:
        return self._strategy.experimental_local_results(variable)[0].numpy()

    def timed(self, packs: list[tf.Tensor]) -> tuple[list[tf.Tensor], Any]:
        """These, and when they were there; what is made of them comes later."""
        if not self.on:
            return packs, None
        with tf.control_dependencies(packs):
            now = tf.timestamp()
        with tf.control_dependencies([now]):
            return list(map(tf.identity, packs)), now

    def note_times(self, left: Any, arrived: Any) -> None:
        """As `timed` returned them."""
        if self.on:
            self._times.assign([left, arrived])

    def count_bytes(self, packs: list[tf.Tensor]) -> None:
        """Of what this replica gives to the all-reduce; when it is traced."""
        self.bytes = sum(flat.shape.num_elements() * flat.dtype.size for flat in packs)

    def measure(
        self,
        means: Callable[..., Any],
        read: Callable[..., Any],
        sums: list[tf.Tensor],
        header: tf.Tensor,
    ) -> None:
        """Before the outer step, from what it gets. Not in one function with it, where XLA would
        copy what the outer step overwrites, measured or not.

        Args:
            means: makes of sums and header the mean deltas, by optimizer.
            read: makes of the header its numbers by name.
        """
        if not self.on:
            return

        def measure(sums: list[tf.Tensor], header: tf.Tensor) -> None:
            pairs, numbers = means(sums, header), read(header)
            velocity, along = tf.constant(0.0), tf.constant(0.0)
            for optimizer, its_d in pairs:
                its_velocity = optimizer.velocities()
                if its_velocity:
                    velocity += square_sum(its_velocity)
                    along += inner_product(its_velocity, its_d)
            mean = square_sum([x for _, its_d in pairs for x in its_d])
            anchor = square_sum([a for o in self._optimizers for a in o.anchors])
            spread = tf.maximum(numbers["square"] * share_of(numbers["active"]) - mean, 0)
            drift = tf.math.divide_no_nan(spread, anchor)
            cosine = tf.math.divide_no_nan(along, tf.sqrt(mean) * tf.sqrt(velocity))
            roots = map(tf.sqrt, (drift, mean, velocity))
            self._measured.assign(tf.stack([*roots, cosine]))

        # Not by XLA: its sums of squares take many times as long as TensorFlow's on a CPU.
        measure = tf.function(measure, autograph=False)
        wanted = read(header)["measuring"] > 0
        tf.cond(wanted, lambda: measure(sums, header), lambda: None)
