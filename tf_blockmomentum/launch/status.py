"""What the workers of a job do now: for a terminal's last line, and for `--status`.

Every launcher has a folder, in the place for temporary files, in which its workers write their
last words (see `progress`). It also writes there who it is, and keeps that file locked: where it
is not, its launcher is gone.
"""

import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tf_blockmomentum import progress
from tf_blockmomentum.progress import Word

PREFIX = "tfbm-status-"
_JOB = "job.json"
_LONG = 2.0  # seconds in which a word is not worth its age
HAS_ENDED = Word(text="has ended")


class Folder:
    """Where the workers of one start write.

    Args:
        typed: the command that started the job.
    """

    def __init__(self, typed: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX)
        self._job: dict[str, Any] = {"pid": os.getpid(), "command": typed, "began": time.time()}
        self._lock: int | None = None

    def of(self, index: int) -> str:
        """A worker's file."""
        return _of(self._folder.name, index)

    def publish(self, pids: Mapping[int, int], workers: int, logs: str | None) -> None:
        """Says who the workers here are.

        Args:
            pids: process of each, by index.
            workers: how many the whole job has.
            logs: directory of their output; None: there is none.
        """
        logs = logs and os.path.abspath(logs)
        self._job |= {"pids": dict(pids), "workers": workers, "logs": logs}
        with contextlib.suppress(OSError):  # a full disk ends no training
            path = os.path.join(self._folder.name, _JOB)
            self._lock = os.open(path + "-part", os.O_WRONLY | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.write(self._lock, json.dumps(self._job).encode())
            os.rename(path + "-part", path)

    def remove(self) -> None:
        self._folder.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read(path: str, began: float) -> Word:
    """A worker's last word; it has been starting since the job was, if it has said none."""
    word = progress.read(path)
    return word if word.at else word._replace(at=began)


def show(which: str | None) -> int:
    """Prints a table for each job of this machine that runs; returns an exit status.

    Args:
        which: a launcher's process id, or its `--log-dir`; None: all.
    """
    found = list(_jobs())
    shown = [job for job in found if which is None or _is(job, which)]
    for job in shown:
        print(table(job), end="\n\n" if job is not shown[-1] else "\n")
    if shown:
        return 0
    where = f"in {tempfile.gettempdir()}, where launchers leave word (TMPDIR)"
    if which is None:
        said = f"no job of yours runs on this machine; looked {where}."
    else:
        running = ", ".join(str(job["pid"]) for job in found) or "none"
        said = (
            "--status takes the process id of a launcher that runs, or its --log-dir. Received: "
            f"{which!r}. Launchers {where}: {running}."
        )
    print(f"tfbm-launch: {said}", file=sys.stderr)
    return 1


def _is(job: dict[str, Any], which: str) -> bool:
    same = job["logs"] is not None and os.path.realpath(job["logs"]) == os.path.realpath(which)
    return which == str(job["pid"]) or same


def _jobs() -> Iterator[dict[str, Any]]:
    """The user's jobs that run (root's: everybody's): what their launchers said, with each
    worker's last word."""
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_JOB}")):
        with contextlib.suppress(OSError, ValueError), path.open() as file:
            if os.getuid() not in (0, os.fstat(file.fileno()).st_uid):
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                continue  # it was killed
            except BlockingIOError:
                job = json.load(file)
            job["words"] = {
                int(index): read(_of(str(path.parent), int(index)), job["began"])
                if _is_running(pid)
                else HAS_ENDED
                for index, pid in job["pids"].items()
            }
            yield job


def _of(folder: str, index: int) -> str:
    return os.path.join(folder, f"worker-{index}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def table(job: dict[str, Any]) -> str:
    """A job, and a line for each of its workers here."""
    now = time.time()
    here = job["words"]
    head = [f"job {job['pid']}: {job['command']}"]
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["began"]))
    head.append(f"started {since}, {_duration(now - job['began'])} ago")
    if len(here) < job["workers"]:
        head[-1] += f"; {len(here)} of its {job['workers']} workers are on this machine"
    if job["logs"]:
        head[-1] += f"; output in {job['logs']}"
    rows = [("worker", "epoch", "block", "s a block", "waiting", "last word")]
    for index, word in here.items():
        known = word.block_seconds > 0
        rows.append(
            (
                str(index),
                _epoch(word),
                str(word.block or "-"),
                _seconds(word) if known else "-",
                f"{100 * word.waiting:.0f} %" if known else "-",
                word.text + (f", {_duration(now - word.at)} ago" if word.at else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]
    return "\n".join([*head, *lines])


def line(words: Mapping[int, Word]) -> str:
    """Where the workers are, in one line: how far, and who does what."""
    now = time.time()
    parts = []
    furthest = max(words.values(), key=lambda word: (word.epoch, word.block))
    place = [f"epoch {_epoch(furthest)}"] if furthest.epoch else []
    place += [f"block {furthest.block}"] if furthest.block else []
    place += [f"{_seconds(furthest)} s a block"] if furthest.block_seconds else []
    parts += [", ".join(place)] if place else []
    groups: dict[str, list[int]] = {}
    for index, word in words.items():
        groups.setdefault(_doing(word.text), []).append(index)
    for doing, indices in groups.items():
        who = "all" if len(groups) == 1 else ",".join(map(str, indices))
        said = doing + _age(max((words[i] for i in indices), key=lambda word: word.at), now)
        parts.append(f"{who}: {said}" if len(words) > 1 else said)
    return " | ".join(parts)


def _age(word: Word, now: float) -> str:
    """For how long it does that already, where this says something."""
    age = now - word.at
    if not word.at or age < _LONG:
        return ""
    if _doing(word.text) == "trains":  # its last word is that a block had ended
        unusual = age > max(_LONG, 3 * word.block_seconds)
        return f" (silent for {_duration(age)})" if unusual else ""
    return f" ({_duration(age)})"


def _doing(text: str) -> str:
    return "trains" if text in ("ended a block", "landed a mean") else text


def _epoch(word: Word) -> str:
    if not word.epoch:
        return "-"
    return f"{word.epoch}/{word.epochs}" if word.epochs else str(word.epoch)


def _seconds(word: Word) -> str:
    return f"{word.block_seconds:.{3 if word.block_seconds < 1 else 1}f}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
