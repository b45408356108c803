"""What a worker tells the launcher about itself: one line in a small file.

The launcher names the file in the environment. Without a launcher nothing is written.
"""

import collections
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

VARIABLE = "TFBM_STATUS_FILE"
PREEMPT_VARIABLE = "TFBM_PREEMPT_SIGNAL"  # number of one that means the same as SIGTERM
FAILED = "failed: "
JOINING = "waits for the other workers to start"
WAITS = "waits"  # how the words begin of one that waits for others
_WIDTH = 512  # bytes; of fixed length, so that a line is replaced as a whole
_BLOCKS = 9  # that seconds a block and the share of waiting are of


class Word(NamedTuple):
    """What a worker said last.

    Attributes:
        number: how many words it has said.
        text: what it does.
        at: when it said so, in seconds since 1970.
        epoch: from 1; 0: none yet.
        epochs: how many there will be; 0: not known.
        block: blocks ended so far.
        block_seconds: of one block, the median of the last few; 0: not known.
        waiting: share of their time, from 0 to 1, from the end of this worker's own steps to
            the end of the boundary: it waits for others, or for the network.
    """

    number: int = 0
    text: str = "starting"
    at: float = 0.0
    epoch: int = 0
    epochs: int = 0
    block: int = 0
    block_seconds: float = 0.0
    waiting: float = 0.0


class _Reporter:
    """Writes a word over the file's only line."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._word = Word()
        self._blocks: collections.deque[tuple[float, float]] = collections.deque(maxlen=_BLOCKS)
        self._began = self._waits_since = self._waited = 0.0

    def note(self, text: str, **place: Any) -> None:
        now = time.monotonic()
        if self._waits_since:
            self._waited += now - self._waits_since
        self._waits_since = now if text.startswith(WAITS) else 0.0
        if "block" in place:
            place |= self._block(now)
        text = " ".join(text.split())
        self._word = self._word._replace(
            number=self._word.number + 1, text=text, at=time.time(), **place
        )
        line = b""
        while not line or len(line) >= _WIDTH:
            line = json.dumps(self._word._replace(text=text)).encode()
            text = text[: max(len(text) * 3 // 4, 1)]
        with contextlib.suppress(OSError):  # a full disk ends no training
            os.pwrite(self._descriptor, line.ljust(_WIDTH - 1) + b"\n", 0)

    def _block(self, now: float) -> dict[str, float]:
        """A block has ended."""
        if self._began:
            self._blocks.append((now - self._began, self._waited))
        self._began, self._waited = now, 0.0
        if not self._blocks:
            return {}
        seconds = [taken for taken, _ in self._blocks]
        waited = sum(w for _, w in self._blocks)
        return {
            "block_seconds": sorted(seconds)[len(seconds) // 2],
            "waiting": min(1.0, waited / sum(seconds)),
        }


_reporter: _Reporter | None = None


def install() -> None:
    """Starts reporting, if a launcher asks for it."""
    global _reporter
    number = os.environ.get(PREEMPT_VARIABLE)
    if number and threading.current_thread() is threading.main_thread():
        signal.signal(int(number), lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    path = os.environ.pop(VARIABLE, None)  # not for processes that this one starts
    if path and _reporter is None:
        _reporter = _Reporter(path)
        sys.excepthook = _end_at_once(sys.excepthook)
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A launcher that was killed cannot end its workers; they would wait for each other."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def keep_signal_handler() -> None:
    """TensorFlow's cluster puts a handler of its own in the place of SIGTERM's, which ends
    nothing: neither the process nor, where a script has one, would its handler run."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def note(text: str) -> None:
    """Says what this worker does now; each call counts as progress."""
    if _reporter is not None:
        _reporter.note(text)


def note_epoch(epoch: int, epochs: int) -> None:
    """An epoch begins.

    Args:
        epoch: its number, from 1.
        epochs: how many there will be; 0: not known.
    """
    if _reporter is not None:
        _reporter.note(f"began epoch {epoch}", epoch=epoch, epochs=epochs)


def note_block(blocks: Callable[[], int]) -> None:
    """A block has ended.

    Args:
        blocks: function that returns how many have; called if somebody wants to know.
    """
    if _reporter is not None:
        _reporter.note("ended a block", block=blocks())


def read(path: str) -> Word:
    """What the worker of a file said last; that it is starting if nothing yet."""
    with contextlib.suppress(OSError):
        for _ in range(3):  # it may be written meanwhile
            with open(path, "rb") as file, contextlib.suppress(ValueError, TypeError):
                return Word(*json.loads(file.read()))
    return Word()


def _end_at_once(
    excepthook: Callable[[type[BaseException], BaseException, TracebackType | None], Any],
) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """An uncaught exception ends the process at once, after its traceback: TensorFlow's own
    way out waits for the other workers, who wait for this one."""

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        excepthook(kind, error, traceback)
        lines = str(error).strip().splitlines() or [""]
        # TensorFlow's errors begin with "Graph execution error" and a traceback.
        line = next((line for line in lines if "aborted by" in line), lines[0])
        note(f"{FAILED}{kind.__name__}: {line}")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    return hook
