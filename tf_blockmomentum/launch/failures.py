"""Why a job ended: each worker's failure, which of them came first, and how it is told."""

import contextlib
import dataclasses
import signal
import socket
import time

PREEMPTED = 128 + signal.SIGTERM


@dataclasses.dataclass
class Failure:
    """How one worker failed.

    Attributes:
        worker: its index.
        status: its exit status, 128 + n for signal n.
        reason: in words, with what follows "worker 1".
        address: its host and port.
        began: when its job was started, in seconds since 1970.
        seen: when the launcher saw it, likewise.
        last_lines: of its output: the end of its traceback.
        shown: whether its output is on the screen.
    """

    worker: int
    status: int
    reason: str
    address: str = ""
    began: float = 0.0
    seen: float = dataclasses.field(default_factory=time.time)
    last_lines: list[str] = dataclasses.field(default_factory=list)
    shown: bool = False

    def __str__(self) -> str:
        return f"worker {self.worker} {self.reason}"


def in_order(failures: list[Failure]) -> list[Failure]:
    """The cause first, and then those who failed because of it."""
    return sorted(failures, key=_rank)


def _rank(failure: Failure) -> tuple[bool, bool]:
    names = ("Unavailable", "DeadlineExceeded", "Aborted", "Cancelled")
    # One that was killed or crashed had no part in the others' end. TensorFlow aborts, though,
    # where it loses the others.
    numbers = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGTERM)
    killed = failure.status - 128 in numbers
    return not killed, any(f"({name}Error" in failure.reason for name in names)


def reason(status: int, error: str = "", signalled: bool = False) -> str:
    """How a worker ended, in words.

    Args:
        status: its exit status, 128 + n for signal n.
        error: what it said of its exception.
        signalled: whether a signal ended it.
    """
    if status == PREEMPTED:
        return f"was preempted ({'SIGTERM' if signalled else f'exit status {status}'})"
    how = signal_name(status - 128) if signalled else f"exit status {status}"
    return f"failed with {how}" + (f" ({error})" if error else "")


def signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def account(failures: list[Failure], workers: int, logs: list[str], command: str) -> str:
    """What stands last on the screen when a job has failed.

    Args:
        failures: in order, at least one.
        workers: how many the job had.
        logs: files with the workers' output.
        command: what the user typed.
    """
    first, *others = failures
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.seen))
    rows = [
        ("worker", f"{first.worker} of {workers} on {socket.gethostname()} ({first.address})"),
        ("reason", first.reason),
        ("time", f"{when}, {first.seen - first.began:.0f} s after its start"),
    ]
    if others:
        rows.append(("then", "; ".join(map(str, others))))
    if logs:
        rows.append(("output", ", ".join(logs)))
    if command:
        rows.append(("go on", command))
        rows.append(("", "from its last complete backup if it uses tfbm.BlockBackup"))
    lines = [f"  {title:<8}{text}" for title, text in rows]
    if first.last_lines:
        lines[3:3] = ["  its last lines:", *indented(first.last_lines)]
    rule = "-" * 72
    what = "was preempted. What ended" if first.status == PREEMPTED else "has failed. What failed"
    return "\n".join([rule, f"The job {what} first:", *lines, rule])


def indented(lines: list[str]) -> list[str]:
    """Lines of a worker's output, none of them endless."""
    return [f"    | {line[:300]}{' ...' if len(line) > 300 else ''}" for line in lines]
