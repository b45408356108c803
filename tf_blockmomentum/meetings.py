"""Workers that wait for each other at different places, or for one that has gone: found, not hung.

Whatever communicates is a meeting: all workers have to come to it, and to the same ones in the
same order. A worker that evaluates the model alone waits at a meeting to which the others do not
come, and they at another. Nobody looks at that as long as nobody waits; a worker that has waited
for some seconds says where, and reads where the others wait.
"""

import atexit
import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import tensorflow as tf

from tf_blockmomentum._private import tensorflow as _tensorflow

PATIENCE = 3.0  # seconds until a worker says where it waits
_TELL = 30.0  # seconds until it says for whom
_POLL = 0.5


class Meetings:
    """Where this worker meets the others.

    Args:
        index: which worker this is.
        addresses: of all workers.
    """

    def __init__(self, index: int, addresses: Sequence[str]) -> None:
        self._index, self._addresses = index, list(addresses)
        self._number = 0
        self._place = ""  # "": at none
        self._since = 0.0
        self._problem = ""
        self._lock = threading.Lock()
        self._watch: threading.Thread | None = None

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Around what all workers have to call. Meetings within are part of it.

        Raises:
            RuntimeError: other workers are somewhere else, or have ended.
        """
        if len(self._addresses) < 2 or self._place:
            yield
            return
        if self._watch is None:
            self._watch = threading.Thread(target=self._look, daemon=True)
            self._watch.start()
            atexit.register(self._say_ended)
        with self._lock:
            self._number += 1
            self._place, self._since = place, time.monotonic()
        try:
            yield
        except tf.errors.OpError as error:
            if not self._problem and "collective" in str(error).lower():
                self._problem = self._difference(place, str(error))
                _tensorflow.tell_workers("failed", f"{self._number}:{self._problem}")
            if self._problem:
                raise RuntimeError(self._problem) from error
            raise
        finally:
            with self._lock:
                self._place = ""

    def _say_ended(self) -> None:
        _tensorflow.tell_workers("ended", f"{self._index}:{self._number}")

    def _look(self) -> None:
        told, named = 0, 0
        while not self._problem:
            time.sleep(_POLL)
            with self._lock:
                number, place, waits = self._number, self._place, time.monotonic() - self._since
            if not place or waits < PATIENCE:
                continue
            if told < number:
                told = number
                _tensorflow.tell_workers(f"at/{number}/{self._index}", place)
                _tensorflow.tell_workers(f"first/{number}", f"{self._index}:{place}")
            self._compare(number, place)
            if named < number and waits >= _TELL:
                named = number
                self._name_the_missing(number, place)

    def _compare(self, number: int, place: str) -> None:
        other, _, where = _tensorflow.told_by_workers(f"first/{number}").partition(":")
        if where and where != place:
            self._stop(number, self._apart(place, other, where))
            return
        failed, _, problem = _tensorflow.told_by_workers("failed").partition(":")
        if problem and int(failed) == number:
            self._stop(number, problem)
            return
        other, _, last = _tensorflow.told_by_workers("ended").partition(":")
        if last and int(last) < number:
            self._stop(
                number,
                f"Worker {self._index} waits at {place} for worker {other}, whose script has "
                "ended. What communicates (evaluate, predict, fit) has to be called by all "
                "workers, not only on the chief.",
            )

    def _apart(self, place: str, other: int | str, where: str) -> str:
        return (
            f"The workers wait for each other: worker {self._index} is at {place}, and worker "
            f"{other} at {where}. What communicates has to be called by all workers alike, not on "
            "the chief alone. (A callback in tfbm.ChiefOnly may read weights and save them; "
            "evaluate, predict and fit are for all workers.)"
        )

    def _difference(self, place: str, error: str) -> str:
        """After TensorFlow has found that the workers' collectives are unlike: what they are."""
        number, others = self._number, [i for i in range(len(self._addresses)) if i != self._index]
        _tensorflow.tell_workers(f"at/{number}/{self._index}", place)
        until = time.monotonic() + PATIENCE + 3  # the others have to notice first
        while time.monotonic() < until:
            for i in others:
                where = _tensorflow.told_by_workers(f"at/{number}/{i}")
                if where and where != place:
                    return self._apart(place, i, where)
        if "mismatch" not in error and " expected " not in error:
            return ""
        return (
            f"At {place}, the workers have values of unlike shapes or dtypes: "
            f"{error.partition('aborted by: ')[2].splitlines()[0]} All workers run the same "
            "script and build the same model; look for what depends on the worker (its files, its "
            "arguments, its number)."
        )

    def _stop(self, number: int, problem: str) -> None:
        with self._lock:
            if self._number != number or not self._place:
                return  # they have met
            self._problem = problem
        _tensorflow.abort_collectives(problem)

    def _name_the_missing(self, number: int, place: str) -> None:
        missing = [
            f"worker {i} ({address})"
            for i, address in enumerate(self._addresses)
            if i != self._index and not _tensorflow.told_by_workers(f"at/{number}/{i}")
        ]
        if missing:
            print(
                f"tf_blockmomentum: worker {self._index} has waited {_TELL:.0f} s at {place} for "
                f"{', '.join(missing)}",
                file=sys.stderr,
                flush=True,
            )
