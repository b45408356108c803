"""What a worker tells the launcher about itself: one line in a small file.

The launcher names the file in the environment. Without a launcher nothing is written.
"""

import contextlib
import os
import signal
import sys
import threading
import time

VARIABLE = "TFBM_STATUS_FILE"
PREEMPT_VARIABLE = "TFBM_PREEMPT_SIGNAL"  # number of one that means the same as SIGTERM
FAILED = "failed: "
JOINING = "waits for the other workers to start"
_WIDTH = 240  # bytes; of fixed length, so that a line is replaced as a whole


class _Reporter:
    """Writes "<count> <text>" over the file's only line."""

    def __init__(self, path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._count = 0

    def note(self, text):
        self._count += 1
        line = " ".join(f"{self._count} {text}".split()).encode()[: _WIDTH - 1]
        with contextlib.suppress(OSError):  # a full disk ends no training
            os.pwrite(self._descriptor, line.ljust(_WIDTH - 1) + b"\n", 0)


_reporter: _Reporter | None = None


def install():
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


def _end_with(parent):
    """A launcher that was killed cannot end its workers; they would wait for each other."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def keep_signal_handler():
    """TensorFlow's cluster puts a handler of its own in the place of SIGTERM's, which ends
    nothing: neither the process nor, where a script has one, would its handler run."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def note(text):
    """Says what this worker does now; each call counts as progress."""
    if _reporter is not None:
        _reporter.note(text)


def read(path):
    """What the worker of a file said last: (count, text); (0, "...") if nothing yet."""
    try:
        with open(path, "rb") as file:
            count, _, text = file.read().decode(errors="replace").strip().partition(" ")
        return int(count), text
    except (OSError, ValueError):
        return 0, "starting"


def _end_at_once(excepthook):
    """An uncaught exception ends the process at once, after its traceback: TensorFlow's own
    way out waits for the other workers, who wait for this one."""

    def hook(kind, error, traceback):
        excepthook(kind, error, traceback)
        lines = str(error).strip().splitlines() or [""]
        # TensorFlow's errors begin with "Graph execution error" and a traceback.
        line = next((line for line in lines if "aborted by" in line), lines[0])
        note(f"{FAILED}{kind.__name__}: {line}")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    return hook
