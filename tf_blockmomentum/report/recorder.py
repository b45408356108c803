"""Where the time of a block goes, on this worker and, as its header says, on the others."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tf_blockmomentum.boundary.observer import Observer

STEPS, FLIGHT, WAIT = "steps", "transport", "wait"
_BETWEEN = "validation", "backup"  # blocks
_DEPART = "leave", "send_again"  # after which a flight begins
_LARGE = 100_000  # weights; measuring those takes time,
_OFTEN, _SELDOM = 8, 32  # so only every so many blocks, and after some
_MANY = 64  # even more seldom


@dataclasses.dataclass
class Block:
    """One block and its boundary. Seconds are this worker's, but for `stepping` and `waits`."""

    steps: int  # the longest of the replicas'
    boundary: float  # seconds in which this worker does nothing else
    passes: float  # of those, over its weights
    waiting: float  # for the slowest worker
    transfer: float  # from when the slowest has sent until all has arrived, hidden or not
    slowest: int | None  # which worker that was; None: not known
    waits: np.ndarray  # what each worker has waited for the slowest [workers]; NaN: not known
    stepping: np.ndarray  # of a local step [workers]; NaN: not known
    bytes: float  # that this worker sends
    drift: float  # NaN: not measured in this block, as the three that follow
    delta: float
    velocity: float
    cosine: float
    compiled: bool  # seconds of the first calls are not among those above
    at: float  # when it had arrived
    compiling: float  # seconds of the epoch until then in calls that traced or compiled


@dataclasses.dataclass
class Span:
    """Something that took time; `begin` and `end` by this worker's clock."""

    name: str
    begin: float
    end: float
    block: int


class Recorder(Observer):
    """Listens to a loop on one worker.

    A boundary's all-reduce ends at the same time on all workers, but for milliseconds. So the
    seconds from there to the next boundary, which each worker tells in the header, say who came
    last, without clocks that agree.

    Args:
        worker: which of how many this one is.
        workers: how many.
        keeps_spans: whether spans are kept, for a timeline.
    """

    measures = True

    def __init__(self, worker: int, workers: int, keeps_spans: bool = False) -> None:
        self._worker, self._workers = worker, workers
        self._keeps_spans = keeps_spans
        self.blocks: list[Block] = []  # since `take`
        self.spans: list[Span] = []
        self.marks: list[tuple[int, float]] = []  # (block, when its all-reduce ended)
        self._began: float | None = None  # when an epoch's first step did
        self._compiling = 0.0  # seconds of it in calls that traced or compiled
        self._fresh = True  # until the epoch's first boundary
        self._lock = threading.Lock()
        self._number = 0  # of the present block
        self._arrived: float | None = None  # when the last all-reduce had ended
        self._flight: tuple[float, float | None] | None = None  # begin and end of the last one
        self._flights = 0
        self._landed: tuple[float, float | None] | None = None  # of the one last waited for
        self._stepping = 0.0
        self._traced = False  # whether steps of this block were
        self._compiled = False  # whether its boundary was
        self._since: dict[str, float] = {}  # seconds by name, since the last block was told
        self._boundary: tuple[float, float] | None = None
        self._wait: tuple[float, float] | None = None

    # -- called by the loop -----------------------------------------------------------------------

    @contextlib.contextmanager
    def span(self, name: str, traces: Callable[[], int] | None = None) -> Iterator[None]:
        before = traces() if traces else 0
        begin = time.perf_counter()
        if name == STEPS and self._began is None:
            self._began, self._since = begin, {}
        number = self._number + (name == STEPS)
        if name == FLIGHT:  # the host may be at the end of the next block already
            self._flights += 1
            number = self._flights
        try:
            yield
        finally:
            end = time.perf_counter()
            traced = traces is not None and traces() != before
            self._note(name, begin, end, number, traced)

    def _note(self, name: str, begin: float, end: float, number: int, traced: bool) -> None:
        with self._lock:  # a flight is another thread's
            if self._keeps_spans:
                self.spans.append(Span(name, begin, end, number))
            if name == FLIGHT:
                self._flight = (begin, end)
                self._arrived = end
                self._mark(number, end)
                return
            if name in _BETWEEN:
                return
            if traced:
                self._traced |= name != "boundary"  # which ends with the all-reduce
                self._compiled |= name != STEPS
                self._compiling += end - begin
            elif name == STEPS:
                self._stepping += end - begin
            else:
                self._since[name] = self._since.get(name, 0.0) + end - begin
            if name in _DEPART:
                self._flight = (end, None)  # its thread may begin later
            if name == "boundary":
                self._boundary = (begin, end)
            elif name == WAIT:
                self._wait, self._landed = (begin, end), self._flight

    def tell(self, replica: Any) -> dict[str, float]:
        now = time.perf_counter()
        under_way = self._flight is not None and self._flight[1] is None
        busy = 0.0
        if under_way:
            busy = 1e-6  # the messages before are what is waited for
        elif self._arrived is not None and not self._traced and not self._fresh:
            busy = now - self._arrived
        stepping = 0.0 if self._traced else self._stepping
        self._stepping, self._traced, self._fresh = 0.0, False, False
        self._number += 1
        return {"busy": busy, "stepping": stepping, "measuring": self._is_measured(replica)}

    def _is_measured(self, replica: Any) -> bool:
        """All workers say the same: a norm needs all of them."""
        weights = sum(v.shape.num_elements() for v in replica.trained)
        every = _OFTEN if self._number <= _MANY else _SELDOM
        return weights < _LARGE or self._number % every == 0

    def told(self, numbers: Mapping[str, Any], replica: Any) -> None:
        by_worker = {
            name: np.asarray(numbers[name], float).reshape(self._workers, -1)
            for name in ("busy", "stepping", "steps")
        }
        busy, steps = by_worker["busy"][:, 0], by_worker["steps"].max(axis=1)
        known = bool((busy > 0).all())
        waits = busy.max() - busy if known else np.full(self._workers, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            stepping = by_worker["stepping"][:, 0] / steps
        stepping[~((stepping > 0) & np.isfinite(stepping))] = np.nan
        with self._lock:
            self._add(numbers, replica, waits, steps, stepping)

    def _add(
        self,
        numbers: Mapping[str, Any],
        replica: Any,
        waits: np.ndarray,
        steps: np.ndarray,
        stepping: np.ndarray,
    ) -> None:
        known = not np.isnan(waits).any()
        wait = float(waits[self._worker]) if known else 0.0
        boundary = self._split(self._boundary, replica) if self._boundary else None
        passes = blocked = waiting = transfer = 0.0
        compiled, self._compiled = self._compiled, False
        if compiled:
            pass  # seconds that come once say nothing of a boundary
        elif boundary is not None:
            passes, transfer = boundary
            blocked = passes + transfer
            waiting = min(wait, transfer)
            transfer -= waiting
        else:
            begin, end = self._landed or (0.0, 0.0)
            last = begin + wait  # when the slowest has sent
            transfer = max((end or last) - last, 0.0)
            since, until = self._wait or (0.0, 0.0)
            waiting = min(max(last - since, 0.0), until - since)
            blocked = sum(self._since.values())
            passes = blocked - self._since.get(WAIT, 0.0)
        measured = float(numbers["measuring"]) > 0
        values = replica.measuring.measured if measured else [np.nan] * 4
        replicas = len(numbers["steps"])
        if replicas == 1:
            values = [np.nan, *values[1:]]  # nobody to drift from
        self.blocks.append(
            Block(
                int(steps.max()), blocked, passes, waiting, transfer,
                int(waits.argmin()) if known else None, waits, stepping,
                2 * (replicas - 1) / replicas * replica.measuring.bytes,
                values[0], values[1], values[2], values[3],
                compiled, time.perf_counter(), self._compiling,
            )
        )  # fmt: skip
        self._since, self._boundary, self._wait = {}, None, None

    def _split(self, boundary: tuple[float, float], replica: Any) -> tuple[float, float]:
        """Seconds of a boundary in passes, and in the all-reduce."""
        begin, end = boundary
        offset = time.time() - time.perf_counter()  # TensorFlow's time stamps are of the day
        left, arrived = np.clip(np.asarray(replica.measuring.times) - offset, begin, end)
        self._arrived = float(arrived)
        self._mark(self._number, self._arrived)
        if self._keeps_spans:
            parts = [("leave", begin, left), ("land", arrived, end)]
            parts += [(FLIGHT, left, arrived), (WAIT, left, arrived)]
            self.spans += [Span(name, float(b), float(e), self._number) for name, b, e in parts]
        others = sum(self._since.values()) - self._since.get("boundary", 0.0)
        passes = (left - begin) + (end - arrived) + others
        return float(passes), float(arrived - left)

    def _mark(self, number: int, when: float) -> None:
        if self._keeps_spans:
            self.marks.append((number, when))

    # -- called by the report ---------------------------------------------------------------------

    def take(self) -> "Taken":
        """What there has been since the last time."""
        with self._lock:
            taken = Taken(self.blocks, self.spans, self.marks, self._began or 0.0)
            self.blocks, self.spans, self.marks = [], [], []
            self._began, self._compiling, self._fresh = None, 0.0, True
            return taken


@dataclasses.dataclass
class Taken:
    """What a recorder had."""

    blocks: list[Block]
    spans: list[Span]
    marks: list[tuple[int, float]]
    began: float  # when the first step did
