"""The workers of one start of a job: begun, watched and ended."""

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

from tf_blockmomentum import progress
from tf_blockmomentum.launch import cluster
from tf_blockmomentum.launch.chatter import LOG_LEVEL
from tf_blockmomentum.launch.failures import PREEMPTED, Failure, in_order, reason
from tf_blockmomentum.launch.output import Output, WorkerOutput
from tf_blockmomentum.launch.patience import Patience
from tf_blockmomentum.launch.status import HAS_ENDED, Folder, line, read

SETTLE_SECONDS = 0.3  # after the first failure, for others of the same moment
_POLL_SECONDS = 0.02
_SILENT_SECONDS, _SHOW_SECONDS = 2.0, 0.5  # of the line that says where the workers are


class Job:
    """The workers of one start.

    Args:
        command: list of strings, what every worker runs.
        worker_environments: the environment variables of each worker to start here.
        output: where their lines go.
        preempt_signal: one that means the same as SIGTERM to a worker.
        typed: the command that started the job.
    """

    def __init__(
        self,
        command: list[str],
        worker_environments: list[dict[str, str]],
        output: Output,
        preempt_signal: int = signal.SIGTERM,
        typed: str = "",
    ) -> None:
        self._command, self._environments, self._output = command, worker_environments, output
        self._preempt_signal = preempt_signal
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._outputs: dict[int, WorkerOutput] = {}
        self._addresses: dict[int, str] = {}
        self._words: dict[int, progress.Word] = {}
        self._folder = Folder(typed or shlex.join(command))
        self._began = time.time()
        self._first_progress = self._last_progress = time.monotonic()
        self._show_next = 0.0
        self._joined = False
        self.workers = 0  # of the whole job, on all machines

    def start(self) -> None:
        """Starts every worker."""
        others: dict[int, str] = {}
        for environment in self._environments:
            (kind, index), addresses = cluster.members(environment["TF_CONFIG"])
            own = addresses.get((kind, index), "")
            self.workers = len(addresses) or 1
            self._addresses[index] = own
            others |= {i: address for (_, i), address in addresses.items() if address != own}
            output = self._output.open(index, first=not self._processes)
            self._outputs[index] = output
            self._processes[index] = subprocess.Popen(
                self._command,
                env={
                    **os.environ,
                    **cluster.without_proxy(addresses.values()),
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONFAULTHANDLER": "1",  # SIGABRT then prints the Python stack
                    LOG_LEVEL: os.environ.get(LOG_LEVEL, "2"),
                    progress.VARIABLE: self._folder.of(index),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=output.stdout,
                stderr=output.stderr,
                start_new_session=True,  # a process group of its own, ended as a whole
            )
            output.start(functools.partial(_has_ended_well, self._processes[index]))
        pids = {index: process.pid for index, process in self._processes.items()}
        self._folder.publish(pids, self.workers, self._output.directory)
        remote = {i: address for i, address in others.items() if i not in self._processes}
        self._patience = Patience(self._addresses, remote, self._output.screen.say)

    def wait(self, hang_timeout: float | None, interrupted: Callable[[], object]) -> list[Failure]:
        """Returns the failures, the first one first; none if all is done."""
        since = time.monotonic()
        while True:
            failures = self._failures()
            if failures:
                time.sleep(SETTLE_SECONDS)
                known = {failure.worker for failure in failures}
                failures += [f for f in self._failures() if f.worker not in known]
                return self._stopped() or in_order(failures)
            if interrupted() or all(p.returncode == 0 for p in self._processes.values()):
                return []
            if self._listen():
                since = time.monotonic()
            elif hang_timeout and time.monotonic() - since > hang_timeout:
                return self._hung(hang_timeout)
            running = dict(self._running_words())
            self._patience.look(running)
            self._show(running)
            for output in self._outputs.values():
                output.resize()
            time.sleep(_POLL_SECONDS)

    def _listen(self) -> bool:
        """Reads every worker's last word; returns whether any is new."""
        words = {index: read(self._folder.of(index), self._began) for index in self._processes}
        new, self._words = words != self._words, words
        if new:
            self._last_progress = time.monotonic()
            # 1: it waits for the others; 2: it has joined them, or failed.
            has_joined = any(
                word.number > 2 - (not word.text.startswith(progress.FAILED))
                for word in words.values()
            )
            if has_joined and not self._joined:
                self._joined, self._first_progress = True, self._last_progress
        return new

    def _show(self, running: dict[int, progress.Word]) -> None:
        """On a terminal on which nothing has moved for a while: where the workers are."""
        now, screen = time.monotonic(), self._output.screen
        if screen.has_line and screen.silent_seconds > _SILENT_SECONDS and now > self._show_next:
            self._show_next = now + _SHOW_SECONDS
            screen.show_line(line({i: running.get(i, HAS_ENDED) for i in self._processes}))

    def _running_words(self) -> Iterator[tuple[int, progress.Word]]:
        return (
            (index, self._words[index])
            for index, process in self._processes.items()
            if process.poll() is None
        )

    @property
    def progress_seconds(self) -> float:
        """From when the workers met to the last sign of progress."""
        return self._last_progress - self._first_progress if self._joined else 0.0

    def taken_address(self) -> str | None:
        """After the end: an address that somebody else has taken before its worker could."""
        local = [a for a in self._addresses.values() if a.startswith("127.0.0.1:")]
        if self._joined:
            return None
        return next((address for address in local if cluster.is_taken(address)), None)

    def _failure(self, index: int, status: int, why: str) -> Failure:
        return Failure(index, status, why, self._addresses[index], self._began)

    def _failures(self) -> list[Failure]:
        """Those that have ended badly, or are about to."""
        found = []
        for index, process in self._processes.items():
            status = process.poll()
            text = progress.read(self._folder.of(index)).text
            error = text.removeprefix(progress.FAILED) if text.startswith(progress.FAILED) else ""
            if status is None and error:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=SETTLE_SECONDS)
                status = status or 1
            if status:
                signalled, status = status < 0, status if status > 0 else 128 - status
                if signalled and status - 128 == self._preempt_signal:
                    status = PREEMPTED
                found.append(self._failure(index, status, reason(status, error, signalled)))
        return found

    def _stopped(self) -> list[Failure]:
        """Workers that others take for dead because they are stopped."""
        return [
            self._failure(index, 128 + signal.SIGSTOP, "is stopped (SIGSTOP)")
            for index, process in self._processes.items()
            if process.poll() is None and _is_stopped(process.pid)
        ]

    def _hung(self, hang_timeout: float) -> list[Failure]:
        running = dict(self._running_words())
        stuck = [i for i, word in running.items() if not word.text.startswith(progress.WAITS)]
        failures = []
        for index in stuck or running:
            process = self._processes[index]
            stopped = _is_stopped(process.pid)
            what = (
                "it is stopped (SIGSTOP)" if stopped else f"its last word: {running[index].text}"
            )
            why = f"is stuck: no progress in {hang_timeout:g} s, {what}"
            failures.append(self._failure(index, 128 + signal.SIGABRT, why))
            self._output.screen.say(f"worker {index} is stuck; its Python stack:")
            with contextlib.suppress(ProcessLookupError):
                _no_core_dump(process.pid)
                os.kill(process.pid, signal.SIGABRT)
                os.kill(process.pid, signal.SIGCONT)  # one that is stopped has to wake for it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=2)
        return failures

    def end(self, grace: float, at_once: Callable[[], bool] = lambda: False) -> None:
        """Ends what is left of every worker.

        Args:
            grace: seconds after which everything is gone. Workers get SIGTERM first, and what
                is left of their process groups SIGKILL in the end.
            at_once: asked again and again; once it is true nobody waits any longer.
        """
        # The last moments are for the kernel and for what the workers wrote.
        deadline = time.monotonic() + grace - min(1.0, grace / 4)
        processes = self._processes.values()
        for index, process in self._processes.items():
            if process.poll() is None:
                # While it joins the others it has nothing to save, and TensorFlow hears nothing.
                joining = progress.read(self._folder.of(index)).text == progress.JOINING
                process.send_signal(signal.SIGKILL if joining else signal.SIGTERM)
                process.send_signal(signal.SIGCONT)  # one that is stopped has to wake for it
        while time.monotonic() < deadline and not at_once():
            if all(process.poll() is not None for process in processes):
                break
            for output in self._outputs.values():
                output.resize()
            time.sleep(_POLL_SECONDS)
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
                process.wait(timeout=5)
        for output in self._outputs.values():
            output.join(timeout=1)
        self._folder.remove()

    def add_last_lines(self, failures: list[Failure]) -> None:
        """Adds to failures what their workers wrote last, once all is read."""
        for failure in failures:
            output = self._outputs[failure.worker]
            failure.last_lines, failure.shown = output.last_lines(), output.shown


def _has_ended_well(process: subprocess.Popen[bytes]) -> bool:
    """Of one that has closed its output; or it was preempted and ended in order."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=1) in (0, PREEMPTED)
    return False


def _no_core_dump(pid: int) -> None:
    with contextlib.suppress(ImportError, AttributeError, OSError):  # not Linux, or gone
        import resource

        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:  # not Linux, or gone
        return False
