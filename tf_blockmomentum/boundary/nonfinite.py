"""A replica that is not finite."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum._private import keras as _keras


def make_finite(optimizer: Any) -> None:
    """Rids a replica's inner state of NaN and infinity, which would return at every step."""
    inner = optimizer.inner_optimizer
    averages = {id(v): w for v, w in _keras.moving_averages(inner)}
    for v in inner.variables:
        if tf.as_dtype(v.dtype).is_floating:
            value = tf.convert_to_tensor(v)
            instead = averages.get(id(v), tf.zeros([], value.dtype))
            v.assign(tf.where(tf.math.is_finite(value), value, instead))


def first_bad(
    good: Sequence[tf.Tensor], members: Sequence[tuple[Sequence[int], np.ndarray]]
) -> tf.Tensor:
    """The number, from 1, of the first tensor that is not good.

    Args:
        good: flat bools, of several tensors each, one of them False.
        members: for each the numbers, from 0, of its tensors, and where each ends in it.
    """
    found = []
    for flat, (numbers, ends) in zip(good, members, strict=True):
        place = tf.argmin(tf.cast(flat, tf.int32))
        number = tf.gather(numbers, tf.reduce_sum(tf.cast(place >= ends[:-1], tf.int32)))
        found.append(tf.where(tf.reduce_all(flat), tf.int32.max, number + 1))
    return tf.reduce_min(tf.stack(found))


def describe(firsts: Sequence[int], variables: Sequence[Any], blocks: int, limited: bool) -> str:
    """What is not finite where. `firsts`: for each replica 0, or the number, from 1, of the first
    of the variables whose delta is not. `limited`: whether it travels as float16."""
    what = "; ".join(
        f"replica {r} in variable {getattr(v, 'path', v.name)!r}"
        for r, v in ((r, variables[first - 1]) for r, first in enumerate(firsts) if first)
    )
    bad_is = "NaN or infinity" + (", or too large for float16" if limited else "")
    return f"A delta is not finite ({bad_is}) in block {blocks}: {what}"


def complain(text: str, firsts: Sequence[int], on_nonfinite: str) -> None:
    """Warns that replicas were left out of a block, or raises FloatingPointError.

    Args:
        text: as from `describe`.
        firsts: for each replica 0, or the number of its first tensor not finite.
        on_nonfinite: "raise" or "skip".
    """
    if on_nonfinite == "raise":
        raise FloatingPointError(
            f'{text}. Received: on_nonfinite="raise". The anchor is finite, made without that '
            "replica. Lower the inner learning rate, clip gradients (clipnorm on the inner "
            "optimizer) or look for bad examples in its data; or leave such replicas out of "
            'the block with on_nonfinite="skip".'
        )
    if all(firsts):
        raise FloatingPointError(
            f'{text}. Received: on_nonfinite="skip", and no replica is left for the mean. '
            "Lower the inner learning rate, or clip gradients (clipnorm on the inner "
            "optimizer)."
        )
    warnings.warn(f"{text}. Left out of this block; it goes on from the anchor.", stacklevel=3)
