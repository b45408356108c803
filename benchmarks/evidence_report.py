"""Tables and plots of the runs that evidence.py recorded."""

import math
import string
from pathlib import Path

import evidence_plots
import evidence_sweep
import evidence_target
import numpy as np
from evidence import QUICK_REPLICAS, SEEDS, STUDIES, TASK, options_cells, quick_cells
from evidence_records import SEARCH, Records
from scipy import stats

from tf_blockmomentum.published import published_rules

SYNCHRONOUS = {
    "images": "synchronous momentum SGD",
    "language": "synchronous AdamW",
    "larger": "synchronous AdamW",
}


class Cell:
    """A method with K and P: the search, and the runs of what it chose.

    Attributes:
        choice: the setting without a seed.
        tried: the mean validation loss of every (beta, rate) of the search.
        runs: of the choice, one a seed.
    """

    def __init__(self, choice, tried, runs):
        self.choice, self.tried, self.runs = choice, tried, runs
        self.method, self.k = choice["method"], choice["sync_period"]
        self.replicas, self.beta = choice["replicas"], choice["block_momentum"]

    def numbers(self, name):
        """A result of each run; a run that diverged has an infinite loss and no accuracy."""
        missing = 0.0 if name.endswith("accuracy") else math.inf
        return np.array([float(run[name] or missing) for run in self.runs])

    def minus(self, other):
        """The paired differences of test losses, of the seeds that both have."""
        n = min(len(self.runs), len(other.runs))  # seeds are run in order
        return paired(self.numbers("test_loss")[:n], other.numbers("test_loss")[:n])

    @property
    def bracketed(self):
        """Whether the best rate has a worse one on either side."""
        rates = [rate for beta, rate in self.tried if beta == self.beta]
        return min(rates) < self.choice["rate"] < max(rates)

    @property
    def curve(self):
        """Samples, and the validation losses of each run there."""
        curves = [np.array(run["curve"].split(), float) for run in self.runs]
        if not self.runs:
            return np.array([]), np.array([])
        samples = np.array(self.runs[0]["samples"].split(), int)
        return samples, np.array([c for c in curves if len(c) == len(samples)])

    @property
    def grid(self):
        """What was tried, in words."""
        parts = []
        for beta in dict.fromkeys(beta for beta, _ in self.tried):
            rates = sorted(rate for b, rate in self.tried if b == beta)
            of_beta = f"{beta:g}: " if len({b for b, _ in self.tried}) > 1 else ""
            parts.append(of_beta + f"{rates[0]:.2g} to {rates[-1]:.2g}")
        open_end = "" if self.bracketed else ", not bracketed"
        return "; ".join(parts) + f" ({len(self.tried)}{open_end})"


def write(records, folder, quick=False):
    """Writes `evidence.md` and its plots into `folder`, from a folder of recorded runs."""
    found = {name: Records(Path(records) / f"{name}.csv") for name in STUDIES}
    studies = {
        name: [
            cell
            for replicas in ((QUICK_REPLICAS,) if quick else TASK[name])
            for cell in cells_of(name, replicas, found[name], quick)
        ]
        for name in TASK
    }
    swept = sweep(found["momentum"], quick)
    parts = {
        "command": "make evidence-quick" if quick else "make evidence",
        "runs": f"{sum(len(own.rows) for own in found.values()):,}",
        "momentum": momentum(swept, folder),
        "options": options(found["options"], quick),
        "target": target(found["target"], folder),
        **{name: study(name, cells, folder) for name, cells in studies.items()},
    }
    text = (Path(__file__).parent / "evidence_template.md").read_text()
    (folder / "evidence.md").write_text(string.Template(text).substitute(parts))


def cells_of(name, replicas, records, quick):
    """The cells of a study whose search has come to three rates at least."""
    for method, period, _, _ in quick_cells(name) if quick else TASK[name][replicas]:
        own = {"method": method, "replicas": str(replicas), "sync_period": str(period)}
        rows = [row for row in records.rows if own.items() <= row.items()]
        tried = {
            (float(row["block_momentum"]), float(row["rate"])): float(row["validation_loss"])
            for row in rows
            if int(row["seed"]) >= SEARCH
        }
        if len(tried) > 2:
            beta, rate = min(tried, key=lambda pair: tried[pair])
            choice = {"sync_period": period, "block_momentum": beta, "rate": rate}
            chosen = [
                row
                for row in sorted(rows, key=lambda row: int(row["seed"]))
                if int(row["seed"]) < SEARCH
                and (float(row["block_momentum"]), float(row["rate"])) == (beta, rate)
            ]
            yield Cell({**own, **choice, "replicas": replicas}, tried, chosen)


# -- tuned rivals ---------------------------------------------------------------------------------


def study(name, cells, folder):
    """A task's methods, each at the rate and beta that its search chose."""
    if not cells:
        return "No run is recorded."
    evidence_plots.study(name, cells, folder / f"evidence_{name}.png")
    parts = []
    for replicas in dict.fromkeys(cell.replicas for cell in cells):
        own = [cell for cell in cells if cell.replicas == replicas]
        parts.append(f"P={replicas}:\n\n{rivals(name, own)}")
    return "\n\n".join(parts)


def rivals(name, cells):
    unit = "test loss" if name == "images" else "bits per byte"
    titles = [
        "method", "K", "boundaries", "beta", "rate", unit, "minus K-AVG's of that K (p)",
        "minus the synchronous one's (p)",
        *(["test accuracy", "training loss"] if name == "images" else []),
        "best of the search", "searched: rates by beta (runs)",
    ]  # fmt: skip
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell.k, cell.method.replace("K-AVG", "A"))):
        row = [
            cell.method, cell.k if cell.k > 1 else "",
            cell.runs[0]["boundaries"] if cell.runs else "",
            f"{cell.beta:g}" if cell.beta else "", f"{cell.choice['rate']:.3g}",
            mean_cell(cell.numbers("test_loss")),
        ]  # fmt: skip
        plain = [c for c in cells if c.method == "K-AVG" and c.k == cell.k]
        at_once = [c for c in cells if c.method == SYNCHRONOUS[name]]
        for others in (plain, at_once):
            row.append(cell.minus(others[0]) if others and others[0] is not cell else "")
        if name == "images":
            row.append(mean_cell(cell.numbers("test_accuracy")))
            row.append(mean_cell(cell.numbers("training_loss")))
        rows.append([*row, f"{min(cell.tried.values()):.4f}", cell.grid])
    return table(titles, rows)


# -- how long blocks and how much momentum --------------------------------------------------------


def sweep(records, quick):
    """{(P, K, beta): (the rate that was chosen, test losses)} of what is recorded."""
    found = {}
    for replicas in evidence_sweep.REPLICAS:
        for cell in (c for of_k in evidence_sweep.cells(replicas, quick) for c in of_k):
            own = evidence_sweep.outcome(cell, records, quick)
            if own is not None:
                found[replicas, cell["sync_period"], cell["block_momentum"]] = own
    return found


def momentum(swept, folder):
    """The best beta for P by K."""
    evidence_plots.momentum(swept, folder / "evidence_momentum.png")
    rows = []
    for replicas, k in dict.fromkeys((p, k) for p, k, _ in sorted(swept)):
        of = {beta: swept[p, kk, beta] for p, kk, beta in swept if (p, kk) == (replicas, k)}
        best = best_beta(of)
        rates = {beta: f"{of[beta][0]:.3g}" for beta in of}
        rows.append([
            replicas, k, f"{best:g}", good_betas(of),
            f"{mean_cell(of[0.0][1])} ({rates[0.0]})", f"{mean_cell(of[0.5][1])} ({rates[0.5]})",
            f"{mean_cell(of[best][1])} ({rates[best]})",
            paired(of[0.5][1], of[0.0][1]),
            *(f"{beta:.2g}" for beta in published_rules(replicas).values()),
        ])  # fmt: skip
    return table(
        ["P", "K", "best beta", "as good", "loss, beta=0 (rate)", "beta=0.5 (rate)", "best (rate)",
         "beta=0.5 minus beta=0 (p)", "1 - 1/P", "SlowMo's table"],
        rows,
    )  # fmt: skip


def best_beta(of):
    """That of the lowest mean loss."""
    return min(of, key=lambda beta: np.mean(of[beta][1]))


def good_betas(of):
    """The range of beta around the best whose mean loss is within its noise or 2 % of it."""
    best = best_beta(of)
    mean, half = np.mean(of[best][1]), half_width(of[best][1])
    good = [b for b in sorted(of) if np.mean(of[b][1]) <= mean + max(half, 0.02 * mean)]
    return f"{good[0]:g} to {good[-1]:g}" if len(good) > 1 else ""


# -- what options cost ----------------------------------------------------------------------------


def option_losses(records, quick):
    """{(option, K, beta): test losses} of what is recorded."""
    losses = {}
    for cell, seeds in options_cells(quick):
        runs = [records.get({**cell, "seed": seed}) for seed in seeds]
        runs = [run for run in runs if run is not None]
        if len(runs) >= (1 if quick else len(SEEDS)):
            place = cell["option"], cell["sync_period"], cell["block_momentum"]
            losses[place] = np.array([float(run["test_loss"] or math.inf) for run in runs])
    return losses


INNER_STATE = "With momentum 0.9 (rate 0.1) or Adam (0.003) inside, K=8, by `inner_state`:"


def options(records, quick):
    """Overlap, codes and unlike shards, and, where it is recorded, the inner optimizer's state."""
    titles, rows = inner_state(records, quick)
    more = f"\n\n{INNER_STATE}\n\n{table(titles, rows)}" if rows else ""
    return table(*without_options(records, quick)) + more


def without_options(records, quick):
    """Each option's loss, and its difference to that of the same setting without it."""
    losses = option_losses(records, quick)
    losses = {place: own for place, own in losses.items() if "inside" not in place[0]}
    places = sorted({(k, beta) for _, k, beta in losses})
    rows = []
    for option in dict.fromkeys(option for option, _, _ in losses):
        base = option.partition(", ")[0]
        without = base if base in ("by class", "CNN") else ""
        row = [option or "none"]
        for k, beta in places:
            ours, theirs = losses.get((option, k, beta)), losses.get((without, k, beta))
            cell = "" if ours is None else mean_cell(ours)
            if ours is not None and theirs is not None and option not in ("", without):
                n = min(len(ours), len(theirs))
                ratio = np.mean(ours[:n]) / np.mean(theirs[:n])
                cell += f"; {ratio:.3f} times {paired(ours[:n], theirs[:n])}"
            row.append(cell)
        rows.append(row)
    return ["option", *(f"K={k}, beta={beta:g}" for k, beta in places)], rows


def inner_state(records, quick):
    """The loss by what becomes of the inner optimizer's state."""
    losses, states = option_losses(records, quick), ("keep", "reset", "average")
    rows = []
    for inner, beta in sorted({(o.split()[0], beta) for o, _, beta in losses if "inside" in o}):
        found = [losses.get((f"{inner} inside, {state}", 8, beta)) for state in states]
        rows.append([inner, f"{beta:g}", *("" if f is None else mean_cell(f) for f in found)])
    return ["inner optimizer", "beta", *states], rows


# -- time to a target -----------------------------------------------------------------------------


def target(records, folder):
    """Seconds to the target by workers and link, and how many times as fast as synchronous
    training, with an interval over seeds."""
    found, rows = {}, []
    for workers in evidence_target.WORKERS:
        for link in evidence_target.LINKS:
            of = {
                option: evidence_target.seconds(workers, link, option, records)
                for option in (None, *evidence_target.BLOCKS)
            }
            if not of[None]:
                continue
            row = [workers, link, seconds_cell(of[None])]
            for option in evidence_target.BLOCKS:
                pairs = [(of[None][s], own) for s, own in of[option].items() if s in of[None]]
                ratios = np.array([theirs / ours for theirs, ours in pairs if ours and theirs])
                row.append(seconds_cell(of[option]))
                if len(ratios) > 1:
                    middle, half = np.log(ratios).mean(), half_width(np.log(ratios))
                    times = [math.exp(middle + n * half) for n in (-1, 0, 1)]
                    found[workers, link, option] = times
                    row[-1] += "; {1:.1f} times as fast ({0:.1f} to {2:.1f})".format(*times)
            rows.append(row)
    evidence_plots.target(found, folder / "evidence_target.png")
    names = ["M-AVG", *(f"with {option}" for option in evidence_target.BLOCKS[1:])]
    return table(["workers", "link", "synchronous SGD", *names], rows)


def seconds_cell(of):
    """The mean over seeds, and how many there are that came to the target."""
    reached = [seconds for seconds in of.values() if seconds]
    if not reached:
        return ""
    missing = f", {len(of) - len(reached)} of {len(of)} never" if len(reached) < len(of) else ""
    return f"{np.mean(reached):.3g} s{missing}"


# -- numbers --------------------------------------------------------------------------------------


def half_width(values):
    """Half of a 95 % interval for the mean over the first axis."""
    values = np.asarray(values)
    n = len(values)
    if n < 2:
        return np.zeros(values.shape[1:])
    return stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / math.sqrt(n)


def mean_cell(values):
    if len(values) < 2:
        return "".join(f"{value:.3f} (one seed)" for value in values)
    if not np.all(np.isfinite(values)):
        return f"{np.sum(~np.isfinite(values))} of {len(values)} diverged"
    digits = 4 if np.mean(values) < 0.2 else 3
    return f"{np.mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def paired(ours, theirs):
    """The mean difference and the p of a paired t test over seeds."""
    differences = np.asarray(ours) - np.asarray(theirs)
    if len(differences) < 2 or not np.all(np.isfinite(differences)):
        return ""
    p = stats.ttest_1samp(differences, 0).pvalue
    return f"{np.mean(differences):+.4f} ({'<.001' if p < 0.001 else f'{p:.3f}'})"


def table(titles, rows):
    width = len(titles)
    lines = [titles, ["---"] * width, *([*row, *[""] * (width - len(row))] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
