"""Overlap: what is under way, and when it lands.

A block's deltas leave at its end (`leave`, `transport`), and the next block begins (`begin`). Its
local steps run while they travel. After `landing_step` of them the mean lands (`land_within`), and
the rest of the block runs without anything under way. A block that ends before that, or lasts just
as long, lands the mean where it ends: `begin`, once more, after its own deltas have left.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_blockmomentum.boundary.boundary import Boundary
from tf_blockmomentum.boundary.exchange import means, share_of, zero_unless
from tf_blockmomentum.boundary.header import TOLD
from tf_blockmomentum.boundary.packing import pack, unpack


class OverlappedBoundary(Boundary):
    """What a replica does at a boundary with `overlap`: it leaves, and lands later."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._sent_statistics: dict[int, tf.Variable] = {}

    def ready(self) -> None:
        super().ready()
        with self._strategy.scope():
            for v in self.statistics:
                if id(v) not in self._sent_statistics:
                    zeros = tf.zeros(v.shape, v.dtype)
                    copy = tf.Variable(zeros, False, dtype=zeros.dtype, name="sent")
                    self._sent_statistics[id(v)] = copy

    @property
    def of_this_block(self) -> list[Any]:
        return [*super().of_this_block, *self._sent_statistics.values()]

    def begin(self, sums: list[tf.Tensor]) -> tf.Tensor:
        """Begins the next block; `sums`: the outer step of the block before the one that has just
        left lands first. Returns its drift."""
        drift = self._outer_step(sums) if sums else tf.constant(0.0)

        def begin_next() -> None:
            for optimizer in self._optimizers:
                optimizer.begin_next()

        self._in_parts(begin_next)
        self._heal()
        return drift

    def land(self, sums: list[tf.Tensor]) -> tf.Tensor:
        """Lands a block where the next one has not begun: this replica goes to the anchor, and
        its statistics become their means. Returns the drift."""
        drift = self._outer_step(sums)
        for optimizer in self._optimizers:
            optimizer.discard_block()
        self._land_statistics(sums, tf.constant(False))
        return drift

    def land_within(self, sums: list[tf.Tensor]) -> tf.Tensor:
        """Lands a block within the next one: what this replica has moved in that is kept, and
        belongs to its next delta. Returns the drift."""
        if all(optimizer.steps_aside for optimizer in self._optimizers):
            drift = self._outer_step(sums, aside=True)
        else:

            def step_off() -> None:
                for optimizer in self._optimizers:
                    optimizer.step_off()

            def step_on() -> None:
                for optimizer in self._optimizers:
                    optimizer.step_on()

            self._in_parts(step_off)
            drift = self._outer_step(sums)
            self._in_parts(step_on)
        self.land_statistics(sums)
        return drift

    def land_statistics(self, sums: list[tf.Tensor]) -> None:
        """Statistics land as the weights do: the mean of what was sent, and what this replica has
        changed since."""
        self._land_statistics(sums, tf.constant(True))

    def _outer_step(self, sums: list[tf.Tensor], aside: bool = False) -> tf.Tensor:
        """The outer step of a block that has arrived. Returns the drift. `aside`: this replica
        goes on with the next block, and its weights move with what lands."""
        sums, header = self.header.detach(self._decoded(sums))
        self._measure(sums, header)
        numbers = self.header.read(header)
        active = numbers["active"]

        def outer_step(sums: list[tf.Tensor], numbers: dict[str, tf.Tensor]) -> tf.Tensor:
            active, share = numbers["active"], share_of(numbers["active"])
            drift = self._drift(sums, numbers)
            for optimizer, own in self._by_optimizer(sums):
                optimizer.land(own, active, tf.reduce_sum(numbers["steps"]) * share)
            return drift

        def step_aside(sums: list[tf.Tensor], active: tf.Tensor) -> None:
            for optimizer, d in self._by_optimizer(means(sums, active)):
                optimizer.step_aside(d)

        def stay() -> None:
            for optimizer in self._optimizers:
                optimizer.step_aside(None)

        def land() -> tf.Tensor:
            deltas = self._deltas(sums)
            if aside:  # not in one function with the outer step: XLA would copy the velocity
                self._in_parts(step_aside, deltas, active)
            return self._unless_fused(outer_step)(deltas, numbers)

        def nobody() -> tf.Tensor:
            if aside:
                self._in_parts(stay)
            return tf.constant(0.0)

        return tf.cond(active > 0, land, nobody)

    def _land_statistics(self, sums: list[tf.Tensor], begun: tf.Tensor) -> None:
        """`begun`: whether they have changed since they were sent."""
        if not self.statistics:
            return
        sums, header = self.header.detach(sums)
        some = self.header.read(header)["finite"] > 0
        own = pack(list(map(tf.convert_to_tensor, self.statistics)))
        sent = [tf.convert_to_tensor(self._sent_statistics[id(v)]) for v in self.statistics]
        landed = []
        for mean, x, y in zip(self._statistics(sums, header), own, pack(sent), strict=True):
            # Of one that was not finite nothing is kept; one that has become so since is found
            # at the next boundary.
            kept = tf.logical_and(begun, tf.math.is_finite(y))
            landed.append(tf.where(some, mean + zero_unless(kept, x - y), x))
        values = unpack(landed, self._packed_statistics)
        for v, value in zip(self.statistics, values, strict=True):
            v.assign(value)

    def _keep(self, steps: tf.Tensor, under_way: bool) -> None:
        super()._keep(steps, under_way)
        for v in self.statistics:
            self._sent_statistics[id(v)].assign(v)

    def send_again(self) -> list[tf.Tensor]:
        """What was in flight when a backup was written; no data had ended."""
        taking_part, stopping, steps, first = tf.unstack(tf.convert_to_tensor(self._sent_counts))
        finite = tf.equal(first, 0)
        codes, weights = self._sent_again()
        statistics = []
        for v in self.statistics:
            sent = tf.convert_to_tensor(self._sent_statistics[id(v)])
            statistics.append(zero_unless(finite, sent))
        if self._float16:
            weights = [tf.cast(x, tf.float16) for x in weights]
        told = tf.cast([stopping if name == "stopping" else 0 for name in TOLD], tf.float32)
        square = tf.convert_to_tensor(self._sent_square)
        header = self._header(told, taking_part > 0, steps, first, square)
        return [*codes, *self.header.attach([*pack(weights), *pack(statistics)], header)]


class Flight:
    """A block's deltas on their way to the other replicas, as the host sees them."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # started when first used
        self._flight: concurrent.futures.Future[Any] | None = None

    @property
    def under_way(self) -> bool:
        """Whether deltas are on their way."""
        return self._flight is not None

    def depart(self, transport: Callable[..., Any], packs: Any) -> None:
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
