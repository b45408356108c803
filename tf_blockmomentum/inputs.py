"""Datasets on their way to the replicas."""

from typing import Any

import tensorflow as tf

# TensorFlow's distributed iterators take no None, an optional input that is not given (tensorflow
# issue 54900). A dtype that no model has stands for it on the way.
_NONE = tf.qint32


def mark_none(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def mark(*element: Any) -> Any:
        leaves = tf.nest.flatten(element)
        size = tf.shape(next(leaf for leaf in leaves if isinstance(leaf, tf.Tensor)))[0]
        none = tf.bitcast(tf.zeros([size], tf.int32), _NONE)
        marked = tf.nest.map_structure(lambda leaf: none if leaf is None else leaf, element)
        return marked if len(marked) > 1 else marked[0]

    specs = tf.nest.flatten(dataset.element_spec)
    return dataset.map(mark) if any(isinstance(s, tf.NoneTensorSpec) for s in specs) else dataset


def copied(*element: Any) -> Any:
    """A batch in memory of its own. A generator's arrays are used where they are, and a replica's
    part of one could be overwritten by the step that has it: the user's sample weights were."""

    def copy(leaf: Any) -> Any:
        kept = not isinstance(leaf, tf.Tensor) or leaf.dtype in (_NONE, tf.variant)
        return leaf if kept else tf.raw_ops.DeepCopy(x=leaf)

    copies = tf.nest.map_structure(copy, element)
    return copies if len(copies) > 1 else copies[0]


def none_for_marks(data: Any) -> Any:
    """Puts None back where a dataset had it; of tensors or of their specs."""
    return tf.nest.map_structure(
        lambda leaf: None if getattr(leaf, "dtype", None) == _NONE else leaf, data
    )


def no_device_buffer() -> tf.distribute.InputOptions:
    """Input options without which a worker crashed in one of some 60 fits on busy machines.

    With a buffer on the device, TensorFlow's default, a thread of its own reads ahead. If the
    iterator is deleted meanwhile, as Keras does at the end of every evaluation, the thread can
    read freed memory (DatasetBaseIterator::GetNext, from BackgroundThread in
    multi_device_iterator_ops.cc). Without a buffer it reads only while it is waited for.
    """
    return tf.distribute.InputOptions(experimental_per_replica_buffer_size=0)


def check_global_batch(size: int | None, strategy: tf.distribute.Strategy) -> None:
    """Raises ValueError unless the replicas can share out batches of `size` (None: unknown)."""
    replicas = strategy.num_replicas_in_sync
    if size and size % replicas:
        share = -(-size // replicas)
        raise ValueError(
            f"The global batch must divide by the number of replicas. Received: batches of "
            f"{size} for {replicas} replicas. Use a multiple of {replicas}, such as "
            f"batch_size={replicas * share}; each replica then gets {share} examples a step."
        )


def examples_of(data: Any) -> Any:
    """How many examples a batch has: an int where that is certain, 1 if it has no such number."""
    for leaf in tf.nest.flatten(data):
        if isinstance(leaf, tf.Tensor) and leaf.shape.rank:
            return leaf.shape[0] or tf.shape(leaf)[0]
        if isinstance(leaf, tf.RaggedTensor):
            return tf.cast(leaf.nrows(), tf.int32)
        if isinstance(leaf, tf.SparseTensor):
            return tf.cast(leaf.dense_shape[0], tf.int32)
    return 1
