"""How fast training in blocks is, over real links, beside what one would use instead.

    make bench          # an MLP at every K on four links, two more models; hours on 2 cores
    make bench-quick    # the MLP with K of 8 and 32 on loopback and 1 Gbit/s, some minutes

Each worker has a processor core of its own (with DEVICE=gpu, a GPU). A link is made of network
namespaces with `tc tbf` between them (needs root; skipped with the reason otherwise). All
contenders of ours take turns in the same processes; the peers in `benchmarks/peers` run right
after, on the same link and cores. Writes `speed.csv`, `speed.md` and plots into `runs/bench`;
`--report` makes the tables and plots again from the first.
"""

import argparse
import csv
import itertools
import shlex
import sys
import time
from pathlib import Path

import cluster

HERE = Path(__file__).parent
RUNS = Path("runs/bench")
# Examples of a worker's step.
BATCHES = {"mlp": 32, "resnet": 32, "transformer": 8, "resnet50": 16, "dot": 1}
MODELS = ("mlp", "resnet", "transformer")
WIDTHS = (784, 1536, 1536, 768, 10)  # 19 MB of float32
NO_SYNC = 10**9  # a block that never ends
FIELDS = ("model", "workers", "link", "family", "method", "k", "steps", "step_seconds",
          "wire_bytes", "model_bytes", "memory", "target_steps", "variables", "boundary_seconds",
          "first_seconds", "first_boundary_seconds")  # fmt: skip
PLAIN = "Keras fit, no strategy"  # in as many processes that do not know of each other
OVERLAPS, CODES = (False, 0.5, 1.0), (None, "float16", "int8", "int4")


def form_name(overlap, compression):
    """What the tables call a form of blocks."""
    parts = ["blocks", f"overlap={overlap}" if overlap else None, compression]
    return ", ".join(part for part in parts if part)


# Forms of blocks: overlap and compression of each name.
FORMS = {form_name(*settings): settings for settings in itertools.product(OVERLAPS, CODES)}
TARGET = 0.5  # training loss of the MLP on its task


# -- all of it ------------------------------------------------------------------------------------


def parts(options):
    """What to launch: link, workers, script, its arguments, and what its rows share."""
    import speed_growth

    def ours(part, link, workers, *arguments, **row):
        given = ["--part", part, "--device", options.device, "--rounds", str(options.rounds)]
        given += ["--jit"] * options.jit + ["--forms", *options.forms]
        row |= {"workers": workers, "link": link}
        return link, workers, Path(__file__).name, [*given, *map(str, arguments)], row

    if "alone" in options.only:
        yield ours("alone", "loopback", 1, "--alone", *options.alone)
    if "memory" in options.only:
        # Of two sizes: what a process has besides copies of the weights is in both.
        for method, scale in itertools.product((PLAIN, *options.forms), (2, 4)):
            workers = 1 if method == PLAIN else 2
            given = "--method", method, "--scale", scale
            yield ours("memory", "loopback", workers, *given, model=f"mlp, {scale} times as wide")
    if "growth" in options.only:
        for workers, size, variables in speed_growth.CASES:
            given = "--size", size, "--variables", variables
            yield ours("growth", "loopback", workers, *given, model="passes only")
        yield ours("growth", "loopback", 2, "--model", "resnet50", model="resnet50")
    if {"blocks", "peers"} & set(options.only):
        for model, workers, link in itertools.product(
            options.models, options.workers, options.links
        ):
            periods = options.periods
            if (model, workers) != ("mlp", 2) and not options.full:
                periods = [k for k in periods if k in (8, 32)] or periods
            slow = ["--slow"] * link.endswith("mbit")
            if "blocks" in options.only:
                given = "--model", model, *slow, "--periods", *periods
                yield ours("blocks", link, workers, *given, model=model)
            if "peers" in options.only and model == "mlp":
                row = {"workers": workers, "link": link, "model": model}
                few = [k for k in periods if k in (8, 32)] or periods
                given = [BATCHES[model], options.rounds, ",".join(map(str, few)), *WIDTHS]
                for script in sorted((HERE / "peers").glob("*.py")):
                    yield link, workers, f"peers/{script.name}", [*map(str, given)], row
    if "target" in options.only:
        yield ours("target", "loopback", 2, "--periods", *options.periods, model="mlp")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", default=["loopback", "10gbit", "1gbit", "100mbit"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    alone = ["dot", "mlp", "resnet50"]
    parser.add_argument("--alone", nargs="+", choices=BATCHES, default=alone, help="on one worker")
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--periods", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    kinds = ["alone", "memory", "growth", "blocks", "peers", "target"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="of the parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jit", action="store_true", help="compile local steps with XLA")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of blocks")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="the MLP, two K, two links")
    parser.add_argument("--full", action="store_true", help="all K for all models; many hours")
    parser.add_argument("--report", action="store_true", help="from recorded runs only")
    parser.add_argument(
        "--record", action="store_true", help="keep it in benchmarks/records, make docs of it"
    )
    parser.add_argument("--add", action="store_true", help="to what has been recorded before")
    parser.add_argument("--peers-python", help="a Python that has what the peers require")
    for hidden in ("--part", "--model", "--method"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--scale", "--variables"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.links, options.periods = ["loopback", "1gbit"], [8, 32]
        options.models, options.workers, options.only = ["mlp"], [2], ["blocks", "peers"]
        options.rounds = 1
    if options.part:
        import speed_parts

        return speed_parts.work(options)
    if not options.report:
        run(options)
    import speed_docs
    import speed_report

    if options.record:
        speed_docs.pages(speed_docs.keep(RUNS, commands()), speed_docs.DOCS)
    return speed_report.write(RUNS)


def commands():
    """The command lines that have written into `RUNS`, one after the other."""
    return (RUNS / "commands").read_text().splitlines()


def run(options):
    """Runs everything, and writes down what came out after each part."""
    rows: list = []
    RUNS.mkdir(parents=True, exist_ok=True)
    if options.add:
        with (RUNS / "speed.csv").open(newline="") as file:
            rows += csv.DictReader(file)
    with (RUNS / "commands").open("a" if options.add else "w") as file:
        print("python benchmarks/speed.py", *map(shlex.quote, sys.argv[1:]), file=file)
    for link, workers, script, arguments, common in parts(options):
        rate = None if link == "loopback" else link
        what = f"{link}, {workers} workers, {script} {' '.join(arguments[:2])}"
        peer = script.startswith("peers")
        python = (peer and options.peers_python) or sys.executable
        began = time.perf_counter()
        try:
            with cluster.link(rate, workers) as places:
                found = cluster.launch(
                    places,
                    python,
                    HERE / script,
                    arguments,
                    300 if peer else 3600,
                    options.device == "gpu",
                )
        except OSError as error:
            print(f"skipped: {what}: {error}", flush=True)
            continue
        rows += [{**common, **row} for row in found]
        print(f"{what}: {time.perf_counter() - began:.0f} s", flush=True)
        with (RUNS / "speed.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
