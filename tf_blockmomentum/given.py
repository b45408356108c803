"""What fit and predict are given as data."""

import warnings
import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum.boundary.header import crc
from tf_blockmomentum.strategy import worker_of


def _leaves(x: Any) -> list[Any]:
    """The arrays of some data; none if it is a dataset or a generator."""
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    return leaves if all(getattr(leaf, "shape", None) is not None for leaf in leaves) else []


def batch_size(x: Any, wanted: dict[str, Any]) -> int | None:
    """Of the batches that fit will make of its data; None if that is not known."""
    if isinstance(x, tf.data.Dataset):
        size = tf.raw_ops.ComputeBatchSize(input_dataset=tf.data.experimental.to_variant(x))
        return int(size) if size > 0 else None
    if isinstance(x, keras.utils.PyDataset):
        first = _leaves(x[0])
        return len(first[0]) if first else None
    leaves, size, steps = _leaves(x), wanted.get("batch_size"), wanted.get("steps_per_epoch")
    if not leaves or size:
        return size
    return -(-int(leaves[0].shape[0]) // steps) if steps else 32  # Keras's default


def fingerprint(x: Any, y: Any) -> int:
    """A checksum of arrays: shapes, first and last rows."""
    leaves = _leaves((x, y))
    try:
        parts = [[np.array(leaf.shape), np.asarray(leaf[:8]), np.asarray(leaf[-8:])]
                 for leaf in leaves]  # fmt: skip
        return crc([array for part in parts for array in part])
    except (TypeError, ValueError, KeyError):  # data frames, sparse and ragged tensors
        return 0


_iterators: weakref.WeakSet[Any] = weakref.WeakSet()  # that an earlier fit was given


def note_iterator(x: Any, strategy: tf.distribute.Strategy) -> None:
    """Warns of a generator that an earlier fit has had: workers have read it ahead by different
    amounts, so that each would go on with other batches than the others share out."""
    if not hasattr(x, "__next__") or worker_of(strategy)[1] == 1:
        return
    try:
        used = x in _iterators
        _iterators.add(x)
    except TypeError:  # an iterator that cannot be referred to weakly
        return
    if used:
        warnings.warn(
            f"fit was given a {type(x).__name__} that an earlier fit has read from. Workers read "
            "ahead by different amounts, so they may now share out different batches, of which "
            "some examples are used twice and others never. Make it anew for each fit.",
            stacklevel=2,
        )


def in_order(x: Any, strategy: tf.distribute.Strategy) -> Any:
    """Data of which each worker takes its part of every batch, so that the results come in the
    dataset's order. TensorFlow would share out the files where a dataset reads files."""
    if worker_of(strategy)[1] == 1:
        return x
    policy = tf.data.experimental.AutoShardPolicy
    if isinstance(x, tf.data.Dataset):
        chosen = x.options().experimental_distribute.auto_shard_policy
        if chosen in (policy.AUTO, policy.DATA):
            options = tf.data.Options()
            options.experimental_distribute.auto_shard_policy = policy.DATA
            return x.with_options(options)
    elif not isinstance(x, tf.distribute.DistributedDataset):
        return x
    warn_of_order()
    return x


def warn_of_order() -> None:
    """Says in which order predictions come."""
    warnings.warn(
        "predict's rows come in the order in which the workers hold them: batch by batch, in each "
        "batch those of worker 0, of worker 1, and so on. For the order of a dataset give predict "
        "that dataset, undistributed, with no auto_shard_policy of its own.",
        stacklevel=2,
    )
