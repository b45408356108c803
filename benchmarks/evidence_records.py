"""Recorded runs: one line of a CSV file each, written as soon as the run is over."""

import csv
import fcntl
import time
from pathlib import Path
from typing import Any

# What was run: a setting. `option` is anything else that the method was given.
SETTING = (
    "task", "method", "replicas", "sync_period", "block_momentum", "rate", "option", "seed",
)  # fmt: skip
# What came of it: losses are in nats (the language's are bits per byte), `samples` and `curve` go
# over training, a number an evaluation; `seconds` are to a target, empty where it was not reached.
RESULT = (
    "date", "boundaries", "training_loss", "validation_loss", "validation_accuracy", "test_loss",
    "test_accuracy", "samples", "curve", "seconds",
)  # fmt: skip
SEARCH = 100  # seeds from here on choose rates and beta; what is reported has others


class Records:
    """The runs of a study, kept in a file that several processes may append to.

    Args:
        path: the file; made when the first run is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[tuple, dict[str, str]] = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self._rows[key(row)] = row

    @property
    def rows(self) -> list[dict[str, str]]:
        """All runs."""
        return list(self._rows.values())

    def get(self, setting: dict[str, Any]) -> dict[str, str] | None:
        """The run of a setting, if there was one."""
        return self._rows.get(key(setting))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Writes down runs that have just ended."""
        now = time.strftime("%Y-%m-%d %H:%M")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = csv.DictWriter(file, SETTING + RESULT, restval="")
            if not file.tell():
                writer.writeheader()
            for row in rows:
                text = {name: str(value) for name, value in {**row, "date": now}.items()}
                writer.writerow(text)
                self._rows[key(row)] = text


def key(setting: dict[str, Any]) -> tuple:
    """What tells settings apart, as text."""
    return tuple(
        f"{float(setting[name]):g}" if name in ("block_momentum", "rate") else str(setting[name])
        for name in SETTING
    )


def best_rate(score, start, factor=2.0, most=9):
    """The rate of the lowest score on a ladder of rates, which is climbed until the best has a
    neighbour on either side that is worse.

    Args:
        score: function of a rate; what is not finite is the worst.
        start: the rate in the middle of the first three.
        factor: between neighbours.
        most: how many are tried at most.

    Returns:
        The rate, and the scores of all that were tried.
    """
    scores = {step: score(start * factor**step) for step in (-1, 0, 1)}
    while len(scores) < most:
        best = min(scores, key=lambda step: scores[step])
        missing = [step for step in (best - 1, best + 1) if step not in scores]
        if not missing:
            break
        scores[missing[0]] = score(start * factor ** missing[0])
    best = min(scores, key=lambda step: scores[step])
    return start * factor**best, {start * factor**step: scores[step] for step in sorted(scores)}
