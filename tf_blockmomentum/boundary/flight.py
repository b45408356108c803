"""Overlap: what is under way, and when it lands."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_blockmomentum.boundary.boundary import TOLD, Boundary
from tf_blockmomentum.boundary.packing import pack


class OverlappedBoundary(Boundary):
    """What a replica does at a boundary with `overlap`: it leaves, and lands later."""

    def begin(self, sums: list[tf.Tensor]) -> None:
        """With `overlap`: lands the block before (`sums`, if there was one), begins the next."""
        if sums:
            self.land(sums)

        def begin_next() -> None:
            for optimizer in self._optimizers:
                optimizer.begin_next()

        self._compiled(begin_next)()
        self._heal()

    def send_again(self) -> list[tf.Tensor]:
        """What was in flight when a backup was written; no data had ended."""
        taking_part, stopping, steps, first = tf.unstack(tf.convert_to_tensor(self._sent_counts))
        tensors = [x for optimizer in self._optimizers for x in optimizer.sent]
        tensors += self.statistics
        tensors = [tf.cast(t, s.dtype) for t, s in zip(tensors, self._wire_specs, strict=True)]
        told = tf.cast([stopping if name == "stopping" else 0 for name in TOLD], tf.float32)
        return self._attach(pack(tensors), self._header(told, taking_part > 0, steps, first, 0.0))

    def land(self, sums: list[tf.Tensor], flush: tf.Tensor | None = None) -> None:
        """The outer step of the block before; with `flush` (None: never) this replica to the
        anchor, and the statistics' means. Without it they go on as they are: moving averages of
        a replica's own may be averaged at any later time with the same result."""
        sums, header = self._detach(sums)
        numbers = self.header.read(header)

        def outer_step(sums: list[tf.Tensor], header: tf.Tensor) -> None:
            for optimizer, its_d in self._by_optimizer(self._means(sums, header)[0]):
                optimizer.land(its_d)

        step = self._compiled(outer_step)
        tf.cond(numbers["active"] > 0, lambda: step(sums, header), lambda: None)
        if flush is not None:
            for optimizer in self._optimizers:
                optimizer.discard_block()
        if not self.statistics or (flush is None and not self._skip_nonfinite):
            return
        for v, value in zip(self.statistics, self._means(sums, header)[1], strict=True):
            own = tf.convert_to_tensor(v)
            if flush is not None:
                v.assign(tf.where(tf.logical_and(flush, numbers["finite"] > 0), value, own))
            else:
                v.assign(tf.where(tf.math.is_finite(own), own, value))


class Flight:
    """A block's deltas on their way to the other replicas, as the host sees them."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # started when first used
        self._flight: concurrent.futures.Future | None = None

    @property
    def under_way(self) -> bool:
        """Whether deltas are on their way."""
        return self._flight is not None

    def depart(self, transport: Callable, packs: Any) -> None:
        """Starts the all-reduce. All workers start theirs in the same order, and no other
        collective before this one has arrived: nothing else communicates within an epoch."""
        if tf.config.functions_run_eagerly():  # a setting of the process, not of a thread
            self._flight = concurrent.futures.Future()
            self._flight.set_result(transport(packs))
        else:
            self._flight = self._thread.submit(transport, packs)

    def wait(self) -> None:
        """Until it has arrived."""
        assert self._flight is not None
        self._flight.result()

    def arrive(self) -> Any:
        """Waits for what the all-reduce returns; nothing is on its way from then on."""
        assert self._flight is not None
        flight, self._flight = self._flight, None
        return flight.result()

    def drop(self) -> None:
        """Forgets what is on its way, once it has arrived: others communicate next."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.exception()
