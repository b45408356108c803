"""The cost model's front: what a K costs on a link, in every form."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from tf_blockmomentum.cost import CostModel, parse_bandwidth
from tf_blockmomentum.report.measuring import measure
from tf_blockmomentum.report.units import parse_bytes, parse_seconds

PERIODS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TARGET = 0.9
# Name, overlap, compression.
FORMS: tuple[tuple[str, bool, str | None], ...] = (
    ("plain", False, None),
    ("overlap", True, None),
    ("float16", False, "float16"),
    ("int8", False, "int8"),
    ("int4", False, "int4"),
    ("overlap + int8", True, "int8"),
)


def shares(cost: CostModel, workers: int) -> dict[str, list[float]]:
    """The share of no-communication speed: by form, for each of `PERIODS`."""
    return {
        name: [cost.compressed(compression).share(k, workers, overlap) for k in PERIODS]
        for name, overlap, compression in FORMS
    }


def smallest_period(cost: CostModel, workers: int, overlap: bool, compression: str | None) -> int:
    """The smallest K, not only of `PERIODS`, that reaches `TARGET`; 0 if none up to the largest
    does."""
    coded = cost.compressed(compression)
    for k in range(1, PERIODS[-1] + 1):
        if coded.share(k, workers, overlap) >= TARGET:
            return k
    return 0


def tables(cost: CostModel, workers: Sequence[int]) -> str:
    """Everything, as text."""
    first = max(len(name) for name, *_ in FORMS)
    parts = []
    for count in workers:
        lines = [f"{count} workers: predicted share of the speed without communication, by K"]
        head = "".join(f"{k:>6}" for k in PERIODS)
        lines.append(f"{'':{first}}{head}   smallest K for {TARGET}")
        found = shares(cost, count)
        for name, overlap, compression in FORMS:
            row = "".join(f"{share:6.2f}" for share in found[name])
            least = smallest_period(cost, count, overlap, compression)
            lines.append(f"{name:{first}}{row}   {least or f'above {PERIODS[-1]}'}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(cost: CostModel, workers: Sequence[int], target: str) -> None:
    """Draws it: one panel for each number of workers."""
    from tf_blockmomentum.report.drawing import import_matplotlib, save

    matplotlib = import_matplotlib()
    figure = matplotlib.figure.Figure(figsize=(1.5 + 3.5 * len(workers), 3.6))
    axes = figure.subplots(1, len(workers), sharey=True, squeeze=False)[0]
    for ax, count in zip(axes, workers, strict=True):
        for name, values in shares(cost, count).items():
            style = "--" if "overlap" in name else "-"
            ax.plot(PERIODS, values, style, marker="o", markersize=3, label=name)
        ax.axhline(TARGET, color="0.7", linewidth=1, zorder=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(PERIODS, [str(k) for k in PERIODS])
        ax.set_ylim(0, 1.02)
        ax.set_title(f"{count} workers", fontsize=10)
        ax.set_xlabel("K, local steps a block")
    axes[0].set_ylabel("predicted share of the\nspeed without communication")
    axes[-1].legend(fontsize=8, frameon=False, loc="lower right")
    save(figure, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    Args:
        arguments: as on the command line; None: those of this process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.measure and (options.weights or options.step):
        parser.error("--measure finds --weights and --step out. Leave them out, or --measure.")
    if not options.measure and not (options.weights and options.step):
        parser.error(
            "--weights and --step are missing: how much a boundary averages, such as 100MB, and "
            "how long a local step takes, such as 50ms. --measure SCRIPT finds both out."
        )
    weights, step = options.weights, options.step
    if options.measure:
        try:
            step, weights = measure(options.measure, options.timeout)
        except ValueError as error:
            parser.error(str(error))
        print(f"Measured: a local step takes {step * 1e3:.3g} ms, and a boundary averages "
              f"{weights / 1e6:.3g} MB.")  # fmt: skip
    cost = CostModel(
        step, weights, options.link, latency=options.latency, boundary_seconds=options.boundary
    )
    print(tables(cost, options.workers))
    print(
        "\nThese are predictions (tf_blockmomentum.cost.CostModel), not measurements. They leave "
        "out slow workers,\na transport slower than its link, and what the messages and their "
        "codes cost the processor.\ntfbm.BlockReport says what a run really does."
    )
    if options.plot:
        try:
            plot(cost, options.workers, options.plot)
        except (ValueError, ImportError) as error:
            parser.error(str(error))
        print(f"Drawn: {options.plot}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfbm-plan",
        description="Predicts the speed of training in blocks over a network, for K of 1 to 256.",
    )
    parser.add_argument(
        "--weights", type=_quantity(parse_bytes), metavar="SIZE",
        help="what a boundary averages: 4 bytes a weight of float32, such as 100MB",
    )  # fmt: skip
    parser.add_argument(
        "--step", type=_quantity(parse_seconds), metavar="TIME",
        help="a local step of one worker, such as 50ms",
    )  # fmt: skip
    parser.add_argument(
        "--link", type=_quantity(parse_bandwidth), metavar="SPEED", required=True,
        help="of one worker's network, such as 1gbit",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=_workers, nargs="+", metavar="N", required=True, help="2 or more"
    )
    parser.add_argument(
        "--latency", type=_quantity(parse_seconds), metavar="TIME", default=0.0,
        help="of a message, however short; default: none",
    )  # fmt: skip
    parser.add_argument(
        "--boundary", type=_quantity(parse_seconds), metavar="TIME", default=0.0,
        help="of a boundary apart from its messages (passes over the weights); default: none",
    )  # fmt: skip
    parser.add_argument(
        "--measure", metavar="SCRIPT",
        help="take --weights and --step from a short run of this script on one worker",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=_quantity(parse_seconds), metavar="TIME", default=300.0,
        help="of --measure; default: 300s",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="draw it too, such as plan.png")
    return parser


def _quantity(parse: Callable[[str], float]) -> Callable[[str], float]:
    """argparse shows the text of its own error only."""

    def quantity(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return quantity


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(
            f"a number of workers is a whole number of at least 2. Received: {text!r}."
        )
    return int(text)
