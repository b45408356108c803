"""Draws timelines: each worker a row of what it does, and below it what travels meanwhile."""

from collections.abc import Sequence
from typing import Any

from tf_blockmomentum.report.timeline import (
    BACKUP,
    FLIGHT,
    FLUSH,
    LAND,
    LEAVE,
    STEPS,
    VALIDATION,
    WAIT,
    read,
)

# Told apart by the colour-blind too (Okabe and Ito).
COLOURS = {
    STEPS: "#56B4E9",
    LEAVE: "#E69F00",
    FLIGHT: "#D55E00",
    WAIT: "#CCCCCC",
    LAND: "#F0C808",
    VALIDATION: "#009E73",
    BACKUP: "#CC79A7",
    FLUSH: "#6A5ACD",
}
_HEIGHT, _THIN = 0.6, 0.25
SECONDS = 2.0  # shown, unless said otherwise


def draw(
    paths: Sequence[str],
    target: str,
    titles: Sequence[str] = (),
    begin: float | None = None,
    seconds: float | None = None,
) -> None:
    """Draws timelines below each other, on one scale of time.

    Args:
        paths: of files of `BlockReport(timeline=...)`.
        target: the picture's path; its ending says which kind.
        titles: one for each; their paths by default.
        begin: where to begin, in seconds; by default with the last epoch's first block.
        seconds: how much of it to draw; by default eight blocks, but at most two seconds.

    Raises:
        ValueError: a file is no timeline, nothing happens in that time, or matplotlib cannot
            write such a picture.
        ImportError: there is no matplotlib.
    """
    matplotlib = import_matplotlib()
    everything = [read(path) for path in paths]
    begins = [_typical(events) if begin is None else begin for events in everything]
    if seconds is None:
        seconds = max(_eight_blocks(e, b) for e, b in zip(everything, begins, strict=True))
    shown = [
        [e for e in events if e["ts"] < (b + seconds) * 1e6 and e["ts"] + e["dur"] > b * 1e6]
        for events, b in zip(everything, begins, strict=True)
    ]
    for path, events in zip(paths, shown, strict=True):
        if not events:
            raise ValueError(
                f"Nothing happens in {path} between {begin} s and {seconds} s later. Its last "
                f"event ends at {max(e['ts'] + e['dur'] for e in read(path)) / 1e6:.3g} s."
            )
    rows = [len({event["pid"] for event in events}) for events in shown]
    figure = matplotlib.figure.Figure(figsize=(10, 0.9 + sum(0.6 + 0.5 * n for n in rows)))
    axes = figure.subplots(len(paths), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    titles = titles or paths
    for ax, events, title, start in zip(axes, shown, titles, begins, strict=True):
        _draw(ax, events, start, seconds)
        ax.set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("seconds")
    kinds = [kind for kind in COLOURS if any(e["name"] == kind for es in shown for e in es)]
    handles = [matplotlib.patches.Patch(color=COLOURS[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(kinds), frameon=False,
                  fontsize=9)  # fmt: skip
    save(figure, target)


def import_matplotlib() -> Any:
    """matplotlib, or an ImportError with the remedy."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.patches
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed. Install it: pip install matplotlib."
        ) from error
    return matplotlib


def save(figure: Any, target: str) -> None:
    """Writes a picture; a ValueError says which kinds there are, or why it cannot be written."""
    figure.set_layout_engine("constrained")
    try:
        figure.savefig(target, dpi=150)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"A picture cannot be written to {target!r}: {error}. Give a path such as "
            '"timeline.png", in a folder that exists.'
        ) from error


def _draw(ax: Any, events: list[dict[str, Any]], start: float, seconds: float) -> None:
    workers = sorted({event["pid"] for event in events})
    for event in sorted(events, key=lambda e: e["name"] == STEPS, reverse=True):
        row, flight = workers.index(event["pid"]), event["name"] == FLIGHT
        low, height = (row + _HEIGHT / 2, _THIN) if flight else (row - _HEIGHT / 2, _HEIGHT)
        bar = (event["ts"] / 1e6 - start, event["dur"] / 1e6)
        ax.broken_barh([bar], (low, height), color=COLOURS[event["name"]], linewidth=0)
    ax.set_yticks(range(len(workers)), [f"worker {int(worker)}" for worker in workers])
    ax.set_ylim(len(workers) - 1 + _HEIGHT / 2 + _THIN + 0.1, -_HEIGHT / 2 - 0.1)
    ax.set_xlim(0, seconds)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _typical(events: list[dict[str, Any]]) -> float:
    """Where the last epoch begins, in which nothing is compiled: after the last pause of the
    first worker's steps that has a validation or a flush in it, or in the middle."""
    first = min(e["pid"] for e in events)
    steps = sorted(e["ts"] for e in events if e["pid"] == first and e["name"] == STEPS)
    pauses = [e["ts"] + e["dur"] for e in events if e["pid"] == first and e["name"] == VALIDATION]
    for pause in sorted(pauses, reverse=True):
        later = [ts for ts in steps if ts >= pause]
        if len(later) > 1:
            return later[0] / 1e6
    return steps[len(steps) // 2] / 1e6 if steps else 0.0


def _eight_blocks(events: list[dict[str, Any]], begin: float) -> float:
    """How long eight blocks take from there."""
    flights = [e for e in events if e["name"] == FLIGHT and e["ts"] >= begin * 1e6]
    blocks = sorted({e["args"]["block"] for e in flights})[:8]
    ends = [e["ts"] + e["dur"] for e in flights if e["args"]["block"] in blocks]
    return min(max(ends) / 1e6 - begin, SECONDS) if ends else SECONDS
