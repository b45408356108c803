"""What replicas tell each other: sums, and what is made of sums."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum._private import tensorflow as _tensorflow
from tf_blockmomentum.boundary.packing import pack, unpack

_AT_ONCE = 2  # messages on their way; see packing
_PIECE_BYTES = 16 << 20  # of a part of a message of codes, lest many copies of all of it be made


def sum_over_replicas(tensors: Sequence[Any]) -> list[tf.Tensor]:
    """Sums each tensor over all replicas, in replica context: a few large messages.

    Adds one packed copy of `tensors` to memory while it runs.

    Args:
        tensors: list of tensors, of the same shapes on every replica.

    Returns:
        List of the sums, of the same shapes and dtypes.
    """
    return unpack(sum_packs(pack(tensors)), tensors)


def sum_packs(packs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Sums flat tensors over all replicas, in replica context, a few at a time: each has buffers
    of its own in TensorFlow's transport while it travels."""
    context = tf.distribute.get_replica_context()
    sums: list[tf.Tensor] = []
    for i, flat in enumerate(packs):
        arrived = [sums[i - _AT_ONCE]] if i >= _AT_ONCE else []
        with tf.control_dependencies(arrived):
            flat = tf.identity(flat)  # in any case: an argument alone has no device
        sums.append(context.all_reduce(tf.distribute.ReduceOp.SUM, flat))
    return sums


def exchange_parts(flat: tf.Tensor, replicas: int) -> tf.Tensor:
    """Part i of a flat tensor goes to replica i, in replica context.

    Args:
        flat: tensor of shape [replicas * n].
        replicas: how many.

    Returns:
        Tensor of shape [replicas * n], what the replicas have sent to this one, in their order.
    """
    if replicas == 1:
        return flat
    parts = tf.reshape(flat, [replicas, -1])
    pieces = [_tensorflow.all_to_all(piece) for piece in _in_pieces(parts, axis=1)]
    parts = pieces[0] if len(pieces) == 1 else tf.concat(pieces, axis=1)
    return tf.reshape(parts, [-1])


def join_parts(flat: tf.Tensor, replicas: int) -> tf.Tensor:
    """The replicas' flat tensors one after the other, in replica context.

    Args:
        flat: tensor of shape [n].
        replicas: how many.

    Returns:
        Tensor of shape [replicas * n].
    """
    if replicas == 1:
        return flat
    pieces = [
        tf.reshape(_tensorflow.all_gather(piece), [replicas, -1])
        for piece in _in_pieces(flat, axis=0)
    ]
    parts = pieces[0] if len(pieces) == 1 else tf.concat(pieces, axis=1)
    return tf.reshape(parts, [-1])


def _in_pieces(tensor: tf.Tensor, axis: int) -> list[tf.Tensor]:
    """A tensor cut along an axis, each index's part of some megabytes at most."""
    length, most = tensor.shape[axis], _PIECE_BYTES // tensor.dtype.size
    if length <= most:
        return [tf.identity(tensor)]  # an argument alone has no device
    sizes = [most] * (length // most) + ([length % most] if length % most else [])
    return tf.split(tensor, sizes, axis=axis)


def gather(strategy: tf.distribute.Strategy, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Gives every worker what each replica has to say: one all-reduce, called by all workers.

    Args:
        strategy: of which the replicas are.
        rows: for each replica of this worker as many whole numbers (63 bits).

    Returns:
        Array of shape [replicas, numbers].
    """
    if strategy.num_replicas_in_sync == 1:
        return np.asarray(rows, np.int64)
    own = iter(rows)
    values = strategy.experimental_distribute_values_from_function(
        lambda _: tf.constant(next(own), tf.int64)
    )
    return strategy.experimental_local_results(_gathering(strategy)(values))[0].numpy()


@functools.cache
def _gathering(strategy: tf.distribute.Strategy) -> Any:
    def replica(row: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        place = tf.one_hot(
            context.replica_id_in_sync_group, context.num_replicas_in_sync, dtype=row.dtype
        )
        return sum_over_replicas([place[:, tf.newaxis] * row])[0]

    return tf.function(lambda row: strategy.run(replica, args=(row,)), autograph=False)


def take_from_first(strategy: tf.distribute.Strategy, variables: Sequence[Any]) -> None:
    """Every replica takes the first one's values, called by all workers. Adds a packed copy of
    the variables to memory while it runs."""

    def replica() -> None:
        first = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0)
        values = [zero_unless(first, v) for v in variables]
        for v, value in zip(variables, sum_over_replicas(values), strict=True):
            v.assign(value)

    if strategy.num_replicas_in_sync > 1:
        tf.function(lambda: strategy.run(replica), autograph=False)()


def zero_unless(condition: tf.Tensor, x: Any) -> tf.Tensor:
    """A tensor or variable where a condition holds, and 0 elsewhere. Of `tf.zeros_like(x)`
    TensorFlow's graph optimizer would make a constant as large, and keep it."""
    return tf.where(condition, x, tf.zeros([], x.dtype))


def share_of(replicas: Any, dtype: Any = tf.float32) -> tf.Tensor:
    """What one of so many has in a mean."""
    exact = tf.float64 if tf.as_dtype(dtype) == tf.float64 else tf.float32
    return tf.cast(tf.math.reciprocal(tf.maximum(tf.cast(replicas, exact), 1)), dtype)


def means(sums: Sequence[tf.Tensor], replicas: tf.Tensor) -> list[tf.Tensor]:
    """Of sums over so many replicas."""
    shares = {dtype: share_of(replicas, dtype) for dtype in {x.dtype for x in sums}}
    return [x * shares[x.dtype] for x in sums]
