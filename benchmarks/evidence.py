"""The evidence: block momentum against its rivals, each at its own best rate, with error bars.

    make evidence                          # every study; writes docs/evidence.md
    make evidence ARGS="--study language"  # one of them
    make evidence-quick                    # each in small, into runs/evidence-quick/

A study appends its runs to `evidence_runs/NAME.csv` as they end; started again, it goes on with
those that are missing. `--report` makes the tables and plots from the records alone. Rates, and
beta where a method has one, are chosen by a search on seeds that are not reported.

P replicas are P logical devices of one process: what is measured is how training goes over
samples, not how long it takes; but for the study `target`, which has real workers and links (and
needs root, and a machine that does nothing else).
"""

import argparse
import concurrent.futures
import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from evidence_records import SEARCH, Records, best_rate

SEEDS = (0, 1, 2)
# A cell: (method, K, (beta, ...), the rate in the middle of the first three that are tried for
# beta = 0). For other beta it is about 1 - beta times as high.
IMAGES = (
    ("synchronous momentum SGD", 1, (0.8, 0.9), 0.4),
    ("K-AVG", 8, (0.0,), 0.4),
    ("M-AVG", 8, (0.5, 0.7, 0.3), 0.8),
    ("DiLoCo", 8, (0.9,), 0.08),
    ("SlowMo", 8, (0.5,), 0.8),
    ("EASGD", 8, (0.0,), 1.6),
    ("Lookahead", 8, (0.0,), 0.2),
    ("K-AVG, momentum inside", 8, (0.0,), 0.1),
    ("M-AVG, momentum inside", 8, (0.3, 0.5), 0.1),
    ("K-AVG", 32, (0.0,), 0.8),
    ("M-AVG", 32, (0.5, 0.3, 0.7), 0.8),
    ("synchronous SGD", 1, (0.0,), 0.8),
    ("EAMSGD", 8, (0.0,), 0.1),
    ("DiLoCo", 32, (0.9,), 0.08),
    ("SlowMo", 32, (0.5,), 0.8),
    ("EASGD", 32, (0.0,), 1.6),
    ("K-AVG, momentum inside", 32, (0.0,), 0.1),
    ("M-AVG, momentum inside", 32, (0.3, 0.5), 0.1),
)
LANGUAGE = {
    4: (
        ("synchronous AdamW", 1, (0.0,), 0.004),
        ("K-AVG", 8, (0.0,), 0.004),
        ("M-AVG", 8, (0.5, 0.3), 0.008),
        ("DiLoCo", 8, (0.9,), 0.02),
        ("K-AVG", 32, (0.0,), 0.004),
        ("M-AVG", 32, (0.5,), 0.008),
        ("DiLoCo", 32, (0.9,), 0.02),
        ("K-AVG", 128, (0.0,), 0.004),
        ("M-AVG", 128, (0.5,), 0.008),
        ("DiLoCo", 128, (0.9,), 0.02),
    ),
    8: (
        ("synchronous AdamW", 1, (0.0,), 0.004),
        ("K-AVG", 32, (0.0,), 0.004),
        ("M-AVG", 32, (0.5,), 0.008),
        ("DiLoCo", 32, (0.9,), 0.02),
    ),
    2: (
        ("synchronous AdamW", 1, (0.0,), 0.004),
        ("K-AVG", 32, (0.0,), 0.004),
        ("M-AVG", 32, (0.5,), 0.008),
        ("DiLoCo", 32, (0.9,), 0.02),
    ),
}
LARGER = (
    ("synchronous AdamW", 1, (0.0,), 0.002),
    ("K-AVG", 32, (0.0,), 0.002),
    ("M-AVG", 32, (0.3,), 0.004),
    ("DiLoCo", 32, (0.9,), 0.01),
)
TASK: dict[str, dict] = {"images": {4: IMAGES}, "language": LANGUAGE, "larger": {4: LARGER}}
OPTIONS = ("overlap=0.25", "overlap=0.5", "overlap=1", "float16", "int8", "int4",
           "overlap=0.5, int4")  # fmt: skip
QUICK_REPLICAS = 2
QUICK = ((0, 1), (SEARCH,), 3)  # seeds, those of the search, rates of a search at most
STUDIES = ("momentum", "images", "language", "larger", "options", "target")


def tuned(cells, task, replicas, of, seeds=SEEDS, search=(SEARCH,), most=7):
    """Chooses the rate and beta of each cell, and then runs its choice with other seeds.

    Args:
        cells: of a task and P, as above.
        of: function of a setting; its run, which is made if there is none.

    Yields:
        For each cell the setting that was chosen, without a seed, the mean validation loss of
        every (beta, rate) that was tried, and the runs of the choice.
    """
    for method, period, momenta, start in cells:
        base = {"task": task, "method": method, "replicas": replicas, "sync_period": period}
        tried = {}
        for beta in momenta:
            setting = {**base, "block_momentum": beta, "option": ""}
            score = functools.partial(validation_loss, setting, of, search)
            first = float(f"{start * 2 ** round(math.log2(1 - beta)):.3g}")
            _, scores = best_rate(score, first, most=most)
            tried |= {(beta, rate): loss for rate, loss in scores.items()}
        beta, rate = min(tried, key=lambda pair: tried[pair])
        choice = {**base, "block_momentum": beta, "rate": rate, "option": ""}
        yield choice, tried, [of({**choice, "seed": seed}) for seed in seeds]


def validation_loss(setting, of, seeds, rate):
    """The mean over some seeds; infinite if one diverged."""
    runs = [of({**setting, "rate": rate, "seed": seed}) for seed in seeds]
    loss = sum(float(run["validation_loss"]) for run in runs) / len(runs)
    return loss if math.isfinite(loss) else math.inf


def run_tuned(study, replicas, path, quick):
    """The runs of a task with so many replicas that are not recorded yet."""
    import evidence_training

    evidence_training.start_devices(replicas)
    records, trainers = Records(path), evidence_training.Trainers(quick)

    def of(setting):
        if records.get(setting) is None:
            records.add([trainers.run(setting)])
        return records.get(setting)

    cells = quick_cells(study) if quick else TASK[study][replicas]
    arguments = QUICK if quick else ()
    for choice, _, _ in tuned(cells, study, replicas, of, *arguments):
        print(f"{study}: {choice}", flush=True)


def quick_cells(study):
    """Some of those of four replicas; none of the larger model, in small the language's."""
    methods = {"images": ("SlowMo",), "language": ("synchronous AdamW", "DiLoCo")}.get(study, ())
    cells = {cell[0]: cell for cell in reversed(TASK[study][4])}
    return [(name, k, (max(momenta),), rate) for name, k, momenta, rate in map(cells.get, methods)]


def options_cells(quick):
    """What an option costs: settings of M-AVG on digits but for the seed, at one rate, each with
    the seeds that it is run with."""
    base = {"task": "digits", "replicas": QUICK_REPLICAS if quick else 4, "rate": 0.4}
    own_cells = [("", k, way) for way in ("", *OPTIONS) for k in (8, 32)]
    by_class = [("by class", k, way) for _, k, way in own_cells]
    network = [("CNN", k, way) for _, k, way in own_cells if k == 8]
    every = [("", 8, "int4")] if quick else own_cells + by_class + network
    for where, period, way in every:
        option = ", ".join(part for part in (where, way) if part)
        own = {"sync_period": period, "block_momentum": 0.5, "option": option}
        yield {**base, **own, "method": "M-AVG"}, SEEDS if quick else range(5)
    without = () if quick else ("", "overlap=0.25", "overlap=1", "float16", "int8", "int4")
    for option, period in itertools.product(without, (8, 32)):
        own = {"sync_period": period, "block_momentum": 0.0, "option": option}
        yield {**base, **own, "method": "K-AVG"}, SEEDS
    for inner, rate in () if quick else (("momentum", 0.1), ("adam", 0.003)):
        for state, beta in itertools.product(("keep", "reset", "average"), (0.0, 0.5, 0.8)):
            own = {"sync_period": 8, "block_momentum": beta, "rate": rate}
            own["option"] = f"{inner} inside, {state}"
            yield {**base, **own, "method": "M-AVG" if beta else "K-AVG"}, SEEDS


def run_options(study, replicas, path, quick):
    """The runs of options that are not recorded yet."""
    import evidence_training

    evidence_training.start_devices(replicas)
    records, trainers = Records(path), evidence_training.Trainers(quick)
    for cell, seeds in options_cells(quick):
        for seed in seeds:
            if records.get({**cell, "seed": seed}) is None:
                records.add([trainers.run({**cell, "seed": seed})])


def run_momentum(study, replicas, path, quick):
    """The same of the sweep over P, K and beta."""
    import evidence_sweep

    evidence_sweep.study(replicas, Records(path), quick)


def run_target(study, replicas, path, quick):
    """The runs to a target that are not recorded yet, with so many real workers."""
    import evidence_target

    evidence_target.study(replicas, Records(path), quick)


def parts(study, quick):
    """What a study is made of, to be run in any order: (function, P)."""
    if study == "momentum":
        return [(run_momentum, p) for p in ((4, 1) if quick else (4, 16, 1, 8, 2))]
    if study == "target":
        import evidence_target

        return [(run_target, p) for p in ((2,) if quick else evidence_target.WORKERS)]
    if study == "options":
        return [(run_options, QUICK_REPLICAS if quick else 4)]
    return [(run_tuned, p) for p in ((QUICK_REPLICAS,) if quick else TASK[study])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every study in small")
    parser.add_argument("--report", action="store_true", help="from recorded runs only")
    parser.add_argument("--study", choices=STUDIES, help="only this one")
    parser.add_argument("--replicas", type=int, help="only its part with so many replicas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parts run at once")
    options = parser.parse_args()
    folder = Path("runs/evidence-quick") if options.quick else Path("docs")
    records = folder / "evidence_runs"
    if not options.report:
        record(records, options)
    import evidence_report

    evidence_report.write(records, folder, options.quick)
    print(f"Tables: {folder / 'evidence.md'}")


def record(records, options):
    """Runs what is missing, each part in a process of its own; in small, all in this one."""
    started = time.perf_counter()
    wanted = [
        (f"{study}, P={replicas}", function, study, replicas, records / f"{study}.csv")
        for study in STUDIES if options.study in (None, study)
        for function, replicas in parts(study, options.quick)
        if options.replicas in (None, replicas)
    ]  # fmt: skip
    if options.quick:
        for _, function, *arguments in wanted:
            function(*arguments, True)
        return
    with concurrent.futures.ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        futures = {pool.submit(run, *own, False): name for name, run, *own in wanted}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            minutes = (time.perf_counter() - started) / 60
            print(f"{futures[future]}: done after {minutes:.1f} minutes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
