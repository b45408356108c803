"""Where fit is in its data: private of Keras, since no callback can get hold of its iterator."""

from collections.abc import Callable, Iterator
from typing import Any

import keras


class Epochs:
    """What fit's own epoch iterator, of which no callback can get hold, knows and can be told.

    Counts the iterators that fit makes, one or two an epoch: each draws the next seed of a
    dataset that reshuffles, so that a new process has to draw as many.
    """

    def __init__(self, epoch_iterator: Any) -> None:
        self._epochs = epoch_iterator
        self._made = 0
        self._get = epoch_iterator._get_iterator
        epoch_iterator._get_iterator = self._counting

    def _counting(self) -> Any:
        self._made += 1
        return self._get()

    @property
    def element_spec(self) -> Any:
        return self._get().element_spec

    def state(self, epoch_ended: bool) -> dict[str, Any]:
        """A dict for `resume`: whole numbers and None."""
        epochs = self._epochs
        goes_on = not epoch_ended or (
            epochs.steps_per_epoch is not None and epochs._current_iterator is not None
        )
        return {
            "goes_on": goes_on,  # with the iterator it has
            "iterators": self._made - goes_on,  # before that one
            "fresh": epoch_ended and epochs._steps_seen == 0,  # and it has given nothing yet
            "steps_seen": epochs._steps_seen,
            "num_batches": epochs._num_batches,
        }

    def resume(self, state: dict[str, Any], step: int, restore: Callable[[Any], None]) -> None:
        """Makes the next epoch begin at `step`, from an iterator given to `restore`."""
        epochs = self._epochs
        if epochs._num_batches is None:  # found out when the data first ended
            epochs._num_batches = state["num_batches"]
        original = epochs._enumerate_iterator

        def from_step() -> Iterator[tuple[int, int, Any]]:
            del epochs._enumerate_iterator  # this epoch only
            for _ in range(state["iterators"]):
                iter(self._counting())
            first = True
            for begin, end, iterator in original():
                if begin < step:
                    continue
                if first and state["goes_on"]:
                    epochs._steps_seen = state["steps_seen"] + epochs.steps_per_execution
                    restore(iterator)
                first = False
                yield begin, end, iterator

        epochs._enumerate_iterator = from_step


def epochs_of(model: keras.Model) -> Epochs:
    """The `Epochs` of the fit that is beginning."""
    return Epochs(model._tfbm_epoch_iterator())


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """As `BackupAndRestore` does; None takes it back, or the next fit would begin there too."""
    model._initial_epoch = epoch
