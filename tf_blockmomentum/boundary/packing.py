"""Many tensors and few messages."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum._private.tensorflow import wire_dtype

# Between two workers on 1 Gbit/s 19 MB took 173 ms in one piece and 159 to 162 in four or more,
# two at once or all. With more pieces the messages begin to cost; with more at once, memory.
_PACK_BYTES, _PACKS = 4 << 20, 32


def pack(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Flat tensors of one dtype each and some megabytes, so that a list travels neither in one
    message for each nor in a single one: with several on their way, one is added up while
    another is on the link. Large tensors are cut, without a copy if XLA does not compile this;
    small ones are put together. What collectives do not accept travels as a wider
    dtype, such as bfloat16 as float32."""
    flat = [tf.reshape(tf.cast(t, _wire(t)), [-1]) for t in tensors]
    packs = []
    for pieces in _pieces(tensors):
        parts = [
            flat[i] if end - begin == flat[i].shape[0] else flat[i][begin:end]
            for i, begin, end in pieces
        ]
        packs.append(parts[0] if len(parts) == 1 else tf.concat(parts, axis=0))
    return packs


def unpack(packs: Sequence[tf.Tensor], like: Sequence[Any]) -> list[tf.Tensor]:
    """The reverse of `pack`: a list of tensors of the shapes and dtypes of `like`."""
    parts: list[list[tf.Tensor]] = [[] for _ in like]
    for flat, pieces in zip(packs, _pieces(like), strict=True):
        sizes = [end - begin for _, begin, end in pieces]
        own = [flat] if len(sizes) == 1 else tf.split(flat, sizes)
        for (i, _, _), part in zip(pieces, own, strict=True):
            parts[i].append(part)
    whole = [own[0] if len(own) == 1 else tf.concat(own or [[]], axis=0) for own in parts]
    return [tf.cast(tf.reshape(x, t.shape), t.dtype) for x, t in zip(whole, like, strict=True)]


def members(tensors: Sequence[Any]) -> list[tuple[list[int], np.ndarray]]:
    """For each pack of `pack` the numbers of its tensors, and where each ends in it."""
    return [
        ([i for i, _, _ in pieces], np.cumsum([end - begin for _, begin, end in pieces]))
        for pieces in _pieces(tensors)
    ]


def _pieces(tensors: Sequence[Any]) -> list[list[tuple[int, int, int]]]:
    """For each pack, what it holds: number of the tensor, and from which element to which."""
    members: dict[tf.DType, list[int]] = {}
    for i, tensor in enumerate(tensors):
        members.setdefault(_wire(tensor), []).append(i)
    packs: list[list[tuple[int, int, int]]] = []
    for wire, those in members.items():
        counts = {i: tensors[i].shape.num_elements() for i in those}
        size, room = max(_PACK_BYTES // wire.size, -(-sum(counts.values()) // _PACKS)), 0
        small: list[tuple[int, int, int]] = []
        for i, count in counts.items():
            if count > size // 2:
                each = -(-count // max(1, round(count / size)))
                each += -each % 64  # elements, lest a part not aligned be copied
                packs += [[(i, b, min(b + each, count))] for b in range(0, count, each)]
            elif count:
                if count > room:
                    packs.append(small := [])
                    room = size
                small.append((i, 0, count))
                room -= count
    return packs


def _wire(tensor: Any) -> tf.DType:
    return wire_dtype(tensor.dtype)
