"""The batches that statistics are estimated from: the last of an epoch, or a dataset's."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum.feed import next_batch, on_host
from tf_blockmomentum.strategy import BlockStrategy


class LastBatches:
    """The last batches of an epoch that this worker has trained on.

    They are kept where they are, not copied: what is taken is their memory, until the epoch ends.
    A queue, because it is filled from within the compiled loop of local steps.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        with on_host():
            self._queue, self._foreseen = (
                tf.queue.FIFOQueue(size, [tf.variant, tf.int32], shapes=[(), ()])
                for size in (count, 2)
            )
        self._specs: list[Any] = []  # of Optionals; a fit may have other data than the last

    def add(self, batch: Any) -> None:
        """Keeps an Optional of a batch, in a graph or eagerly; the oldest leaves."""
        self._add(self._as_element(batch))

    def foresee(self, batch: Any) -> None:
        """Remembers an Optional of a batch that is asked for and may be trained on later."""
        with on_host():
            self._foreseen.enqueue(self._as_element(batch))

    def add_foreseen(self) -> None:
        """Keeps the batch that was foreseen first."""
        with on_host():
            self._add(self._foreseen.dequeue())

    def forget_foreseen(self) -> None:
        """Those that were foreseen are not trained on."""
        while self._foreseen.size() > 0:
            self._foreseen.dequeue()

    def _as_element(self, batch: Any) -> list[tf.Tensor]:
        spec = tf.type_spec_from_value(batch)
        if spec not in self._specs:
            self._specs.append(spec)
        (variant,) = tf.nest.flatten(batch, expand_composites=True)
        with on_host():
            return [variant, tf.constant(self._specs.index(spec))]

    def _add(self, element: list[tf.Tensor]) -> None:
        def drop() -> tf.Tensor:
            self._queue.dequeue()
            return tf.constant(True)

        with on_host():
            full = self._queue.size() >= self._count
            with tf.control_dependencies([tf.cond(full, drop, lambda: tf.constant(False))]):
                self._queue.enqueue(element)

    def take(self) -> list[Any]:
        """The batches, the oldest first, which are not kept any longer."""
        batches = []
        while self._queue.size() > 0:
            variant, spec = self._queue.dequeue()
            optional = tf.nest.pack_sequence_as(
                self._specs[int(spec)], [variant], expand_composites=True
            )
            batches.append(optional.get_value())
        return batches

    def arrays(self) -> dict[str, np.ndarray]:
        """The batches for a backup: an array of bytes for each tensor."""
        batches = self.take()
        for batch in batches:
            self.add(tf.experimental.Optional.from_value(batch))
        return {
            f"kept/{i}/{j}": np.frombuffer(tf.io.serialize_tensor(tensor).numpy(), np.uint8)
            for i, batch in enumerate(batches)
            for j, tensor in enumerate(tf.nest.flatten(batch, expand_composites=True))
        }

    def restore(self, arrays: Mapping[str, Any], element_spec: Any) -> None:
        """The reverse of `arrays`, of batches of `element_spec`."""
        self.take()
        specs = tf.nest.flatten(element_spec, expand_composites=True)
        for i in range(self._count):
            if f"kept/{i}/0" not in arrays:
                return
            tensors = [
                tf.io.parse_tensor(arrays[f"kept/{i}/{j}"].tobytes(), spec.dtype)
                for j, spec in enumerate(specs)
            ]
            batch = tf.nest.pack_sequence_as(element_spec, tensors, expand_composites=True)
            self.add(tf.experimental.Optional.from_value(batch))


def batches_of(data: Any, strategy: tf.distribute.Strategy) -> Iterator[Any]:
    """This worker's batches of a distributed dataset, of an iterator over one (those left), or of
    an iterable of batches, without communication."""
    if isinstance(data, tf.data.Dataset | tf.distribute.DistributedDataset):
        data = iter(data)
    if not isinstance(data, tf.data.Iterator | tf.distribute.DistributedIterator):
        yield from data
        return
    while (following := next_batch(data, strategy)).has_value():
        yield following.get_value()


def distributed(dataset: Any, strategy: tf.distribute.Strategy) -> Iterator[Any]:
    if not isinstance(dataset, tf.data.Dataset | tf.distribute.DistributedDataset):
        raise TypeError(
            "refresh_statistics takes a tf.data dataset in batches, or a distributed one. "
            f"Received: {type(dataset).__name__}. For arrays: "
            "tf.data.Dataset.from_tensor_slices(x).batch(32)."
        )
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "The dataset has to have an end. Received: a dataset that repeats for ever. Use "
            "dataset.take(16)."
        )
    if isinstance(strategy, BlockStrategy) and isinstance(dataset, tf.data.Dataset):
        dataset = strategy.experimental_distribute_dataset(dataset)
    return batches_of(dataset, strategy)
