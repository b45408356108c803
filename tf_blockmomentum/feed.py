"""The next batch, and its way to the replica's device."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_blockmomentum._private.tensorflow import plain_iterator
from tf_blockmomentum.strategy import BlockStrategy

# The next batch of an iterator, if it has one left: an Optional. Where it is copied to a device:
# whether there is a batch (1 or 0: unlike a bool, TensorFlow keeps an int32 on the host), and its
# tensors on the device.
Next = tuple[Any, ...]


class Feed:
    """Gets a worker's batches from an iterator to its replicas.

    To a device, a batch's copy is asked for beside the step before its own, and is made while that
    computes, unless all of that step has been launched by then: a copy to a GPU waits for what
    has. A thread that reads ahead, as TensorFlow's iterators for devices have one, can read freed
    memory (see `no_device_buffer`); here the steps' own graph does it. Costs the device the
    memory of a batch.

    No Optional goes through a branch or a loop that is not the host's, nor out of a function:
    TensorFlow would place that on the GPU, and bring the batch back to ask whether there is one.

    Args:
        strategy: whose iterators they are.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self.kept: Any = None  # the LastBatches of those that are trained on, if they are wanted
        self._foreseen = False  # whether an execution has asked for the first batch of the next

    def copies(self, iterator: Any) -> bool:
        """Whether its batches are copied to a device, which is done ahead of their steps."""
        return self._device(iterator) is not None

    def begin(self, iterator: Any, first: Next | None, peek: bool) -> None:
        """Before an execution, which begins with `first`. A batch that was asked for and is not
        taken is forgotten: Keras has gone on to another iterator."""
        if first is None and self._foreseen and self.kept is not None:
            self.kept.forget_foreseen()
        self._foreseen = peek and self.copies(iterator)

    def ask(self, iterator: Any) -> Next:
        """The next batch, in a graph; its copy to the device is on its way."""
        batch = next_batch(iterator, self._strategy)
        if not self.copies(iterator):
            return (batch,)
        keep = None if self.kept is None else self.kept.foresee
        with on_host():
            some, *tensors = _opened(batch, keep)
        return (some, *self._sent(iterator, tensors))

    def spec(self, iterator: Any, following: Next) -> Any:
        """The spec of a batch."""
        if _is_optional(following[0]):
            return following[0].element_spec
        return (plain_iterator(iterator) or iterator).element_spec

    def note(self, following: Next) -> tf.Tensor:
        """Whether there is a batch, 1 or 0, which will then be trained on."""
        batch = following[0]
        with on_host():
            some = tf.cast(batch.has_value(), tf.int32) if _is_optional(batch) else batch
            if self.kept is not None:
                if_any(some, lambda: self._keep(batch), lambda: tf.constant(0))
            return some

    def _keep(self, batch: Any) -> tf.Tensor:
        if _is_optional(batch):
            self.kept.add(batch)
        else:
            self.kept.add_foreseen()
        return tf.constant(0)

    def open(self, iterator: Any, following: Next) -> list[tf.Tensor]:
        """Whether there is a batch, 1 or 0, and its tensors, without a meaning if there is none.
        It will be trained on."""
        if _is_optional(following[0]):
            with self._aside(iterator):
                return _opened(following[0], self.kept and self.kept.add)
        self.note(following)
        return list(following)

    def take(self, iterator: Any, spec: Any, wanted: tf.Tensor) -> list[tf.Tensor]:
        """As `open` of the next batch, which is of this spec, if that is wanted."""
        keep = None if self.kept is None else self.kept.add

        def ask() -> Any:
            return _opened(next_batch(iterator, self._strategy), keep)

        with self._aside(iterator):
            some, *tensors = tf.cond(wanted, ask, lambda: _none(spec))
        return [some, *self._sent(iterator, tensors)]

    @staticmethod
    def batch(following: Next, spec: Any) -> Any:
        """The batch, where there is one."""
        batch, *tensors = following
        return batch.get_value() if _is_optional(batch) else batch_of(spec, tensors)

    def _device(self, iterator: Any) -> str | None:
        """The device of a worker's only replica, unless it is the host, or TensorFlow's own
        iterator brings the batches there."""
        device = self._replicas_device
        if device is None or not isinstance(self._strategy, BlockStrategy):
            return device
        return device if plain_iterator(iterator) is not None else None

    @functools.cached_property
    def _replicas_device(self) -> str | None:
        """The first replica's device, unless it is the host; asked for at every execution."""
        if not isinstance(self._strategy, BlockStrategy):
            return "GPU:0" if tf.config.list_logical_devices("GPU") else None
        device = tf.DeviceSpec.from_string(self._strategy.extended.worker_devices[0])
        name = f"{device.device_type}:{device.device_index}"
        return None if name == "CPU:0" else name

    def _aside(self, iterator: Any) -> contextlib.AbstractContextManager[Any]:
        """Around what concerns Optionals: on the host, unless TensorFlow's own iterator has
        brought the batches to the devices already."""
        brought = isinstance(self._strategy, BlockStrategy) and plain_iterator(iterator) is None
        return contextlib.nullcontext() if brought else on_host()

    def _sent(self, iterator: Any, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """A copy of them on the replica's device; themselves, if they stay where they are."""
        device = self._device(iterator)
        if device is None:
            return tensors
        with tf.device(device):
            # TensorFlow's graph optimizer takes an Identity for superfluous, also between devices,
            # and each use of the batch would have a copy of its own.
            return [
                t if t.dtype in (tf.string, tf.variant) else tf.stop_gradient(t) for t in tensors
            ]


def if_any(number: tf.Tensor, some: Callable[[], Any], none: Callable[[], Any]) -> Any:
    """A branch, on 1 or 0. An int32, since TensorFlow copies a bool to a GPU to branch on it, and
    so what is in the branch would wait for all copies before that."""
    return tf.switch_case(number, [none, some])


def is_there(following: Next) -> bool:
    """Whether there is a batch, after the execution that asked for it."""
    batch = following[0]
    return bool(batch.has_value() if _is_optional(batch) else batch > 0)


def _is_optional(batch: Any) -> bool:
    return isinstance(batch, tf.experimental.Optional)


def _opened(batch: Any, keep: Callable[[Any], Any] | None) -> list[tf.Tensor]:
    def there() -> Any:
        if keep is not None:
            keep(batch)
        value = tf.nest.flatten(batch.get_value(), expand_composites=True)
        return [tf.constant(1), *(tensor for tensor in value if tensor is not None)]

    return tf.cond(batch.has_value(), there, lambda: _none(batch.element_spec))


def batch_of(spec: Any, tensors: Sequence[tf.Tensor]) -> Any:
    """The batch of which these are the tensors."""
    for tensor, part in zip(tensors, _parts(spec), strict=True):
        tensor.set_shape(part.shape)
    return tf.nest.pack_sequence_as(spec, tensors, expand_composites=True)


def shapes_of(spec: Any) -> list[tf.TensorShape]:
    """Of what `open` and `take` return: what a batch and no batch have in common."""
    return [
        tf.TensorShape([]),
        *(
            tf.TensorShape([None] * part.shape.rank) if part.shape.rank else part.shape
            for part in _parts(spec)
        ),
    ]


def _parts(spec: Any) -> list[tf.TensorSpec]:
    return tf.nest.flatten(spec, expand_composites=True)


def _none(spec: Any) -> list[tf.Tensor]:
    """No batch. Without elements: TensorFlow makes zeros a constant, and keeps it."""
    return [
        tf.constant(0),
        *(
            tf.raw_ops.OptionalNone()
            if part.dtype == tf.variant
            else tf.zeros([0] * (part.shape.rank or 0), part.dtype)
            for part in _parts(spec)
        ),
    ]


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Around what decides where a graph goes on, and what Python reads of it after each execution.
    On a GPU it would wait in the queue for all steps before it, and the host for it, so that no
    step is launched ahead."""
    return tf.device("CPU:0")


def next_batch(iterator: Any, strategy: tf.distribute.Strategy) -> Any:
    """The iterator's next batch as an Optional, asking this worker only."""
    if not isinstance(strategy, BlockStrategy):
        with on_host():
            return iterator.get_next_as_optional()
    plain = plain_iterator(iterator)
    if plain is not None:
        with on_host():
            return plain.get_next_as_optional()
    with strategy.local_input():
        return iterator.get_next_as_optional()
