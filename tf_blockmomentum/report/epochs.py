"""A run's epochs in numbers, lines and a table."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tf_blockmomentum.report.advice import Measured, percent
from tf_blockmomentum.report.recorder import Block


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What an epoch's blocks sum up to, on one worker."""

    number: int  # from 1
    boundaries: int
    bytes: float  # this worker has sent
    seconds: float  # of training that shares are of
    steps: int  # in those seconds
    period: float  # K: of a block, the median
    boundary: float  # share of the time in boundaries
    waiting: float  # share of the time waiting for the slowest worker
    waits: np.ndarray  # the same of each worker, NaN where not known
    steadily: np.ndarray  # as if each worker had waited in every block as in the median one
    slowest: int | None  # for which worker the others have waited most
    passes: float  # seconds of a boundary, mean
    transfer: float
    stepping: np.ndarray  # seconds of a local step of each worker, the median of its blocks
    drift: float
    delta: float
    velocity: float
    cosine: float

    @classmethod
    def of(cls, number: int, blocks: Sequence[Block], began: float) -> "Epoch":
        """Sums blocks up.

        Time is looked at from the end of the epoch's first block on, where all workers are in
        step: one comes later than another from validation or from its callbacks, or
        has to wait for its first batch. Of what compiled there is the count, not the time.
        """
        late = blocks[1:]
        begin, compiling = (blocks[0].at, blocks[0].compiling) if late else (began, 0.0)
        seconds = max(blocks[-1].at - begin - (blocks[-1].compiling - compiling), 1e-9)
        timed = [b for b in late or blocks if not b.compiled]
        waits = np.array([b.waits for b in timed if b.slowest is not None])
        waited = waits.sum(axis=0) if len(waits) else np.full_like(blocks[0].waits, np.nan)
        full = [b.steps for b in blocks if b.steps]
        return cls(
            number,
            len(blocks),
            sum(b.bytes for b in blocks),
            seconds,
            sum(b.steps for b in timed),
            float(np.median(full)) if full else math.nan,
            sum(b.boundary for b in timed) / seconds,
            sum(b.waiting for b in timed) / seconds,
            waited / seconds,
            medians(waits) * len(waits) / seconds if len(waits) else waited,
            int(waited.argmin()) if len(waits) else None,
            mean([b.passes for b in timed]),
            mean([b.transfer for b in timed]),
            medians(np.array([b.stepping for b in blocks])),
            *(mean([getattr(b, n) for b in blocks if b.steps])
              for n in ("drift", "delta", "velocity", "cosine")),
        )  # fmt: skip

    def line(self) -> str:
        """As in `12 boundaries, 31 MB sent, 4 % of the time in boundaries, drift 0.03`."""
        boundaries = "1 boundary" if self.boundaries == 1 else f"{self.boundaries} boundaries"
        parts = [boundaries]
        if self.workers > 1:
            parts.append(f"{size(self.bytes)} sent")
        share = f"{percent(self.boundary)} of the time in boundaries"
        # Of the time in boundaries: with overlap, a part of the others' waiting is hidden.
        if self.slowest is not None and self.workers > 1:
            if self.slowest == 0:
                waiting = max(np.delete(self.waits, 0))
                share += f" (the others wait for worker 0: {percent(waiting)})"
            else:
                share += f" ({percent(self.waiting)} waiting for worker {self.slowest})"
        parts.append(share)
        if self.workers > 1 and not math.isnan(self.drift):
            parts.append(f"drift {self.drift:.2g}")
        return ", ".join(parts)

    @property
    def workers(self) -> int:
        """How many."""
        return len(self.stepping)

    def logs(self) -> dict[str, float]:
        """The numbers for History."""
        values = {
            "boundaries": self.boundaries,
            "sent_bytes": self.bytes,
            "sync_period": self.period,
            "boundary_share": self.boundary,
            "waiting_share": self.waiting,
            "drift": self.drift,
            "delta_norm": self.delta,
            "velocity_norm": self.velocity,
            "velocity_cosine": self.cosine,
        }
        return {f"block_{name}": float(value) for name, value in values.items()}


_COLUMNS = "epoch", "blocks", "K", "step, ms", "boundaries", "waiting", "sent", "drift", "cosine"


def table(epochs: Sequence[Epoch]) -> str:
    """Epochs in rows, in columns of equal width."""
    rows = [_COLUMNS]
    for e in epochs:
        rows.append((
            str(e.number), str(e.boundaries), number(e.period), number(mean(e.stepping) * 1e3),
            percent(e.boundary), percent(e.waiting), size(e.bytes), number(e.drift),
            number(e.cosine),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def measured(
    epochs: Sequence[Epoch], overlap: bool, compression: str | None, beta: float | None
) -> Measured:
    """What advice is made of: the last half of the epochs, in which most has settled."""
    last = epochs[len(epochs) // 2 :]
    seconds = sum(e.seconds for e in last)

    def over_time(name: str) -> float:
        return sum(getattr(e, name) * e.seconds for e in last) / seconds

    steps = sum(e.steps for e in last)
    waits = np.array([e.steadily * e.seconds for e in last])
    bytes_ = sum(e.bytes for e in last) / max(sum(e.boundaries for e in last), 1)
    workers = last[0].workers
    return Measured(
        sync_period=mean([e.period for e in last]),
        boundaries=sum(e.boundaries for e in last),
        seconds_a_step=sum((1 - e.boundary) * e.seconds for e in last) / max(steps, 1),
        step_seconds=medians(np.array([e.stepping for e in last])).tolist(),
        boundary_share=over_time("boundary"),
        waiting_share=over_time("waiting"),
        waiting_shares=(means(waits) * len(last) / seconds).tolist(),
        passes=mean([e.passes for e in last]),
        transfer=mean([e.transfer for e in last]),
        bytes=bytes_ * workers / (2 * (workers - 1)) if workers > 1 else 0.0,
        overlap=overlap,
        compression=compression,
        beta=beta,
        drift=mean([e.drift for e in last]),
        delta=mean([e.delta for e in last]),
        velocity=mean([e.velocity for e in last]),
        cosine=mean([e.cosine for e in last]),
        epoch_steps=mean([e.boundaries * e.period for e in last]),
    )


def means(rows: np.ndarray) -> Any:
    """Of each column, without NaN."""
    return _quietly(np.nanmean, rows)


def medians(rows: np.ndarray) -> Any:
    """Of each column, without NaN."""
    return _quietly(np.nanmedian, rows)


def _quietly(function: Callable[..., Any], rows: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN
        return function(rows, axis=0)


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Without NaN; NaN of nothing."""
    return float(means(np.array([*values], float))) if len(values) else math.nan


def number(value: float) -> str:
    """Three digits, or a dash where it is not known."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def size(count: float) -> str:
    """As in `31 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 99.95 else f"{count:.0f} {unit}"
