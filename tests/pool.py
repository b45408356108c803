"""Worker processes that stay up for a whole session of tests, and run what is sent to them.

    def test_x(pair):  # or `triple`; fixtures of conftest.py
        values = pair.run(function, 0.1, reduction="mean")

calls `function(strategy, 0.1, reduction="mean")` on each of two real workers and returns what
it returned there, in the order of the workers. A start costs seconds of imports, a call next to
nothing. `strategy` is the worker's MultiWorkerBlockStrategy, of which a process can have only
one. The function is found by its module and name, so it stands at the top level of a module of
this folder; a test's own will do. Arguments and results travel by pickle.

The workers' Keras state and the strategy's `compression` are as new for each call. Their warnings
filters are the test's, marks included: an unexpected warning is an error.
"""

import contextlib
import multiprocessing.connection
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import Any

from tf_blockmomentum import launch

HERE = pathlib.Path(__file__).parent
START_SECONDS = 120.0  # a limit
SETTLE_SECONDS = 5.0  # after one worker's error, for others that fail alike
STACK_SECONDS = 1.0  # for the stacks of workers that hang
SHOWN = 8000  # of a failed worker's output, the last characters
ENDED, HANGS = "the process has ended", "no answer"  # types of failures beside exceptions


@dataclass
class Raised:
    """An exception in a worker: its type's name, its text, the whole traceback, and when."""

    type: str
    text: str
    traceback: str = ""
    at: float = 0.0

    @classmethod
    def from_exception(cls, error: BaseException) -> "Raised":
        whole = "".join(traceback.format_exception(error))
        return cls(type(error).__name__, str(error), whole, time.monotonic())

    def is_a_consequence(self) -> bool:
        """Whether this is how a worker fails because another one has."""
        names = ("UnavailableError", "DeadlineExceededError", "AbortedError", "CancelledError")
        return self.type in names or "aborted by" in self.text


class WorkerError(Exception):
    """What went wrong in the workers: the first cause in full, then the others."""


class Pool:
    """Workers that are started by the first `run`, and again by the next after a failure.

    Attributes:
        workers: how many.
        output: list, what each worker wrote to stdout and stderr in the last `run`,
            TensorFlow's C++ included.
        filters: list of warnings filters in pytest's notation, set for each `run`.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.output = [""] * workers
        self.filters: list[str] = []
        self._running: list[_Worker] = []

    def run(self, function, *args, limit: float = 60, expect_error: bool = False, **kwargs):
        """Calls `function(strategy, *args, **kwargs)` on every worker.

        Args:
            limit: seconds until workers without an answer print their Python stacks and
                are ended.
            expect_error: every worker has to raise an exception, and these are the results.

        Returns:
            List of the workers' results; with `expect_error` of `Raised`.

        Raises:
            WorkerError: a worker raised an exception, hung or ended. The workers go on only
                if all of them raised alike and can still reduce together.
        """
        call = pickle.dumps((function, args, kwargs, self.filters))
        if any(worker.process.poll() is not None for worker in self._running):
            self.end()  # since the last run, which had its results
        try:
            if not self._running:
                self._start()
            answers = self._ask(call, limit, settle=limit if expect_error else SETTLE_SECONDS)
        except BaseException:  # pytest's own time limit, Ctrl-C
            self.end()
            raise
        failures = {i: a for i, a in enumerate(answers) if isinstance(a, Raised)}
        if not failures:
            if expect_error:
                raise WorkerError(f"No worker raised an exception. They returned: {answers!r}")
            return answers
        message = self._describe(failures)
        types = {failure.type for failure in failures.values()}
        alike = len(failures) == self.workers and len(types) == 1 and not types & {ENDED, HANGS}
        if not alike or not self._is_in_step():
            self.end()
        if expect_error and alike:
            return answers
        raise WorkerError(message)

    def end(self) -> None:
        """Ends the workers; the next `run` starts others."""
        for worker in self._running:
            worker.end()
        self._running = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def _start(self) -> None:
        for environment in launch.environments(launch.free_ports(self.workers)):
            self._running.append(_Worker(environment))
        answers = self._ask(None, START_SECONDS, SETTLE_SECONDS)
        failures = {i: a for i, a in enumerate(answers) if isinstance(a, Raised)}
        if failures:
            raise WorkerError("The workers did not start. " + self._describe(failures))

    def _is_in_step(self) -> bool:
        """Whether a collective still works, after errors."""
        output = self.output
        try:
            call = pickle.dumps((_sum_of_ones, (), {}, []))
            return self._ask(call, 10, 0) == [float(self.workers)] * self.workers
        finally:
            self.output = output

    def _ask(self, call: bytes | None, limit: float, settle: float) -> list[Any]:
        """Sends a call (None: nothing) to all; returns each one's result or `Raised`."""
        answers: dict[int, Any] = {}
        for worker in self._running:
            worker.begin(call)
        began = time.monotonic()
        until = began + limit
        while len(answers) < self.workers:
            waiting: dict[Any, int] = {
                w.connection: i for i, w in enumerate(self._running) if i not in answers
            }
            left = until - time.monotonic()
            ready = multiprocessing.connection.wait(list(waiting), max(left, 0))
            for connection in ready:
                index = waiting[connection]
                answers[index] = answer = self._running[index].answer()
                if isinstance(answer, Raised):
                    until = min(until, time.monotonic() + settle)
            if not ready and left <= 0:
                seconds = time.monotonic() - began
                for index in waiting.values():
                    self._running[index].ask_for_stack()
                time.sleep(STACK_SECONDS)
                for index in waiting.values():
                    answers[index] = self._running[index].hanging(seconds)
        self.output = [worker.printed() for worker in self._running]
        return [answers[index] for index in range(self.workers)]

    def _describe(self, failures: dict[int, Raised]) -> str:
        """The cause in full, with its worker's output; the others in a line, but for stacks."""
        order = sorted(failures, key=lambda i: (failures[i].is_a_consequence(), failures[i].at))
        lines = []
        for index in order:
            failure = failures[index]
            lines.append(f"Worker {index} of {self.workers}: {failure.type}: {failure.text}")
            if index == order[0] or failure.type == HANGS:
                lines.append(failure.traceback)
            if index == order[0]:
                lines += [f"Output of worker {index}:", self.output[index][-SHOWN:]]
        good = [str(index) for index in range(self.workers) if index not in failures]
        if good:
            lines.append(f"Without an error: worker {', '.join(good)}.")
        return "\n".join(lines)


def _sum_of_ones(strategy):
    import tensorflow as tf

    return float(strategy.reduce("SUM", tf.ones([]), axis=None))


class _Worker:
    """One process, its pipe and the file that it writes to."""

    def __init__(self, environment: dict[str, str]):
        self.connection, other = multiprocessing.connection.Pipe()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._from = 0  # where the output of the call begins,
        self._stack_from: int | None = None  # and where it ends, if its stack follows
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        # One thread each: there are more workers than cores.
        threads = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
        with contextlib.closing(other):
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "pool_worker.py"), str(other.fileno())],
                env={
                    "TF_CPP_MIN_LOG_LEVEL": "2",
                    **threads,
                    **os.environ,
                    "PYTHONPATH": path,
                    "PYTHONUNBUFFERED": "1",  # its lines stand among those of C++
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=self._file,
                stderr=self._file,
                pass_fds=[other.fileno()],
                start_new_session=True,  # Ctrl-C is for pytest, which ends them
            )

    def begin(self, call: bytes | None) -> None:
        self._from, self._stack_from = self._size(), None
        if call is not None:
            with contextlib.suppress(OSError):  # it has ended: `answer` tells
                self.connection.send_bytes(call)

    def answer(self) -> Any:
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            status = self.process.wait(timeout=10)
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            return Raised(ENDED, name, at=time.monotonic())

    def ask_for_stack(self) -> None:
        self._stack_from = self._size()
        self.process.send_signal(signal.SIGUSR1)

    def hanging(self, seconds: float) -> Raised:
        """What to say of a worker that has been asked for its stack."""
        stack = self._read(self._stack_from or 0, self._size())
        return Raised(HANGS, f"in {seconds:.0f} s, here it is:", stack, time.monotonic())

    def printed(self) -> str:
        end = self._size() if self._stack_from is None else self._stack_from
        return self._read(self._from, end)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _read(self, begin: int, end: int) -> str:
        # Not by seek and read: the process has the same offset.
        return os.pread(self._file.fileno(), end - begin, begin).decode(errors="replace")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self._file.close()
