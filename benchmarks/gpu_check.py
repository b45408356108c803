"""Everything of ours that a GPU can change, checked and measured by one command.

    make gpu-check                        # ten minutes on one GPU; uses all there are
    make gpu-check ARGS="--only right two"
    make gpu-check ARGS="--quick"         # small sizes; on a machine without a GPU always

Each part runs in a process of its own (`gpu_parts.py`) with a time limit, so that one that fails
takes nothing with it. Prints a report and writes `gpu_check.md` and `gpu_check.json` into
`runs/gpu-check`. The exit status is 1 if a result is wrong or a part failed.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import cluster

HERE = Path(__file__).parent
RUNS = Path("runs/gpu-check")
# Part: what it is about, and its limit in seconds.
PARTS = {
    "machine": ("the machine", 60),
    "right": ("right: a replica against NumPy", 120),
    "two": ("right: two processes on one GPU against NumPy", 120),
    "devices": ("right: several replicas in one process against NumPy", 120),
    "moving_statistics": ("right: moving statistics at the anchor against NumPy", 120),
    "backup": ("right: stopped and resumed, to the bit", 150),
    "fast_mlp": ("fast: an MLP of 4.7 million weights, batches of 128", 150),
    "boundary": ("fast: a boundary", 120),
    "input": ("fast: the input pipeline", 150),
    "overlap": ("fast: blocks of two processes on one GPU", 150),
    "fast_transformer": ("fast: a transformer", 180),
    "fast_resnet18": ("fast: ResNet-18", 200),
    "fast_resnet50": ("fast: ResNet-50", 300),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, as without a GPU")
    parser.add_argument("--minutes", type=float, default=10, help="no part is begun after these")
    parser.add_argument("--to", type=Path, default=RUNS, help="where the report goes")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {}
    for part in dict.fromkeys(["machine", *options.only]):
        left = until - time.monotonic()
        began = time.monotonic()
        if left < 5:
            results[part] = {"error": "not run: no time was left", "rows": []}
        else:
            results[part] = run(part, options.quick, min(PARTS[part][1], left))
        results[part]["seconds"] = time.monotonic() - began
        print(section(part, results[part]), flush=True)
        options.to.mkdir(parents=True, exist_ok=True)
        (options.to / "gpu_check.json").write_text(json.dumps(results, indent=1))
        text = "\n".join(section(name, result) for name, result in results.items())
        (options.to / "gpu_check.md").write_text(f"# What a GPU changes\n\n{text}")
    wrong = [
        part
        for part, result in results.items()
        if result["error"] or not all(row.get("right", True) for row in result["rows"])
    ]
    print("All right." if not wrong else f"Wrong, failed or not run: {', '.join(wrong)}.")
    return bool(wrong)


def run(part: str, quick: bool, limit: float) -> dict:
    """A part's rows, and an error if it did not come to its end."""
    workers = 2 if part in ("two", "overlap") else 1
    command = [sys.executable, str(HERE / "gpu_parts.py"), part, *["--quick"] * quick]
    change = {
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # processes share a GPU
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    addresses = ["127.0.0.1"] * workers if workers > 1 else []
    started = cluster.start([command] * workers, [change] * workers, addresses)
    rows, error = cluster.finished(started, limit)
    return {"rows": rows, "error": error}


def section(part: str, result: dict) -> str:
    """A part of the report, in Markdown."""
    lines = [f"## {PARTS[part][0][0].upper()}{PARTS[part][0][1:]}", ""]
    rows = result["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if rows:
        lines.append("| " + " | ".join(columns) + " |")
        lines.append("|" + "---|" * len(columns))
        for row in rows:
            cells = (shown(row.get(name), name == "right") for name in columns)
            lines.append(f"| {' | '.join(cells)} |")
    if result["error"]:
        lines += ["", "Did not come to its end:", "", "```", result["error"], "```"]
    return "\n".join([*lines, "", f"({result['seconds']:.0f} s)", ""])


def shown(value: object, loud: bool = False) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**" if loud else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
