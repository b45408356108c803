"""Where a loop is in its data."""

import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_blockmomentum.feed import next_batch


class Data:
    """What a loop knows of the iterators that it is given.

    Args:
        strategy: whose iterators they are.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        # Batches taken from the present iterator. It is not kept alive: TensorFlow may wait
        # forever for one that is left over when the process ends.
        self._iterator: Callable[[], Any] = lambda: None
        self._taken = 0
        self._lookahead: tuple[Any, Any] | None = None  # (iterator, its next batch)
        self._finished: Callable[[], Any] = lambda: None  # whose end all replicas have reached

    def take_seen(self, iterator: Any) -> Any:
        """The iterator's next batch, if it has been taken from it already."""
        seen, self._lookahead = self._lookahead, None
        return seen[1] if seen and seen[0] is iterator else None

    def note_seen(self, iterator: Any, batch: Any) -> None:
        """The next batch has been taken from the iterator."""
        self._lookahead = (iterator, batch)

    def note_end(self, iterator: Any, over: bool) -> None:
        """All replicas have come to a last step. `over`: because there is no more data."""
        self._finished = weakref.ref(iterator) if over else lambda: None

    def count(self, iterator: Any, batches: int) -> None:
        """So many more of the iterator's batches have been trained on."""
        if self._iterator() is not iterator:
            self._iterator, self._taken = weakref.ref(iterator), 0
        self._taken += batches

    @property
    def batches(self) -> tuple[Any, int, bool]:
        """The present iterator, how many of its batches have been trained on, and whether
        one more has been taken from it already."""
        iterator = self._iterator()
        one_more = self._lookahead is not None and self._lookahead[0] is iterator
        return iterator, self._taken, one_more

    def has_finished(self, iterator: Any) -> bool:
        """Whether all replicas have come to the end of this iterator's data."""
        return self._finished() is iterator

    def skip(self, iterator: Any, count: int, taken: int = 0) -> None:
        """Takes `count` batches without training on them, on this worker alone; `taken`
        more have been taken from the iterator already."""
        strategy = self._strategy

        @tf.function(autograph=False)
        def take(iterator: Any, count: tf.Tensor) -> None:
            tf.while_loop(
                lambda i, more: tf.logical_and(i < count, more),
                lambda i, more: (i + 1, next_batch(iterator, strategy).has_value()),
                (tf.constant(0), tf.constant(True)),
            )

        if count:
            take(iterator, tf.constant(count))
        self.count(iterator, count + taken)
