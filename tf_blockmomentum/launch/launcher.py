"""Runs a job to its end: starts it, starts it again, and ends it in order when told to."""

import signal
import threading
from collections.abc import Callable

from tf_blockmomentum.launch.failures import PREEMPTED, Failure, account, indented, signal_name
from tf_blockmomentum.launch.job import Job
from tf_blockmomentum.launch.output import Output

GRACE_SECONDS = 30.0  # Kubernetes and Slurm give as much before they kill
FAILED_GRACE_SECONDS = 1.0  # after a failure: the others wait for one that will not come
RENEW_SECONDS = 3600.0
_OTHER_PORTS = 5  # times that ports are chosen anew
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Environments = Callable[[int], list[dict[str, str]]]


class Launcher:
    """Runs a job to its end, starting it again as often as allowed.

    Args:
        command: list of strings, what every worker runs.
        max_restarts: how often to start the job again after a failure.
        hang_timeout: seconds without progress of any worker after which it has failed; None:
            never.
        log_dir: directory for `worker-I.log`; None: with `output="first"` a temporary one that
            is kept if the job fails, with "all" none.
        output: "first": the first worker's output as it is; "all": everybody's lines, numbered.
        grace: seconds within which everything is gone after SIGTERM or Ctrl-C.
        preempt_signal: number of a signal that means the same as SIGTERM; None: SIGTERM alone.
        renew_seconds: restarts are counted from zero again after so much progress in one start.
        go_on: command that starts the job again, for the account of a failure.
        quiet: whether to leave out that account, since the caller tells of `failures` itself.

    Attributes:
        failures: those of the last start, the first one first.
        interrupted: number of the signal that ended the job, or None.
    """

    def __init__(
        self,
        command: list[str],
        max_restarts: int = 0,
        hang_timeout: float | None = None,
        log_dir: str | None = None,
        output: str = "all",
        grace: float = GRACE_SECONDS,
        preempt_signal: int | None = None,
        renew_seconds: float = RENEW_SECONDS,
        go_on: str = "",
        quiet: bool = False,
    ) -> None:
        self._command = command
        self._max_restarts = max_restarts
        self._hang_timeout = hang_timeout
        self._output = Output(output, log_dir)
        self._grace = grace
        self._preempt_signal = preempt_signal or signal.SIGTERM
        self._renew_seconds = renew_seconds
        self._go_on = go_on
        self._quiet = quiet
        self._signal: int | None = None  # handlers only note it: nothing is left half done
        self._at_once = False
        self.failures: list[Failure] = []
        self.interrupted: int | None = None

    @property
    def logs(self) -> list[str]:
        """Files with the workers' output, if they were kept."""
        return self._output.logs

    def run(
        self, make_environments: Environments, count: int = 1, least: int = 1, most: int = 1
    ) -> int:
        """Runs the job; returns the exit status of the whole.

        Args:
            make_environments: function from a number of workers to the environment variables
                of those to start here; called for every start, since ports may be in use.
            count: how many workers to begin with, from `least` to `most`.
            least: never go on with fewer.
            most: how many SIGUSR1 asks for.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():  # no other may
            for number in {*_ENDING, signal.SIGUSR1, self._preempt_signal}:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and shells ask for
                    before[number] = signal.signal(number, self._note_signal)
        status = 1
        try:
            status = self._run(make_environments, count, least, most)
        finally:
            self._output.screen.show_line("")
            self._output.close(keep=status != 0)
            for number, handler in before.items():
                signal.signal(number, handler)
        return status

    def _run(self, make_environments: Environments, count: int, least: int, most: int) -> int:
        restarts, culprit, other_ports = 0, None, 0
        while True:
            job = self._run_once(make_environments(count))
            number, self._signal = self._signal, None
            if number in _ENDING:
                self.interrupted = number
                return self._interrupted(number)
            if number == signal.SIGUSR1:
                count, culprit = most, None
                self._output.screen.say(f"starting again as asked, workers: {count}")
                continue
            if not self.failures:
                return 0
            address = job.taken_address()
            if address and other_ports < _OTHER_PORTS:
                other_ports += 1
                self._output.screen.say(f"{address} was taken meanwhile; choosing other ports")
                continue
            if job.progress_seconds >= self._renew_seconds:
                restarts = 0
            first = self.failures[0].worker
            if restarts == self._max_restarts:
                return self._failed(job.workers, restarts)
            restarts += 1
            self._tell()
            following: int | None = first
            if first == culprit and count > least:
                count, following = count - 1, None
            culprit = following
            self._say(f"restart {restarts} of {self._max_restarts}, workers: {count}")

    def _run_once(self, environments: list[dict[str, str]]) -> Job:
        job = Job(self._command, environments, self._output, self._preempt_signal, self._go_on)
        self._at_once = False
        grace = FAILED_GRACE_SECONDS
        try:
            job.start()
            self.failures = job.wait(self._hang_timeout, lambda: self._signal)
            preempted = bool(self.failures) and self.failures[0].status == PREEMPTED
            if self._signal or preempted:
                grace = self._grace
            if self._signal in _ENDING:
                name = signal_name(self._signal)
                again = "; Ctrl-C ends them at once" if self._signal == signal.SIGINT else ""
                self._say(f"{name}: the workers have {grace:g} s to end{again}")
        finally:
            job.end(min(grace, self._grace), lambda: self._at_once)
        job.add_last_lines(self.failures)
        return job

    def _interrupted(self, number: int) -> int:
        self._say(f"interrupted by {signal_name(number)}; ended all workers")
        if self._go_on:
            self._say(f"go on with: {self._go_on}")
        if self.logs:
            self._say(f"output: {', '.join(self.logs)}")
        return 128 + number

    def _failed(self, workers: int, restarts: int) -> int:
        self._tell(last_lines=False)
        self._say(f"ended all workers, restarts: {restarts}")
        text = account(self.failures, workers, self.logs, self._go_on)
        if not self._quiet:
            self._output.screen.say(text, prefix="")
        return self.failures[0].status

    def _tell(self, last_lines: bool = True) -> None:
        for failure in self.failures:
            self._say(str(failure))
        first = self.failures[0]
        if last_lines and not first.shown and first.last_lines:
            self._say(f"the last lines of worker {first.worker}:")
            self._output.screen.say("\n".join(indented(first.last_lines)), prefix="")

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._output.screen.say(text)

    def _note_signal(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self._signal in _ENDING:
            self._at_once = True
        if number == self._preempt_signal:
            number = signal.SIGTERM
        if self._signal not in _ENDING:
            self._signal = number
