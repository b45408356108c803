"""The end of a block as the host sees it: what is called, what is in flight, what was told."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.boundary.agreement import Agreement
from tf_blockmomentum.boundary.boundary import Boundary
from tf_blockmomentum.boundary.exchange import gather
from tf_blockmomentum.boundary.flight import Flight, OverlappedBoundary
from tf_blockmomentum.boundary.header import TOLD, checksum
from tf_blockmomentum.boundary.nonfinite import complain, describe
from tf_blockmomentum.boundary.observer import Observer, called_by_host
from tf_blockmomentum.boundary.together import check_anchors, check_steps_alike
from tf_blockmomentum.landing import landing_step
from tf_blockmomentum.strategy import meeting, replicas_of, worker_of
from tf_blockmomentum.variables import Rules

_CHECK = 64  # boundaries from one comparison of the anchors to the next


class Ending:
    """Ends blocks, on this worker as on all others.

    Args:
        optimizers: the BlockMomentum optimizers.
        wrappers: them as the user has them, perhaps with loss scaling around them.
        strategy: of which the replicas are.
        averaged: variables that are averaged whatever the step does with them.
        jit: whether XLA compiles what does not communicate.
        on_nonfinite: "raise", "skip", or "stop", which stops all workers without an error.
    """

    def __init__(
        self,
        optimizers: list[Any],
        wrappers: Iterable[Any],
        strategy: tf.distribute.Strategy,
        averaged: Iterable[Any],
        jit: bool,
        on_nonfinite: str,
    ) -> None:
        self._optimizers = optimizers
        self._strategy = strategy
        self.on_nonfinite = on_nonfinite
        self.rules = Rules(optimizers, wrappers, averaged)
        skip = on_nonfinite == "skip"
        kind = OverlappedBoundary if optimizers[0].overlap else Boundary
        self.replica = kind(optimizers, strategy, self.rules, jit, skip)
        self.agreement = Agreement(optimizers, strategy, self.rules)
        self._known: tuple[Any, ...] | None = None  # what the compiled functions were made for
        self.flight = Flight()
        self._periods_known: list[int] | None = None
        self._boundaries = 0
        self._anchor_told = 0
        self._settled = True
        self._uneven = False  # whether replicas have taken unlike numbers of steps
        self._differing = False  # whether anchors were set to unlike values
        self.weights_set = False  # on this worker, between steps, since the last boundary
        self.ended = 0  # replicas whose data had ended at the last boundary
        self.stopping = False  # whether a worker has asked all to stop
        self.leaving = False  # whether a worker has asked all to end the process
        self.skipped = 0
        self.drift = 0.0
        self.observer = Observer()

    # -- what is compiled ---------------------------------------------------------------------

    def ready(self) -> None:
        """Makes what depends on the rules and on the optimizers' settings, if they are new."""
        measures = self.observer.measures
        known = (
            measures,
            self.rules.follow(),
            *(optimizer.version for optimizer in self._optimizers),
        )
        if known == self._known:
            return
        self._known = known
        replica, agreement = self.replica, self.agreement
        on_replicas = functools.partial(called_by_host, self._strategy, lambda: self.observer)
        replica.measuring.on = measures
        replica.ready()
        self.boundary = on_replicas(replica.boundary)
        self._settle = on_replicas(agreement.settle)
        self._align = on_replicas(agreement.align)
        self._average = on_replicas(agreement.average_anchors)
        self._moved = on_replicas(agreement.moved)
        self._go_back = on_replicas(agreement.go_back)
        if isinstance(replica, OverlappedBoundary):
            self._send = on_replicas(replica.leave)
            self._settle_parts = on_replicas(replica.settle_parts)
            self._transport = on_replicas(replica.transport)
            self._begin = on_replicas(replica.begin)
            self._land = on_replicas(replica.land)
            self._land_within = on_replicas(replica.land_within)
            self._land_statistics = on_replicas(replica.land_statistics)
            self._send_again = on_replicas(replica.send_again)

    def _first(self, values: Any) -> np.ndarray:
        return self._strategy.experimental_local_results(values)[0].numpy()

    @property
    def _local_replicas(self) -> int:
        return len(replicas_of(self.replica.steps, self._strategy))

    # -- the order of things ------------------------------------------------------------------

    @property
    def period(self) -> int:
        """K of the present block."""
        return self._periods[0] or self._optimizers[0].period

    @property
    def next_stop(self) -> int:
        """After how many local steps of the present block there is something to do here: what is
        under way lands, or the block ends."""
        period = self.period
        if not self.flight.under_way:
            return period
        return landing_step(self._optimizers[0].overlap, period)

    @property
    def _periods(self) -> list[int]:
        """K of the present block, and of the one in flight, where a schedule has been asked for
        them already. That is when a block begins, while the one before is in flight: all workers
        know the same then, and what lands within the block does not change it."""
        if not (self._optimizers[0].overlap and self._optimizers[0].scheduled):
            return [0, 0]
        if self._periods_known is None:  # asked for at every step: reading a variable is slow
            self._periods_known = self.replica.periods.numpy().tolist()
        return self._periods_known

    def _set_periods(self, present: int, under_way: int) -> None:
        self.replica.periods.assign([present, under_way])
        self._periods_known = [present, under_way]

    @property
    def all_ended(self) -> bool:
        """Whether the data of all replicas has ended, all of them knowing it."""
        return self.ended == self._strategy.num_replicas_in_sync

    def end(self, ended: bool, stopping: bool = False, leaving: bool = False) -> None:
        """The boundary. A replica whose data has ended goes on taking part, without steps,
        until the others' has ended too: all make the same number of boundaries."""
        self.ready()
        while True:
            progress.note("waits in a boundary")
            told = self._told(ended, stopping, leaving)
            self._settled = False
            if tf.config.functions_run_eagerly():
                changed = [*self.replica.travelling, *self.agreement.variables]
                stepped = any(optimizer.updated for optimizer in self._optimizers)
                check_steps_alike(changed, stepped, self._local_replicas, self._strategy)
            if self._optimizers[0].overlap:
                warming_up = self._optimizers[0].warming_up
                self.send_block(told)
                # Here all workers have landed the block before; one whose data has ended lands
                # this one at once, the others later.
                due = (self._boundaries + 1) % _CHECK == 0
                self._anchor_told = self._sum_of_anchors() if due else 0
                if ended or warming_up:  # a synchronous warm start
                    self.land(flush=warming_up)
            else:
                period = self._optimizers[0].period
                self._take_note(self.meet(told), period)
                self._put_right()
            self.forget_assignments()
            progress.note_block(lambda: self._optimizers[0].blocks)
            if not ended or self.all_ended:
                return

    def meet(self, told: tf.Tensor) -> np.ndarray:
        """Ends a block without overlap; returns the status."""
        with meeting(self._strategy, "the end of a block"):
            return self._first(self.boundary(told))

    def settle(self) -> None:
        """Before somebody looks at the variables: lands what is in flight, and makes all state
        that a boundary leaves alone the same on all replicas."""
        if self.flight.under_way:
            self.land(flush=True)
        if not self._settled and self.agreement.variables:
            with meeting(self._strategy, "a flush"):
                self._settle()
        self._settled = True

    def _told(self, ended: bool, stopping: bool, leaving: bool) -> tf.Tensor:
        """What this worker's replicas are to tell the others."""
        self._boundaries += 1
        anchor = 0
        if self._optimizers[0].overlap:
            anchor = self._sum_of_anchors() if self.weights_set else self._anchor_told
        elif ended or self.weights_set or self._boundaries % _CHECK == 0:
            anchor = self._sum_of_anchors()
        numbers: dict[str, float] = {
            "ended": ended,
            "stopping": stopping,
            "leaving": leaving,
            "set": self.weights_set,
            "anchor": anchor,
        }
        numbers |= dict.fromkeys(("busy", "stepping", "measuring"), 0.0)
        numbers |= self.observer.tell(self.replica)
        self.weights_set = False
        return tf.constant([float(numbers[name]) for name in TOLD])

    def _sum_of_anchors(self) -> int:
        return checksum(a for optimizer in self._optimizers for a in optimizer.anchors)

    def _take_note(self, status: np.ndarray, period: int | None = None) -> None:
        """Of what a boundary has told this worker."""
        numbers, self.drift = self.replica.header.read(status[:-1]), float(status[-1])
        active, self.ended = round(float(numbers["active"])), round(float(numbers["ended"]))
        steps = np.rint(numbers["steps"]).astype(int)
        self.observer.told(numbers, self.replica)
        if period:
            mean = round(int(steps.sum()) / max(active, 1))
            self._optimizers[0].adapt_period(period, mean, self.drift)
        self.stopping = self.stopping or numbers["stopping"] + numbers["leaving"] > 0
        self.leaving = self.leaving or bool(numbers["leaving"] > 0)
        self._uneven |= len(set(steps.tolist())) > 1
        self._differing |= check_anchors(numbers, self._strategy)
        if any(numbers["nonfinite"]):
            self._handle_nonfinite(np.rint(numbers["nonfinite"]).astype(int).tolist())

    def _handle_nonfinite(self, firsts: list[int]) -> None:
        if self.on_nonfinite == "stop":
            self.stopping = True
            return
        variables, blocks = self.replica.travelling, self._optimizers[0].blocks
        text = describe(firsts, variables, blocks, self.replica.limited)
        complain(text, firsts, self.on_nonfinite)
        self.skipped += sum(first > 0 for first in firsts)

    def _put_right(self) -> None:
        """What a boundary has shown, to all alike, to differ between the replicas."""
        if not (self._uneven or self._differing):
            return
        with meeting(self._strategy, "the end of a block"):
            if self._uneven:
                self._align()
            if self._differing:
                self._average()
        self._uneven = self._differing = False

    def forget_assignments(self) -> None:
        """Those of our own to the weights, which are not the user's."""
        for optimizer in self._optimizers:
            if optimizer.built:
                _keras.take_assigned(optimizer.built_variables)

    # -- overlap ------------------------------------------------------------------------------

    def send_block(self, told: tf.Tensor) -> None:
        """Ends a block: sends its deltas, lands those of the one before if they have not landed
        within it, and begins the next."""
        period = self.period
        sums, status = self._arrive() if self.flight.under_way else ([], None)
        if sums and self.replica.statistics:  # what is sent of them is of after their landing
            self._land_statistics(sums)
        self.flight.depart(self._transport, self._send(told, bool(sums)))
        drift = self._begin(sums)
        if status is not None:
            self._note_landing(status, drift)
        if self._optimizers[0].scheduled:
            self._set_periods(self._optimizers[0].period_after(period), period)

    def land_within(self) -> None:
        """Waits for what is under way, which lands here, within the next block."""
        progress.note("waits for a mean to land")
        sums, status = self._arrive()
        self._note_landing(status, self._land_within(sums))
        self.forget_assignments()
        progress.note("landed a mean")

    def land(self, flush: bool = False) -> None:
        """Waits for what is in flight, and goes to the anchor. `flush`, or that the data of
        all replicas has ended: all workers are here."""
        sums, status = self._arrive()
        ended = round(float(self.replica.header.read(status[:-1])["ended"]))
        flush = flush or ended == self._strategy.num_replicas_in_sync
        self._note_landing(status, self._land(sums))
        if flush:
            self._put_right()
            self._set_periods(0, 0)
        self.forget_assignments()

    def _note_landing(self, status: np.ndarray, drift: Any) -> None:
        if self._optimizers[0].measures_drift:
            status = np.append(status[:-1], self._first(drift))
        self._take_note(status, self._periods[1])

    def go_on(self) -> None:
        """Sends again what was in flight when the present state was written to a backup."""
        self._periods_known = None
        self.ready()
        if self._optimizers[0].in_flight:
            self.flight.depart(self._transport, self._send_again())
            self.flight.wait()  # others may communicate before the next step

    def drop(self) -> None:
        """Forgets a block that was interrupted, what is on its way, and what was set."""
        self.weights_set = self._uneven = self._differing = False
        self.flight.drop()
        self.replica.steps.assign(0)
        self._set_periods(0, 0)

    def _arrive(self) -> tuple[Any, np.ndarray]:
        self.ready()  # what was set meanwhile is for the outer step to come
        with self.observer.span("wait"), meeting(self._strategy, "the end of a block"):
            sums, status = self.flight.arrive()
            status = self._first(status)
        if self.replica.parts:
            self._settle_parts(sums)
        bad = any(self.replica.header.read(status[:-1])["nonfinite"])
        if bad and self.on_nonfinite == "raise":
            self._land(sums)
            self._take_note(status)  # raises
        return sums, status

    # -- weights that somebody else has set ----------------------------------------------------

    def set_between(self) -> list[Any]:
        """The trained variables that are not at the anchor, where no block has begun: on all
        replicas they become the new anchor."""
        self.ready()
        moved = self._first(self._moved())
        variables = [v for o in self._optimizers for v in o.trained_variables]
        return [v for v, changed in zip(variables, moved, strict=True) if changed]

    def go_back(self, variables: Iterable[Any]) -> None:
        """To where the block began, as if these had not moved in it."""
        self.ready()
        these = {id(v) for v in variables}
        trained = [v for o in self._optimizers for v in o.trained_variables]
        self._go_back([tf.constant(id(v) in these) for v in trained])

    # -- agreeing ------------------------------------------------------------------------------

    def largest(self, number: int) -> int:
        """The largest of the numbers that the workers give; all ask alike."""
        if worker_of(self._strategy)[1] == 1:
            return number
        rows = [[number]] * self._local_replicas
        with meeting(self._strategy, "the end of an epoch"):
            return int(gather(self._strategy, rows).max())
