"""What a search found: a table of its trials and a heat map of K by beta."""

import math
import os
from typing import Any

import numpy as np

from tf_blockmomentum.published import published_rules


def results_table(tuner: Any) -> str:
    """The trials as the lines of a table, the best first, as text.

    `measured_seconds` is this machine's training time without tracing and validation;
    `predicted_seconds`, there with a `bandwidth`, is the cost model's for that link.

    Args:
        tuner: a KerasTuner tuner after, or in the middle of, a search.

    Returns:
        One string of several lines.
    """
    trials = tuner.oracle.get_best_trials(len(tuner.oracle.trials))
    names = [hp.name for hp in tuner.oracle.get_space().space]
    metrics = [m for trial in trials for m in trial.metrics.metrics]
    metrics = [m for m in dict.fromkeys(metrics) if m != tuner.oracle.objective.name]
    rows = [["trial", "status", *names, tuner.oracle.objective.name, *metrics]]
    for trial in trials:
        values = [trial.hyperparameters.values.get(name) for name in names]
        at_best = [_at_step(trial, metric) for metric in metrics]
        rows.append([trial.trial_id, trial.status, *values, trial.score, *at_best])
    cells = [[as_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def _at_step(trial: Any, metric: str) -> float | None:
    return trial.metrics.get_last_value(metric) if trial.metrics.exists(metric) else None


def as_text(cell: str | float | None) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.4g}"


def heat_map(tuner: Any, path: str | os.PathLike[str], replicas: int) -> None:
    """Draws K by beta, coloured by the objective, and writes it to a file.

    A cell is the mean of its completed trials; a cross is a trial that failed. Marked are
    the best trial and, as lines, the two published rules for beta at this number of
    replicas. With `time_to_target`, trials that never reached the target are grey.

    Args:
        tuner: a KerasTuner tuner of a `BlockMomentumHyperModel`, after a search.
        path: file to write, such as "heat_map.png" (needs matplotlib).
        replicas: P, for the published rules.

    Raises:
        ValueError: no trial was completed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    space = {hp.name: list(hp.values) for hp in tuner.oracle.get_space().space}
    periods, momenta = space["sync_period"], space["block_momentum"]
    objective = tuner.oracle.objective
    lost = getattr(objective, "give_up", math.inf)
    scores: dict[tuple[int, int], list[float]] = {}
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.9 * len(periods), 1.5 + 0.5 * len(momenta)))

    def place(trial: Any) -> tuple[int, int]:
        values = trial.hyperparameters.values
        return periods.index(values["sync_period"]), momenta.index(values["block_momentum"])

    for trial in tuner.oracle.trials.values():
        if trial.status == "COMPLETED":
            scores.setdefault(place(trial), []).append(float(trial.score))
        elif trial.status in ("FAILED", "INVALID"):
            axes.plot(*place(trial), "x", color="black", markersize=9)
    if not scores:
        raise ValueError(
            f"There is nothing to draw. Received: a search with {len(tuner.oracle.trials)} trials "
            "of which none was completed. Let the search run first, or see the trials' messages."
        )
    grid = np.full([len(momenta), len(periods)], np.nan)
    for (x, y), values in scores.items():
        mean = np.mean(values)
        missed = mean >= lost
        axes.text(
            x,
            y,
            "not reached" if missed else f"{mean:.3g}",
            ha="center",
            va="center",
            fontsize=7,
            color="white",
            bbox={"facecolor": "black", "alpha": 0.45, "lw": 0, "pad": 1.5},
        )
        grid[y, x] = np.nan if missed else mean
        if missed:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color="lightgrey"))
    colours = "viridis" if objective.direction == "max" else "viridis_r"
    image = axes.imshow(grid, cmap=colours, origin="lower", aspect="auto")
    figure.colorbar(image, label=objective.name)
    best = tuner.oracle.get_best_trials(1)[0]
    x, y = place(best)
    axes.plot(x + 0.33, y + 0.22, "*", color="red", markersize=14, label="chosen", zorder=3)

    effective = [-math.log(1 - beta) for beta in momenta]  # the axis: log of 1/(1 - beta)
    styles = zip(published_rules(replicas).items(), ("--", ":"), strict=True)
    for (rule, beta), style in styles:
        height = np.interp(-math.log(1 - beta), effective, range(len(momenta)))
        axes.axhline(height, linestyle=style, color="red", label=f"{rule}: {beta:.2g}")
    axes.set_xticks(range(len(periods)), periods)
    axes.set_yticks(range(len(momenta)), [f"{beta:g}" for beta in momenta])
    axes.set_xlabel("sync_period (K)")
    axes.set_ylabel("block_momentum (beta), evenly in log 1/(1 - beta)")
    axes.set_title(f"{objective.name}, P={replicas}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
