"""Codes of few bits, and how tensors are laid out for them.

A block of 256 values travels as one scale and 256 whole numbers of 8 or 4 bits, rounded to
nearest, packed into int32, which is what TensorFlow's collectives take. The scale is the upper
half of a float32 (as bfloat16): 16 bits as a float16 has, which would run out of range at 65504
and lose its digits from 6e-5 downwards, where most deltas are. It is rounded up, so the largest
value's code is within range and nothing need be clipped.

The numbers are the same to the bit on every worker, compiled by XLA or not, with fused
multiply-adds or without: a code has at most 7 bits and a scale 8, so their product is exact, and
what is added to it is rounded once either way. So one worker may have a GPU and another none. (The
sum alone is always compiled, see `feedback`.)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_MOST_FLOAT16 = 60000.0  # that rounding cannot carry past the largest float16
BITS = {"int8": 8, "int4": 4}
BLOCK = 256  # values that share a scale
_LARGE = 1 << 20  # elements of a tensor that has blocks of its own
_LANES = 32  # as many values side by side as the processor takes at once, or more
_MOST = np.float32(2.0**127)  # below it neither a value's code nor its scale overflows
_LEAST = np.float32(2.0**-100)  # from it on neither do reciprocals; a smaller value waits
_NAN = np.uint32(0x7FC00000).view(np.int32)


def float16(wanted: Sequence[tf.Tensor], replicas: int) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """What a replica sends as float16 in place of tensors that it wants to, to be added up as
    such, and what that keeps back. A value that is too large for the sum becomes infinite, and so
    an error."""
    most = _MOST_FLOAT16 / replicas
    sent = [tf.cast(tf.where(tf.abs(x) > most, x * float("inf"), x), tf.float16) for x in wanted]
    return sent, [x - tf.cast(c, x.dtype) for x, c in zip(wanted, sent, strict=True)]


def bits_of(x: Any) -> Any:
    """A float32's bits without its sign: whole numbers in the order of the magnitudes, infinity
    and NaN above all others."""
    return tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), 0x7FFFFFFF)


def fitting(x: tf.Tensor) -> tf.Tensor:
    """Which of a tensor's values can be coded: those that are finite and below 1.7e38."""
    return tf.abs(tf.cast(x, tf.float32)) < _MOST


def magnitudes(x: tf.Tensor) -> tf.Tensor:
    """What `scales_of` needs of values of shape [blocks, 256]: a 32nd of the largest magnitudes'
    search in the way that XLA makes fast, which does not vectorise the rest."""
    columns = tf.unstack(tf.reshape(bits_of(x), [-1, BLOCK // _LANES, _LANES]), axis=1)
    largest = columns[0]
    for column in columns[1:]:
        largest = tf.maximum(largest, column)
    return largest


def scales_of(largest: tf.Tensor, bits: int) -> tf.Tensor:
    """The scales of blocks, a float32 vector of numbers that bfloat16 has; 0 where all values are
    so small that they wait; NaN where they do not fit, which `decode` makes NaN again."""
    largest = tf.reduce_max(largest, axis=1)
    scale = tf.bitcast(largest, tf.float32) * np.float32(1 / _most(bits))
    up = tf.bitwise.bitwise_and(tf.bitcast(scale, tf.int32) + 0xFFFF, np.int32(-0x10000))
    up = tf.where(largest < int(_LEAST.view(np.int32)), 0, up)
    return tf.bitcast(tf.where(largest < int(_MOST.view(np.int32)), up, _NAN), tf.float32)


def reciprocals(scales: tf.Tensor) -> tf.Tensor:
    """Of the scales, 0 for 0: a division for each block and none for each value. In float64, since
    TensorFlow's kernels (not XLA's) round a float32's reciprocal otherwise than IEEE says."""
    some = scales > 0
    inverse = 1 / tf.cast(tf.where(some, scales, 1.0), tf.float64)
    return tf.where(some, tf.cast(inverse, tf.float32), 0.0)


def rounded(x: tf.Tensor, inverse: tf.Tensor) -> tf.Tensor:
    """The codes of values of shape [blocks, 256], as float32."""
    return tf.round(x * inverse[:, tf.newaxis])


def rest(x: tf.Tensor, scales: tf.Tensor, inverse: tf.Tensor) -> tf.Tensor:
    """What the codes keep back of the values."""
    return x - rounded(x, inverse) * scales[:, tf.newaxis]


def encode(x: tf.Tensor, inverse: tf.Tensor, bits: int) -> tf.Tensor:
    """Packs the codes of values of shape [blocks, 256] into int32 of shape [blocks, 8 * bits]:
    each has codes that stand far apart, so that those side by side are worked on at once."""
    codes = tf.bitwise.bitwise_and(tf.cast(rounded(x, inverse), tf.int32), 2**bits - 1)
    parts = apart(codes, bits)
    words = parts[0]
    for i, part in enumerate(parts[1:], 1):
        words = tf.bitwise.bitwise_or(words, tf.bitwise.left_shift(part, i * bits))
    return words


def decode(words: tf.Tensor, scales: tf.Tensor, bits: int) -> tf.Tensor:
    """The reverse of `encode`: float32 values of shape [blocks, 256]."""
    return together(decode_apart(words, scales, bits))


def decode_apart(words: tf.Tensor, scales: tf.Tensor, bits: int) -> list[tf.Tensor]:
    """As `decode`, what is in each place of the words by itself, of shape [blocks, 8 * bits]: what
    is done to all of these before they are put together, XLA does while it decodes."""
    codes = [
        tf.bitwise.right_shift(tf.bitwise.left_shift(words, 32 - bits * (i + 1)), 32 - bits)
        for i in range(32 // bits)
    ]
    return [tf.cast(code, tf.float32) * scales[:, tf.newaxis] for code in codes]


def apart(x: tf.Tensor, bits: int) -> list[tf.Tensor]:
    """Values of shape [blocks, 256] as `decode_apart` has them."""
    count = 32 // bits
    return tf.unstack(tf.reshape(x, [-1, count, BLOCK // count]), axis=1)


def together(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """The reverse of `apart`."""
    return tf.reshape(tf.stack(parts, axis=1), [-1, BLOCK])


def _most(bits: int) -> int:
    """The largest code; the smallest is its negative."""
    return 2 ** (bits - 1) - 1


class Layout:
    """How tensors become blocks, and blocks messages.

    Large tensors have groups of blocks of their own, which need no copy; the others share theirs,
    so that there are few groups: each is compiled for itself. The blocks are dealt out in order:
    each replica owns as many.

    Args:
        tensors: of their shapes; the order of `join` and `split`.
        bits: of a code.
        replicas: how many own a part.
    """

    def __init__(self, tensors: Sequence[Any], bits: int, replicas: int) -> None:
        self.bits, self.replicas = bits, replicas
        self._shapes = [t.shape for t in tensors]
        self._counts = [shape.num_elements() for shape in self._shapes]
        # The numbers of those that have a group of their own, and of those of the last group.
        self.large = [i for i, count in enumerate(self._counts) if count >= _LARGE]
        self.small = [i for i, count in enumerate(self._counts) if count < _LARGE]
        self._groups = [[i] for i in self.large] + ([self.small] if self.small else [])
        values = [sum(self._counts[i] for i in group) for group in self._groups]
        self._blocks = [-(-count // BLOCK) for count in values]
        self.blocks = sum(self._blocks)
        self.part = max(1, -(-self.blocks // replicas))  # blocks of each replica's
        self._words = self.part * BLOCK * bits // 32  # int32 of a part's message, and
        self.message = self._words + -(-self.part // 2)  # with the scales, two in each

    def join(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Tensors as groups of blocks."""
        return [self.group([tensors[i] for i in group]) for group in self._groups]

    @staticmethod
    def group(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """A group: float32 of shape [blocks, 256], padded with 0."""
        flat = [tf.reshape(tf.cast(x, tf.float32), [-1]) for x in tensors]
        joined = flat[0] if len(flat) == 1 else tf.concat(flat, axis=0)
        if joined.shape[0] % BLOCK:
            joined = tf.pad(joined, [[0, -joined.shape[0] % BLOCK]])
        return tf.reshape(joined, [-1, BLOCK])

    def split(self, groups: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The reverse of `join`: float32 tensors. Without XLA they are parts of the groups, no
        copies."""
        tensors: list[Any] = [None] * len(self._shapes)
        for group, blocks in zip(self._groups, groups, strict=True):
            for i, tensor in zip(group, self.cut(group, blocks), strict=True):
                tensors[i] = tensor
        return tensors

    def cut(self, group: Sequence[int], blocks: tf.Tensor) -> list[tf.Tensor]:
        """The reverse of `group`: the tensors of these numbers, whose blocks they are."""
        sizes = [self._counts[i] for i in group]
        padding = -sum(sizes) % BLOCK
        flat, pieces = tf.reshape(blocks, [-1]), [*sizes, padding] if padding else sizes
        parts = tf.split(flat, pieces) if len(pieces) > 1 else [flat]
        return [tf.reshape(x, self._shapes[i]) for i, x in zip(group, parts, strict=False)]

    @property
    def members(self) -> list[tuple[list[int], np.ndarray]]:
        """For each group the numbers of its tensors, and where each ends in it."""
        return [(group, np.cumsum([self._counts[i] for i in group])) for group in self._groups]

    def of_groups(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """From a tensor with a row for each block, the rows of each group."""
        ends = np.cumsum(self._blocks)
        return [flat[end - n : end] for end, n in zip(ends, self._blocks, strict=True)]

    def write(self, words: Sequence[tf.Tensor], scales: tf.Tensor) -> tf.Tensor:
        """The message of all blocks, a flat int32: the parts one after the other, each its codes
        and then its scales.

        Args:
            words: the groups' codes.
            scales: of all blocks.
        """
        missing = self.replicas * self.part - self.blocks
        padding = [tf.zeros([missing, BLOCK * self.bits // 32], tf.int32)] if missing else []
        joined = [*words, *padding]
        codes = joined[0] if len(joined) == 1 else tf.concat(joined, axis=0)
        codes = tf.reshape(codes, [self.replicas, self._words])
        scales = tf.reshape(tf.pad(scales, [[0, missing]]), [self.replicas, self.part])
        return tf.reshape(tf.concat([codes, _pairs(scales)], axis=1), [-1])

    def write_part(self, words: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
        """The message of one part."""
        pairs = _pairs(scales[tf.newaxis])
        return tf.concat([tf.reshape(words, [-1]), tf.reshape(pairs, [-1])], axis=0)

    def read(self, message: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The reverse, of several parts: codes of shape [parts, blocks, 8 * bits] and scales of
        shape [parts, blocks]."""
        rows = tf.reshape(message, [-1, self.message])
        words = tf.reshape(rows[:, : self._words], [-1, self.part, BLOCK * self.bits // 32])
        pairs = rows[:, self._words :]
        halves = [tf.bitwise.left_shift(pairs, 16), tf.bitwise.bitwise_and(pairs, -0x10000)]
        scales = tf.reshape(tf.stack(halves, axis=2), [-1, 2 * pairs.shape[1]])
        return words, tf.bitcast(scales[:, : self.part], tf.float32)

    def decode(self, message: tf.Tensor) -> list[tf.Tensor]:
        """The groups that a message of all blocks holds."""
        words, scales = self.read(message)
        words = tf.reshape(words, [self.replicas * self.part, -1])
        pairs = zip(self.of_groups(words), self.of_groups(tf.reshape(scales, [-1])), strict=True)
        return [decode(w, s, self.bits) for w, s in pairs]

    def anew(self, parts: Sequence[np.ndarray], replica: int) -> np.ndarray:
        """One replica's part of what is kept back of sums, from the parts of another number of
        replicas, each flat. It is a sum over the replicas, whose mean stays the same."""
        own = self.part * BLOCK
        whole = np.concatenate(parts)[: self.blocks * BLOCK]
        whole = np.pad(whole, [0, self.replicas * own - len(whole)])
        factor = np.float32(self.replicas / len(parts))
        return whole[replica * own : (replica + 1) * own] * factor


def _pairs(scales: tf.Tensor) -> tf.Tensor:
    """Rows of scales, their upper halves two in an int32."""
    halves = tf.bitcast(tf.pad(scales, [[0, 0], [0, scales.shape[1] % 2]]), tf.int32)
    halves = tf.reshape(halves, [scales.shape[0], -1, 2])
    low = tf.bitwise.bitwise_and(tf.bitwise.right_shift(halves[:, :, 0], 16), 0xFFFF)
    return tf.bitwise.bitwise_or(low, halves[:, :, 1])
