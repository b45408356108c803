"""The numbers that travel with the deltas: each has a name, and a place that only this file
knows."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# One number of each replica's own.
ROWS = (
    "steps",  # local steps it took in this block, if it takes part in the mean
    "nonfinite",  # 0, or the number, from 1, of its first tensor that is not finite
    "set",  # whether its weights were set between steps since the last boundary
    "anchor",  # 0, or a checksum of its anchor, from 1
    "busy",  # for a report: seconds since the last all-reduce; 0: not known
    "stepping",  # and those in local steps; 0: not known
)
# Sums over the replicas.
SUMS = (
    "active",  # replicas in the mean
    "ended",  # replicas whose data has ended
    "stopping",  # that want to stop
    "leaving",  # that have to end the process
    "finite",  # that are finite, with or without steps
    "square",  # of the deltas' square norms
    "measuring",  # that measure for a report
)
# What the host tells its replicas at a boundary: a vector, in this order.
TOLD = ("ended", "stopping", "leaving", "set", "anchor", "busy", "stepping", "measuring")
CHECKSUMS = 1 << 20  # float32 counts them exactly


class Header:
    """The header of a strategy's boundaries, a float32 vector.

    Args:
        replicas: how many.
    """

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self.size = len(ROWS) * replicas + len(SUMS)

    def write(self, replica: Any, numbers: Mapping[str, Any]) -> tf.Tensor:
        """What one replica sends: its numbers by name (those not given are 0)."""
        rows = [self._number(numbers, name) for name in ROWS]
        place = tf.one_hot(replica, self._replicas, dtype=tf.float32)
        sums = tf.stack([self._number(numbers, name) for name in SUMS])
        return tf.concat([*(place * row for row in rows), sums], axis=0)

    @staticmethod
    def _number(numbers: Mapping[str, Any], name: str) -> tf.Tensor:
        return tf.cast(numbers.get(name, 0), tf.float32)

    def read(self, summed: Any) -> dict[str, Any]:
        """The reverse, of the sum of all replicas' headers: a vector for each row, a number for
        each sum; tensors of a tensor, NumPy's of an array."""
        n = self._replicas
        found = {name: summed[i * n : (i + 1) * n] for i, name in enumerate(ROWS)}
        return found | {name: summed[len(ROWS) * n + i] for i, name in enumerate(SUMS)}

    def attach(self, packs: list[tf.Tensor], header: tf.Tensor) -> list[tf.Tensor]:
        """Appends the header to the last pack of its dtype, or as a pack of its own."""
        i = _last_of(packs, header.dtype)
        if i is None:
            return [*packs, header]
        return [*packs[:i], tf.concat([packs[i], header], axis=0), *packs[i + 1 :]]

    def detach(self, packs: list[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The reverse of `attach`, of sums."""
        i, size = _last_of(packs, tf.float32), self.size
        assert i is not None
        rest = [packs[i][:-size]] if packs[i].shape[0] > size else []
        return [*packs[:i], *rest, *packs[i + 1 :]], packs[i][-size:]


def _last_of(packs: list[tf.Tensor], dtype: tf.DType) -> int | None:
    """The number of the last pack of that dtype, or None."""
    return max((i for i, flat in enumerate(packs) if flat.dtype == dtype), default=None)


def checksum(values: Iterable[Any]) -> int:
    """As `crc`, a number from 1 to `CHECKSUMS`."""
    return crc(values) % (CHECKSUMS - 1) + 1


def crc(values: Iterable[Any]) -> int:
    """The CRC-32 of the bits of some arrays, tensors, variables and NumPy's numbers, one after the
    other and without a copy on a CPU. Raises TypeError for other Python objects than bytes."""
    found = 0
    for value in values:
        if not isinstance(value, np.ndarray | np.generic):
            value = tf.convert_to_tensor(value)
        flat = np.ascontiguousarray(value).reshape(-1)
        # A string tensor is an array of objects.
        bits = b"\0".join(flat) if flat.dtype.hasobject else flat.view(np.uint8).data
        found = zlib.crc32(bits, found)
    return found
