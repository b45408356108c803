"""Sums over the replicas."""

import tensorflow as tf

from tf_blockmomentum.boundary.packing import pack, unpack

_AT_ONCE = 2  # messages on their way; see packing


def sum_over_replicas(tensors):
    """Sums each tensor over all replicas, in replica context: a few large messages.

    Adds one packed copy of `tensors` to memory while it runs.

    Args:
        tensors: list of floating point tensors, of the same shapes on every replica.

    Returns:
        List of the sums, of the same shapes and dtypes.
    """
    return unpack(sum_packs(pack(tensors)), tensors)


def sum_packs(packs):
    """Sums flat tensors over all replicas, in replica context, a few at a time: each has buffers
    of its own in TensorFlow's transport while it travels."""
    context = tf.distribute.get_replica_context()
    sums: list = []
    for i, flat in enumerate(packs):
        arrived = [sums[i - _AT_ONCE]] if i >= _AT_ONCE else []
        with tf.control_dependencies(arrived):
            flat = tf.identity(flat)  # in any case: an argument alone has no device
        sums.append(context.all_reduce(tf.distribute.ReduceOp.SUM, flat))
    return sums
