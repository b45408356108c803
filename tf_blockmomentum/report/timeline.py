"""A timeline of all workers in one file, in the Trace Event Format of chrome://tracing."""

import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tf_blockmomentum.report.recorder import Span

STEPS, LEAVE, FLIGHT, WAIT, LAND, VALIDATION, BACKUP, FLUSH = (
    "local steps", "leave", "under way", "wait", "land", "validation", "backup", "flush",
)  # fmt: skip
# By the name of what was called; a boundary as a whole is the sum of its parts.
_NAMES = {
    "steps": STEPS,
    "leave": LEAVE,
    "transport": FLIGHT,
    "send_again": LEAVE,
    "wait": WAIT,
    "begin": LAND,
    "land": LAND,
    "land_within": LAND,
    "land_statistics": LAND,
    "settle": FLUSH,
    "align": FLUSH,
    "validation": VALIDATION,
    "backup": BACKUP,
}
KINDS = (STEPS, LEAVE, FLIGHT, WAIT, LAND, VALIDATION, BACKUP, FLUSH)
_MARK = -1  # the kind of a row that says when an all-reduce ended


def check_path(path: str) -> None:
    """Raises ValueError if no file can be written there."""
    folder = os.path.dirname(path) or "."
    problem = ""
    if os.path.isdir(path):
        problem = "a folder has this name"
    elif not os.path.isdir(folder):
        problem = f"there is no folder {folder!r}"
    if problem:
        raise ValueError(
            f'`timeline` must be a file that can be written, such as "trace.json". Received: '
            f"timeline={path!r}, and {problem}."
        )


def encode(spans: "Sequence[Span]", marks: Sequence[tuple[int, float]]) -> np.ndarray:
    """As whole numbers, to be gathered.

    Returns:
        Array of shape [spans and marks, 4]: kind, number of the block, begin and end in
        microseconds.
    """
    rows = [
        (KINDS.index(_NAMES[s.name]), s.block, round(s.begin * 1e6), round(s.end * 1e6))
        for s in spans
        if s.name in _NAMES
    ]
    rows += [(_MARK, number, round(at * 1e6), 0) for number, at in marks]
    return np.array(rows, np.int64).reshape(-1, 4)


def aligned(workers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every worker's rows of `encode` without marks, in the first one's time: the all-reduce of a
    block ended everywhere at the same moment, but for milliseconds."""
    first = {row[1]: row[2] for row in workers[0] if row[0] == _MARK}
    found = []
    for rows in workers:
        offsets = [row[2] - first[row[1]] for row in rows if row[0] == _MARK and row[1] in first]
        spans = rows[rows[:, 0] != _MARK].copy()
        spans[:, 2:] -= int(np.median(offsets)) if offsets else 0
        found.append(spans)
    return found


class Trace:
    """Writes a timeline, epoch by epoch: what a run that fails has written can be read.

    Args:
        path: of the file, which is begun anew.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._file.write("[\n")
        self._start: int | None = None
        self._named: set[int] = set()

    def add(self, workers: Sequence[np.ndarray]) -> None:
        """What has been gathered of an epoch: each worker's rows of `encode`."""
        spans = aligned(workers)
        if self._start is None:
            self._start = min((int(rows[:, 2].min()) for rows in spans if len(rows)), default=0)
        for worker, rows in enumerate(spans):
            for event in _events(worker, rows, self._start, worker not in self._named):
                self._file.write(json.dumps(event) + ",\n")
            self._named.add(worker)
        self._file.flush()

    def close(self) -> None:
        """Completes the file."""
        end = {"name": "end", "ph": "M", "pid": 0, "args": {}}
        self._file.write(json.dumps(end) + "\n]\n")
        self._file.close()


def _events(worker: int, rows: np.ndarray, start: int, new: bool) -> Iterator[dict[str, Any]]:
    if new:
        yield {
            "name": "process_name",
            "ph": "M",
            "pid": worker,
            "args": {"name": f"worker {worker}"},
        }
        for thread, name in enumerate(("training", "messages")):
            yield {
                "name": "thread_name", "ph": "M", "pid": worker, "tid": thread,
                "args": {"name": name},
            }  # fmt: skip
    for kind, block, begin, end in rows.tolist():
        name = KINDS[kind]
        yield {
            "name": name, "ph": "X", "cat": "block", "pid": worker, "tid": int(name == FLIGHT),
            "ts": begin - start, "dur": end - begin, "args": {"block": block},
        }  # fmt: skip


def read(path: str) -> list[dict[str, Any]]:
    """The events of a timeline, one that was not completed too.

    Raises:
        ValueError: the file is no timeline of ours.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read().strip()
    if text.startswith("[") and not text.endswith("]"):
        text = text[: text.rfind("}") + 1] + "]" if "}" in text else "[]"
    try:
        events = json.loads(text)
        found = [e for e in events if e.get("ph") == "X" and e["name"] in KINDS]
        for event in found:
            event["ts"], event["dur"], event["pid"] = map(
                float, (event["ts"], event["dur"], event["pid"])
            )
    except (ValueError, TypeError, KeyError, AttributeError):
        found = []
    if not found:
        raise ValueError(
            f"This is no timeline, or an empty one. Received: {path}. Give the file that "
            "tfbm.BlockReport(timeline=...) has written."
        )
    return found
