"""Advice from what a run has measured: numbers in, sentences out, nothing where all is well."""

import dataclasses
import math
from collections.abc import Sequence

from tf_blockmomentum.cost import COMPRESSED_BYTES, CostModel

# Rules of thumb, which docs/report.md explains.
MUCH = 0.1  # share of the time in boundaries from which there is something to gain
SLOWER = 0.1  # a worker's steps are longer than the others' by this share
WAITING = 0.03  # share of the time that the other workers wait for it
SMALL_DRIFT, LARGE_DRIFT = 0.01, 0.1
AGAINST = -0.1  # cosine of velocity and mean delta
TAKES_BACK = 0.5  # of what 1 - beta takes from the velocity, the deltas take as much again
GAIN = 1.05  # a change that makes a run less than this times as fast is not worth a word
LARGEST_PERIOD = 256
BLOCKS_AN_EPOCH = 4  # at least, of a K that is proposed
FEW = 4  # boundaries that say something


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run has shown, of its last epochs.

    Args:
        sync_period: K, the median over the blocks.
        boundaries: how many were measured.
        seconds_a_step: of the chief, boundaries apart: a local step, and what the host does
            between steps.
        step_seconds: of a local step, one number a worker (NaN: not known), the
            median over its blocks.
        boundary_share: share of the chief's time in boundaries, waiting included.
        waiting_share: share of the chief's time in which it waits for the slowest.
        waiting_shares: the same of each worker, had all blocks been as the median one: what
            waits for a worker once is not its fault.
        passes: seconds of a boundary that are passes over the weights.
        transfer: seconds a boundary's messages take.
        bytes: that a worker gives to a boundary, as they travel.
        overlap: whether deltas travel while the next block computes.
        compression: None, "float16", "int8" or "int4".
        beta: block momentum; None where the outer optimizer is the user's.
        drift: mean; NaN: not known.
        delta: norm of the mean delta, mean.
        velocity: norm of the velocity, mean.
        cosine: of the velocity and the mean delta that is added to it, mean; NaN: not known.
        epoch_steps: local steps of an epoch.
    """

    sync_period: float
    boundaries: int
    seconds_a_step: float
    step_seconds: Sequence[float]
    boundary_share: float
    waiting_share: float
    waiting_shares: Sequence[float]
    passes: float = 0.0
    transfer: float = 0.0
    bytes: float = 0.0
    overlap: bool = False
    compression: str | None = None
    beta: float | None = None
    drift: float = math.nan
    delta: float = math.nan
    velocity: float = math.nan
    cosine: float = math.nan
    epoch_steps: float = math.inf

    @property
    def longest(self) -> int:
        """The largest K worth a word: an epoch should have some blocks."""
        most = min(LARGEST_PERIOD, self.epoch_steps / BLOCKS_AN_EPOCH)
        return max(int(most), round(self.sync_period), 1)

    @property
    def workers(self) -> int:
        """How many."""
        return len(self.step_seconds)

    @property
    def communicating(self) -> float:
        """Share of the chief's time in boundaries, without what it waits for the slowest."""
        return max(self.boundary_share - self.waiting_share, 0.0)


def advise(measured: Measured) -> list[str]:
    """What to change, in sentences; empty where all is well, or too little is known."""
    if measured.boundaries < FEW:
        return []
    slow = _slow_worker(measured)
    found = [slow, _boundaries(measured), _drift(measured), _momentum(measured)]
    return [sentence for sentence in found if sentence]


def _slow_worker(m: Measured) -> str:
    """A worker for which the others wait."""
    if m.workers < 2:
        return ""
    slowest = min(range(m.workers), key=lambda i: m.waiting_shares[i])
    others = [i for i in range(m.workers) if i != slowest]
    waiting = _mean([m.waiting_shares[i] for i in others])
    # Now one and now the other: what waits for the workers by turns is noise, not a worker.
    if not waiting - m.waiting_shares[slowest] >= WAITING:
        return ""
    whom = "The other worker waits" if m.workers == 2 else "The other workers wait"
    waits = f"{whom} for worker {slowest} in {percent(waiting)} of the time"
    slower = m.step_seconds[slowest] / _mean([m.step_seconds[i] for i in others]) - 1
    if slower >= SLOWER:
        by = (
            f"{percent(slower)} slower than"
            if slower < 1
            else f"{slower + 1:.1f} times as slow as"
        )
        return (
            f"Worker {slowest} is {by} the others. {waits}. Look at its data "
            "(a slower disk, more work an example) and at what else runs on its machine."
        )
    if math.isnan(slower) or waiting - m.waiting_shares[slowest] < 2 * WAITING:
        return ""
    return (
        f"{waits}, and not for its local steps, which take no longer: for what it does between "
        "them. Look at callbacks that run on it alone, at uneven shares of the data, and at what "
        "else runs on its machine."
    )


def cost_of(m: Measured) -> CostModel:
    """The cost model of what was measured, of deltas that travel as float32."""
    ring = 2 * (m.workers - 1) / m.workers * m.bytes
    bandwidth = ring / m.transfer if m.transfer > 0 and ring > 0 else math.inf
    plain = m.bytes * 4 / COMPRESSED_BYTES.get(m.compression or "", 4)
    return CostModel(m.seconds_a_step, plain, bandwidth, boundary_seconds=m.passes)


def _boundaries(m: Measured) -> str:
    """What would take less of the time."""
    own = m.communicating
    if own < MUCH or m.workers < 2 or not m.seconds_a_step > 0:
        return ""
    cost, period = cost_of(m), max(round(m.sync_period), 1)

    def seconds(k: int, overlap: bool, compression: str | None) -> float:
        return cost.compressed(compression).step(k, m.workers, overlap)

    now = seconds(period, m.overlap, m.compression)
    found = []
    longer = _longer_period(m, cost, period)
    if longer > period:
        found.append((f"K={longer}", seconds(longer, m.overlap, m.compression)))
    if not m.overlap:
        found.append(("overlap=True", seconds(period, True, m.compression)))
    if m.compression not in ("int8", "int4"):
        found.append(('compression="int8"', seconds(period, m.overlap, "int8")))
        if not m.overlap:
            found.append(("overlap=True with int8", seconds(period, True, "int8")))
    gains = [(name, now / then) for name, then in found if now / then >= GAIN]
    single = max((gain for name, gain in gains[:-1] if not name.startswith("K")), default=0.0)
    if gains and "with" in gains[-1][0] and gains[-1][1] < GAIN * single:
        del gains[-1]  # both are hardly better than one of them
    text = f"Boundaries take {percent(own)} of the time"
    if not gains:
        return (
            f"{text}, and neither K, overlap nor compression would change that by much: this "
            "model's steps are short beside what a boundary costs in any case. Larger batches "
            "would."
        )
    said = ", ".join(f"{name} would be {gain:.2f} times as fast" for name, gain in gains)
    return f"{text}: {said} (predicted)."


def _longer_period(m: Measured, cost: CostModel, period: int) -> int:
    """The smallest doubling of K with which boundaries take little of the time; not where
    replicas drift far apart already."""
    if m.drift >= LARGE_DRIFT / 2:
        return period
    model, longer = cost.compressed(m.compression), period
    while 2 * longer <= m.longest and (
        longer == period or model.share(longer, m.workers, m.overlap) < 1 - MUCH
    ):
        longer *= 2
    return longer


def _drift(m: Measured) -> str:
    if m.workers < 2 or math.isnan(m.drift):
        return ""
    if m.drift >= LARGE_DRIFT:
        return (
            f"The drift is {m.drift:.2g}: at the end of a block replicas are that far from their "
            "mean, relative to the weights. Blocks are too long for this learning rate, or the "
            f"workers' data too unlike. Try K={max(round(m.sync_period / 2), 1)}, a lower "
            "learning rate, or shuffle before the data is shared out."
        )
    if m.drift < SMALL_DRIFT and m.communicating >= MUCH and m.longest >= 2 * m.sync_period:
        return f"The drift is {m.drift:.2g}, which says that K may grow at this learning rate."
    return ""


def _momentum(m: Measured) -> str:
    # In steady progress the mean delta is 1 - beta of the velocity, which loses as much.
    if not m.beta or not m.cosine < AGAINST:
        return ""
    if -m.cosine * m.delta / m.velocity < TAKES_BACK * (1 - m.beta):
        return ""
    return (
        f"The velocity points against the mean delta (cosine {m.cosine:.2f}): what replicas learn "
        f"in a block takes back what block momentum has added. beta is too large: try "
        f"block_momentum={m.beta / 2:.2g}, or a lower inner learning rate."
    )


def percent(share: float) -> str:
    """As in `4 %`."""
    return f"{100 * share:.0f} %"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
