"""The plots of the evidence."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

NAMES = {"images": "validation loss"}
STYLES = {1: ":", 8: "-", 32: "--", 128: "-."}


def study(name, cells, path):
    """Left: training of each method as its search chose it. Right: what each rate gave."""
    shown = [cell for cell in cells if cell.replicas == cells[0].replicas]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    methods = dict.fromkeys(cell.method for cell in shown)
    distinct = [*map(pyplot.cm.tab10, range(10)), *map(pyplot.cm.Dark2, range(8))]
    colours = dict(zip(methods, distinct, strict=False))
    for cell in shown:
        label = cell.method + (f", K={cell.k}" if cell.k > 1 else "")
        label += f", beta={cell.beta:g}" if cell.beta else ""
        style = {"color": colours[cell.method], "linestyle": STYLES[cell.k]}
        samples, curves = cell.curve
        unit = 1 if name == "images" else 128
        left.plot(samples * unit, curves.mean(0) if len(curves) else [], label=label, **style)
        for beta in {beta for beta, _ in cell.tried}:  # pale: those that were not chosen
            own = {r: loss for (b, r), loss in sorted(cell.tried.items()) if b == beta}
            finite = {rate: loss for rate, loss in own.items() if np.isfinite(loss)}
            pale = 1 if beta == cell.beta else 0.35
            xy = list(finite), list(finite.values())
            right.plot(*xy, marker="o", markersize=4, alpha=pale, **style)
    left.set_xlabel("samples" if name == "images" else "bytes of text")
    loss = NAMES.get(name, "validation, bits per byte")
    left.set_ylabel(f"{loss}, mean over seeds")
    right.set_xlabel("inner learning rate (pale: at a beta that was not chosen)")
    right.set_ylabel(f"{loss}, the search's seed")
    logarithmic(right.xaxis, (1, 2, 5))
    lowest = min((min(cell.tried.values()) for cell in shown), default=1.0)
    if name == "images":
        for axis in (left, right):
            logarithmic(axis.yaxis, (1, 2, 3, 5))
            axis.set_ylim(lowest * 0.8, lowest * 12)
    else:
        left.set_ylim(lowest * 0.98, lowest * 1.4)
        right.set_ylim(lowest * 0.98, lowest * 1.25)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def logarithmic(axis, subs):
    """Makes an axis logarithmic, with plain numbers beside it."""
    axis.set_major_formatter(ticker.NullFormatter())
    axis.axes.set_xscale("log") if axis.axis_name == "x" else axis.axes.set_yscale("log")
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def momentum(swept, path):
    """Test loss over beta, a panel for each P."""
    replicas = sorted({p for p, _, _ in swept}) or [1]
    figure, axes = pyplot.subplots(
        1, len(replicas), figsize=(2.9 * len(replicas), 4), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    periods = sorted({k for _, k, _ in swept})
    for axis, p in zip(axes[0], replicas, strict=True):
        for i, k in enumerate(periods):
            betas = sorted(beta for pp, kk, beta in swept if (pp, kk) == (p, k))
            losses = [np.mean(swept[p, k, beta][1]) for beta in betas]
            label = f"K={k}" if axis is axes[0, 0] else None
            colour = pyplot.cm.viridis(i / len(periods))
            axis.plot(betas, losses, marker="o", markersize=4, color=colour, label=label)
        axis.set_title(f"P={p}")
        axis.set_xlabel("beta")
        axis.axvline(0.5, color="grey", linewidth=0.6)
    logarithmic(axes[0, 0].yaxis, (1, 1.5, 2, 3, 4, 5, 6, 8))
    axes[0, 0].set_ylabel("test loss, each at its best rate")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def target(found, path):
    """How many times as fast as synchronous training, a panel for each number of workers.

    Args:
        found: {(workers, link, option): (lower end, middle, upper end)}.
    """
    panels = sorted({workers for workers, _, _ in found}) or [2]
    links = list(dict.fromkeys(link for _, link, _ in found))
    options = list(dict.fromkeys(option for _, _, option in found))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    width = 0.8 / max(1, len(options))
    for axis, workers in zip(axes[0], panels, strict=True):
        for i, option in enumerate(options):
            own = [(n, found.get((workers, link, option))) for n, link in enumerate(links)]
            own = [(n, times) for n, times in own if times]
            middle = np.array([times[1] for _, times in own])
            error = np.abs(np.array([[times[0], times[2]] for _, times in own]).T - middle)
            places = [n + (i - (len(options) - 1) / 2) * width for n, _ in own]
            label = "M-AVG" + (f", {option}" if option else "") if axis is axes[0, 0] else None
            axis.bar(places, middle, width, yerr=error, capsize=2, label=label)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(links)), links)
        axis.set_xlim(-0.5, max(1, len(links)) - 0.5)
        axis.set_title(f"{workers} workers")
        if found:
            logarithmic(axis.yaxis, (1, 2, 5))
    axes[0, 0].set_ylabel("times as fast as synchronous SGD")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
