"""What a block costs in seconds: step time, bytes and link speed give the throughput."""

import dataclasses
import re
from typing import Self

from tf_blockmomentum.landing import check_overlap, landing_step

# Bytes of a weight's delta on the way, by the strategy's `compression`: 16 bits; or a code, and a
# 256th of a scale of 16 bits.
COMPRESSED_BYTES = {"float16": 2.0, "int8": 1 + 1 / 128, "int4": 0.5 + 1 / 128}
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclasses.dataclass(frozen=True)
class CostModel:
    r"""Predicts the speed of block training from three measurements.

    A local step takes `step_seconds` and does not communicate. A boundary all-reduces
    the weights over a ring: each of $P$ workers sends and receives $2(P-1)/P$ times
    their bytes in $2(P-1)$ messages. With $K$ = `sync_period` a step costs, on average,

    $$t_{step} + \frac1K \left(t_0 + \frac{2(P-1)}{P}\,\frac{bytes}{bandwidth}
    + 2(P-1)\,latency\right)$$

    With `overlap` (as in `BlockMomentum`) the messages travel while the first $\tau$ of the
    next $K$ steps compute. A block takes $t_0$, the longer of the two, and the other steps.

    Every number that comes out is a prediction; it leaves out stragglers, and a
    transport that is slower than its link (measure that one, and pass its speed).

    Args:
        step_seconds: measured seconds of one local step of one replica.
        model_bytes: bytes a boundary averages: the trainable weights (four each as float32; with
            compression `COMPRESSED_BYTES`) and statistics.
        bandwidth: bytes per second a worker sends, as `parse_bandwidth` returns.
        latency: seconds a message takes however short it is.
        boundary_seconds: $t_0$, seconds of a boundary apart from its messages: passes over
            memory, and the processor's share of the transport.

    Source: the ring's cost is Patarasuk and Yuan, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations" (JPDC 2009), section 3.

    Example:

    >>> from tf_blockmomentum.cost import CostModel, parse_bandwidth
    >>> cost = CostModel(step_seconds=0.01, model_bytes=25e6, bandwidth=parse_bandwidth("1gbit"))
    >>> [round(cost.step(sync_period, replicas=2), 6) for sync_period in (1, 20)]
    [0.21, 0.02]
    """

    step_seconds: float
    model_bytes: float
    bandwidth: float
    latency: float = 0.0
    boundary_seconds: float = 0.0

    def compressed(self, compression: str | None = None) -> Self:
        """The model with deltas that travel as codes: None, "float16", "int8" or "int4" in place
        of float32. Coding itself, a pass over the weights, is not in it."""
        share = COMPRESSED_BYTES[compression] / 4 if compression else 1
        return dataclasses.replace(self, model_bytes=self.model_bytes * share)

    def messages(self, replicas: int) -> float:
        """Seconds that the messages of one boundary take among `replicas` workers."""
        hops = 2 * (replicas - 1)
        return hops / replicas * self.model_bytes / self.bandwidth + hops * self.latency

    def boundary(self, replicas: int) -> float:
        """Seconds of one boundary, if nothing else goes on meanwhile."""
        return self.boundary_seconds + self.messages(replicas)

    def block(self, sync_period: float, replicas: int, overlap: float | bool = False) -> float:
        """Seconds of one block and its boundary."""
        hidden = landing_step(check_overlap(overlap), sync_period) * self.step_seconds
        rest = sync_period * self.step_seconds - hidden
        return self.boundary_seconds + max(hidden, self.messages(replicas)) + rest

    def step(self, sync_period: float, replicas: int, overlap: float | bool = False) -> float:
        """Seconds of one step, its share of the boundary included."""
        return self.block(sync_period, replicas, overlap) / sync_period

    def share(self, sync_period: float, replicas: int, overlap: float | bool = False) -> float:
        """The speed as a share of that without communication: 1 where a boundary costs nothing."""
        return self.step_seconds / self.step(sync_period, replicas, overlap)

    def throughput(
        self, batch: int, sync_period: float, replicas: int, overlap: float | bool = False
    ) -> float:
        """Examples per second of all replicas together, each with `batch` a step."""
        return batch * replicas / self.step(sync_period, replicas, overlap)


def parse_bandwidth(text: str) -> float:
    """Bytes per second of "1gbit", "100mbit", "2.5 Gbit/s" (as `tc` writes them).

    Raises:
        ValueError: not a positive number and one of bit, kbit, mbit, gbit, tbit.
    """
    match = re.fullmatch(r"([0-9.]+) ?([kmgt]?)bit(/s|ps)?", str(text).strip().lower())
    try:
        speed = float(match[1]) * _UNITS[match[2]] / 8 if match else 0.0
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise ValueError(
            f"A bandwidth is a number and bit, kbit, mbit, gbit or tbit (a second). Received: "
            f'{text!r}. Write it as "1gbit" or "100mbit"; 125 megabytes a second are "1gbit".'
        )
    return speed
