"""What a loop tells somebody who wants to know what its time goes to."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf


class Observer:
    """Listens to nothing; base of those that listen.

    A loop has one, told of what the host calls (`span`), asked for numbers that travel in the
    boundary's header (`tell`), and told what all replicas have said there (`told`).
    """

    # Whether the replicas measure their deltas, and time the parts of a boundary.
    measures = False

    def span(
        self, name: str, traces: Callable[[], int] | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """Around something that takes time.

        Args:
            name: "steps", "wait", or the name of a replica's function at a boundary.
            traces: how often what is called has been traced so far.
        """
        return contextlib.nullcontext()

    def tell(self, replica: Any) -> dict[str, float]:
        """At the end of a block: this worker's numbers for the header, by name.

        Args:
            replica: the `Boundary`.
        """
        return {}

    def told(self, numbers: Mapping[str, Any], replica: Any) -> None:
        """The header of a block that has arrived.

        Args:
            numbers: the replicas', by name.
            replica: the `Boundary`, of which `measuring` is of this block.
        """


def called_by_host(
    strategy: tf.distribute.Strategy,
    observer: Callable[[], Observer],
    replica_fn: Callable[..., Any],
) -> Callable[..., Any]:
    """A function that runs another in all replicas of this process, compiled, and tells whoever
    observes by then."""

    @functools.wraps(replica_fn)
    def on_replicas(*args: Any) -> Any:
        return strategy.run(replica_fn, args=args)

    function = tf.function(on_replicas, autograph=False)
    traces = function.experimental_get_tracing_count

    def observed(*args: Any) -> Any:
        with observer().span(replica_fn.__name__, traces):
            return function(*args)

    observed.experimental_get_tracing_count = traces  # type: ignore[attr-defined]
    observed.get_concrete_function = function.get_concrete_function  # type: ignore[attr-defined]
    return observed
