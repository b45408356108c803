"""A boundary in the replica: leave, exchange, land.

The weights pass through memory as seldom as the arithmetic allows. XLA computes each output of a
function from the function's inputs alone, so what two outputs share is computed, and its inputs
are read, twice: hence several small compiled functions.
"""

from typing import Any

import tensorflow as tf

from tf_blockmomentum.boundary.exchange import means, share_of, sum_packs
from tf_blockmomentum.boundary.nonfinite import make_finite
from tf_blockmomentum.boundary.packing import members, unpack
from tf_blockmomentum.boundary.sending import Sending


class Boundary(Sending):
    """What a replica does at a boundary. Made as `Sending` is."""

    # -- the order of things, without overlap -------------------------------------------------

    def boundary(self, told: tf.Tensor) -> tf.Tensor:
        """Ends this replica's block. Returns the status: the summed header, and the drift."""
        packs, left = self.measuring.timed(self.leave(told))
        sums, arrived = self.measuring.timed(self._sum(packs))
        self.measuring.note_times(left, arrived)
        self.settle_parts(sums)
        sums, header = self.header.detach(self._decoded(sums))
        self._measure(sums, header)
        come_back = self._unless_fused(self._come_back)
        some = self.header.read(header)["active"] > 0
        drift = tf.cond(some, lambda: come_back(sums, header), lambda: 0.0)
        self._heal()
        return tf.concat([header, [drift]], axis=0)

    def _measure(self, sums: list[tf.Tensor], header: tf.Tensor) -> None:
        self.measuring.measure(
            lambda *args: self._by_optimizer(self._means(*args)),
            self.header.read,
            sums,
            header,
        )

    def _come_back(self, sums: list[tf.Tensor], header: tf.Tensor) -> tf.Tensor:
        """The outer step, and this replica to the anchor. Returns the drift."""
        deltas, numbers = self._deltas(sums), self.header.read(header)
        statistics = unpack(self._statistics(sums, header), self._packed_statistics)
        active, share = numbers["active"], share_of(numbers["active"])
        drift = self._drift(deltas, numbers)
        for optimizer, own in self._by_optimizer(deltas):
            optimizer.end_block(own, active, tf.reduce_sum(numbers["steps"]) * share)
        for v, value in zip(self.statistics, statistics, strict=True):
            v.assign(value)
        return drift

    def _drift(self, sums: list[tf.Tensor], numbers: dict[str, Any]) -> tf.Tensor:
        """The drift, or 0 where it is not measured, from sums of deltas and the header's."""
        first, active = self._optimizers[0], numbers["active"]
        if not first.measures_drift:
            return tf.constant(0.0)
        return first.drift(means(sums, active), numbers["square"] * share_of(active))

    def _heal(self) -> None:
        """Once the weights are finite again, the inner state of a replica that was left out."""
        if self._skip_nonfinite:

            def heal() -> None:
                for optimizer in self._optimizers:
                    make_finite(optimizer)

            tf.cond(self._sent_counts[3] > 0, heal, lambda: None)

    def transport(self, packs: list[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The all-reduce. Returns the sums and, for the host, the status."""
        sums = self._sum(packs)
        return sums, tf.concat([self.header.detach(sums)[1], [0.0]], axis=0)

    def _decoded(self, sums: list[tf.Tensor]) -> list[tf.Tensor]:
        """What `_sum` returned, with the sums in place of their codes; they may be already. Not
        within the outer step, where XLA would decode once for each of its results."""
        if self._feedback and sums[0].dtype == tf.int32:
            return [*self._feedback.values(sums[0]), *sums[2:]]
        return sums

    def settle_parts(self, sums: list[tf.Tensor]) -> None:
        """Once a sum of codes has arrived, and before the next is made: what its owner keeps back
        of it, unless nobody was in it, so that it does not land."""
        for part in self.parts:
            some = self.header.read(self.header.detach(sums)[1])["active"] > 0
            tf.cond(some, lambda part=part: part.assign(sums[1]), lambda part=part: part + 0)

    # -- on the wire --------------------------------------------------------------------------

    def _sum(self, packs: list[tf.Tensor]) -> list[tf.Tensor]:
        """Sums what `leave` returned over the replicas, but for codes: their sum in codes, and
        what its owner keeps back of it."""
        self.measuring.count_bytes(packs)
        if self._feedback:
            return [*self._feedback.sum(packs[0]), *sum_packs(packs[1:])]
        return sum_packs(packs)

    def _deltas(self, sums: list[tf.Tensor]) -> list[tf.Tensor]:
        """The sums of the deltas, from what has arrived and was decoded, without the header."""
        sums = sums[: len(sums) - self._statistic_packs]
        if not self._feedback:
            sums = unpack(sums, self._packed_weights)
        return [tf.cast(x, v.dtype) for x, v in zip(sums, self.trained, strict=True)]

    def _statistics(self, sums: list[tf.Tensor], header: tf.Tensor) -> list[tf.Tensor]:
        """The means of the statistics, still packed, from what has arrived, decoded or not; the
        summed header says of how many replicas they are."""
        numbers = self.header.read(header)
        replicas = numbers["finite" if self._overlap else "active"]
        return means(sums[len(sums) - self._statistic_packs :], replicas)

    @property
    def _statistic_packs(self) -> int:
        """How many of the tensors that arrive are of statistics: the last ones."""
        return len(members(self._packed_statistics))

    def _means(self, sums: list[tf.Tensor], header: tf.Tensor) -> list[tf.Tensor]:
        """The means of the deltas."""
        return means(self._deltas(sums), self.header.read(header)["active"])
