"""Tables and plots of the runs that evidence.py recorded."""

import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

from tf_blockmomentum.published import published_rules

matplotlib.use("Agg")
from matplotlib import pyplot

TARGETS = {"mlp": 0.1, "cnn": 0.2, "resnet": 1.6}  # training loss
TITLES = {
    "mlp": "Digits, MLP with one hidden layer of 64",
    "cnn": "Digits, CNN",
    "resnet": "Teacher's images, small ResNet with BatchNormalization",
}
BATCH = 16


class Run:
    """A recorded run."""

    def __init__(self, row):
        self.study, self.task, self.method = row["study"], row["task"], row["method"]
        self.inner, self.inner_state = row["inner"], row["inner_state"]
        self.replicas, self.k = int(row["replicas"]), int(row["sync_period"])
        self.beta, self.rate = float(row["block_momentum"]), float(row["rate"])
        self.shards, self.seed = row["shards"], int(row["seed"])
        self.boundaries = int(row["boundaries"])
        self.samples = np.array(row["samples"].split(), int)
        self.losses = np.array(row["loss"].split(), float)
        self.accuracies = np.array(row["accuracy"].split(), float)

    @property
    def setting(self):
        return self.task, self.method, self.rate, self.k, self.beta

    @property
    def loss(self):
        return self.losses[-1]

    @property
    def accuracy(self):
        return self.accuracies[-1]

    @property
    def diverged(self):
        """Ended where it would have been without training, or worse."""
        return not self.loss < math.log(10)

    def samples_to(self, target):
        """Samples until the training loss was `target`, None if it never was; straight lines in
        log loss between evaluations."""
        below = np.flatnonzero(self.losses <= target)
        if not len(below):
            return None
        i = below[0]
        if i == 0:
            return float(self.samples[0])
        a, b = np.log(self.losses[i - 1 : i + 1])
        fraction = (a - math.log(target)) / (a - b)
        return float(self.samples[i - 1] + fraction * (self.samples[i] - self.samples[i - 1]))

    def loss_at(self, samples):
        """The training loss after so many samples."""
        with np.errstate(divide="ignore"):
            return float(np.exp(np.interp(samples, self.samples, np.log(self.losses))))


def write(records, folder, quick):
    """Writes `evidence.md` and its plots into `folder`, from a file of recorded runs."""
    with Path(records).open(newline="") as file:
        runs = [Run(row) for row in csv.DictReader(file)]
    studies = defaultdict(list)
    for run in runs:
        studies[run.study].append(run)
    command = "make evidence-quick" if quick else "make evidence"
    source = (
        "This page shows what block momentum gains, and where it does not help. It is written by "
        f"`{command}` from the {len(runs)} runs in "
        "[evidence_runs.csv](evidence_runs.csv); what follows is all theirs, also where it speaks "
        "against the method. What we make of it is in [choose.md](choose.md)."
    )
    terms = (
        "P replicas are logical CPU devices of one process, each with batches of "
        f"{BATCH} examples. All methods see the same samples in the same order from the same "
        "initial weights, for each seed. *Samples* are those of all replicas. Losses are those of "
        "the whole training set under the anchor. "
        "± is the half width of a 95 % interval over seeds (Student's t). *p* is from a paired t "
        "test over seeds; the many tests are not corrected for their number."
    )
    parts = [
        "# Evidence",
        source,
        terms,
        *acceleration(studies["acceleration"], folder),
        *scaling(studies["scaling"], folder),
        *inner_state(studies["inner state"]),
        *prices(
            studies["overlap"],
            studies["acceleration"],
            "Overlap",
            "`overlap=1.0`, whose outer step comes one block late",
        ),
        *prices(
            studies["compression"],
            studies["acceleration"],
            "Compression",
            'deltas that travel as float16 with error feedback (`compression="float16"`)',
        ),
        *limits(studies["divergence"], studies["acceleration"], studies["shards"], folder),
    ]
    (folder / "evidence.md").write_text("\n\n".join(parts) + "\n")


def grouped(runs, key):
    groups = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return {name: sorted(groups[name], key=lambda run: run.seed) for name in sorted(groups)}


# -- 1 --------------------------------------------------------------------------------------------


def acceleration(runs, folder):
    """M-AVG against the rest, at equal samples."""
    plot_acceleration(runs, folder / "evidence_acceleration.png")
    yield "## Acceleration"
    replicas, seeds = runs[0].replicas, len({run.seed for run in runs})
    yield (
        f"P={replicas}, {seeds} seeds. M-AVG's and EASGD's last three columns compare with K-AVG "
        "of the same K and rate, seed by seed: how many times the samples to the target, and the "
        "difference of test accuracies. *rate* is the inner learning rate; synchronous methods "
        f"step with the mean gradient of {replicas * BATCH} examples."
    )
    yield "![Training loss over samples and over boundaries](evidence_acceleration.png)"
    for task, of_task in grouped(runs, lambda run: run.task).items():
        target = TARGETS[task]
        by_setting = grouped(of_task, lambda run: run.setting)
        rows, faster, compared = [], 0, 0
        for setting, group in sorted(by_setting.items(), key=order_of_methods):
            _, method, rate, k, beta = setting
            row = [
                method, f"{rate:g}", k, f"{beta:g}" if method == "M-AVG" else "",
                samples_cell(group, target), mean_cell([r.loss for r in group]),
                mean_cell([r.accuracy for r in group]), group[0].boundaries,
            ]  # fmt: skip
            baseline = by_setting.get((task, "K-AVG", rate, k, 0.0))
            if method in ("M-AVG", "EASGD") and baseline:
                ratio, p = paired_ratio(group, baseline, target)
                row += [ratio, p, difference(group, baseline)]
                if method == "M-AVG" and ratio:
                    compared += 1
                    faster += float(ratio.split()[0]) < 1 and p_value(p) < 0.05
            rows.append(row)
        titles = [
            "method", "rate", "K", "beta", f"samples to loss {target:g}", "final training loss",
            "test accuracy", "boundaries", "samples / K-AVG's", "p", "accuracy - K-AVG's",
        ]  # fmt: skip
        yield f"### {TITLES[task]}"
        yield table(titles, rows)
        yield (
            f"M-AVG needed fewer samples than K-AVG of its K, at p < 0.05, in {faster} of the "
            f"{compared} settings that can be compared."
        )


def order_of_methods(item):
    (_, method, rate, k, beta), _ = item
    methods = ["synchronous SGD", "synchronous momentum SGD", "EAMSGD", "EASGD", "K-AVG", "M-AVG"]
    baseline = methods.index(method) < 3
    return not baseline, methods.index(method) if baseline else (rate, k), rate, k, method, beta


def plot_acceleration(runs, path):
    tasks = list(grouped(runs, lambda run: run.task))
    figure, axes = pyplot.subplots(
        2, len(tasks), figsize=(5 * len(tasks), 7), squeeze=False, layout="constrained"
    )
    for column, task in zip(axes.T, tasks, strict=True):
        by_setting = grouped([r for r in runs if r.task == task], lambda run: run.setting)
        shown = []
        for method in ("synchronous SGD", "synchronous momentum SGD"):
            choices = [s for s in by_setting if s[1] == method]
            shown.append(min(choices, key=lambda s: np.mean([r.loss for r in by_setting[s]])))
        shown += [s for s in by_setting if s[3] == 8 and s[2] == min(t[2] for t in by_setting if
                  t[1] == "K-AVG") and s[1] in ("K-AVG", "M-AVG", "EASGD")]  # fmt: skip
        for setting in shown:
            _, method, rate, k, beta = setting
            group = by_setting[setting]
            label = f"{method}, rate {rate:g}" if k == 1 else f"{method}, K={k}"
            label += f", beta={beta:g}" if beta else ""
            width = min(len(r.losses) for r in group)
            logs = np.log(np.minimum([r.losses[:width] for r in group], 10))
            mean, half = logs.mean(0), half_width(logs)
            samples = group[0].samples[:width]
            style = "--" if k == 1 else "-"
            (line,) = column[0].plot(samples, np.exp(mean), style, label=label)
            column[0].fill_between(
                samples,
                np.exp(mean - half),
                np.exp(mean + half),
                alpha=0.15,
                color=line.get_color(),
            )
            steps = samples / (BATCH * group[0].replicas)
            column[1].plot(steps / k, np.exp(mean), style, color=line.get_color())
        for axis in column:
            axis.set_yscale("log")
            axis.axhline(TARGETS[task], color="grey", linewidth=0.6)
        column[0].set_title(TITLES[task], fontsize=10)
        column[0].set_xlabel("samples")
        column[0].legend(fontsize=7)
        column[1].set_xlabel("boundaries (all-reduces of the model)")
        column[1].set_xscale("log")
    axes[0, 0].set_ylabel("training loss (geometric mean, 95 %)")
    axes[1, 0].set_ylabel("training loss")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# -- 2 --------------------------------------------------------------------------------------------


def scaling(runs, folder):
    """How the best beta and K move with P and with the budget."""
    by_replicas = grouped(runs, lambda run: run.replicas)
    plot_scaling(by_replicas, folder / "evidence_scaling.png")
    yield "## Scaling"
    seeds = len({run.seed for run in runs})
    yield (
        f"The digits MLP, {seeds} seeds, the same samples in all for every P: more replicas have "
        "fewer blocks of more samples each. The best pair of K and beta is that of the lowest "
        "mean log training loss at the budget."
    )
    yield "![Final training loss over beta for each P and K](evidence_scaling.png)"
    total = int(max(run.samples[-1] for run in runs))
    budgets = [total // 4, total // 2, total]
    rows = []
    for replicas, group in by_replicas.items():
        cells = []
        for budget in budgets:
            pairs = grouped(group, lambda run: (run.k, run.beta))
            means = {pair: geometric(r.loss_at(budget) for r in pairs[pair]) for pair in pairs}
            k, beta = min(means, key=means.get)
            cells.append(f"K={k}, beta={beta:g}: {means[k, beta]:.3g}")
        rules = [f"{beta:.2g}" for beta in published_rules(replicas).values()]
        rows.append([replicas, *cells, *rules])
    titles = ["P", *(f"best at {b:,} samples: loss" for b in budgets), "1 - 1/P", "SlowMo's table"]
    yield table(titles, rows)
    yield (
        "(SlowMo's table has 4, 8 and 16 workers; for others the nearest is shown.) The best beta "
        "for each K alone, at the whole budget:"
    )
    rows = []
    for replicas, group in by_replicas.items():
        row = [replicas]
        for _, of_k in grouped(group, lambda run: run.k).items():
            means = {
                beta: geometric(r.loss for r in of_beta)
                for beta, of_beta in grouped(of_k, lambda run: run.beta).items()
            }
            best = min(means, key=means.get)
            row += [f"{best:g}", f"{means[best]:.3g}", f"{means[0.0]:.3g}"]
        rows.append(row)
    titles = ["P"]
    for k in sorted({run.k for run in runs}):
        titles += [f"best beta, K={k}", "loss", "K-AVG's loss"]
    yield table(titles, rows)


def plot_scaling(by_replicas, path):
    periods = sorted({run.k for group in by_replicas.values() for run in group})
    figure, axes = pyplot.subplots(
        1, len(periods), figsize=(5 * len(periods), 4), squeeze=False, layout="constrained"
    )
    for axis, k in zip(axes[0], periods, strict=True):
        for replicas, group in by_replicas.items():
            by_beta = grouped([r for r in group if r.k == k], lambda run: run.beta)
            losses = [geometric(r.loss for r in of_beta) for of_beta in by_beta.values()]
            axis.plot(list(by_beta), np.minimum(losses, 10), marker="o", label=f"P={replicas}")
        axis.set_yscale("log")
        axis.set_xlabel("beta")
        axis.set_title(f"K={k}")
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("final training loss (geometric mean)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# -- 3 --------------------------------------------------------------------------------------------


def inner_state(runs):
    """What to do with the inner optimizer's momenta at a boundary."""
    yield "## The inner optimizer's state at a boundary"
    yield (
        f"The digits MLP, P={runs[0].replicas}, K={runs[0].k}, {len({r.seed for r in runs})} "
        "seeds: final training loss (and test accuracy). *average* communicates the momenta too."
    )
    states = ("keep", "reset", "average")
    rows = []
    for (inner, rate, beta), group in grouped(runs, lambda r: (r.inner, r.rate, r.beta)).items():
        by_state = grouped(group, lambda run: run.inner_state)
        cells = [
            f"{mean_cell([r.loss for r in by_state[s]])} "
            f"({np.mean([r.accuracy for r in by_state[s]]):.3f})"
            for s in states
        ]
        rows.append([f"{inner}, rate {rate:g}", f"{beta:g}", *cells])
    yield table(["inner optimizer", "beta", *states], rows)


def prices(runs, accelerating, title, text):
    """The price of a setting of M-AVG: beside the same runs without it."""
    yield f"## {title}"
    yield (
        f"P={runs[0].replicas}, {len({r.seed for r in runs})} seeds: final training loss and test "
        f"accuracy with {text}, beside the same settings without. Evaluated at the end only, "
        "since that lands what is in flight. *s* is the standard deviation over seeds of the log "
        "loss without, *change* the mean difference of log losses in units of it."
    )
    without = grouped(accelerating, lambda run: run.setting)
    rows = []
    for (task, _, rate, k, beta), group in grouped(runs, lambda run: run.setting).items():
        method = "M-AVG" if beta else "K-AVG"
        same = [r for r in without[task, method, rate, k, beta] if r.seed < len(group)]
        logs = [np.log(a.loss) - np.log(b.loss) for a, b in zip(group, same, strict=True)]
        p = stats.ttest_1samp(logs, 0).pvalue if len(logs) > 1 else math.nan
        s = np.std([np.log(r.loss) for r in same], ddof=1)
        rows.append([
            task, k, f"{beta:g}",
            mean_cell([r.loss for r in group]), mean_cell([r.loss for r in same]),
            f"{np.mean(logs) / s:+.2f} s", f"{p:.3f}",
            mean_cell([r.accuracy for r in group]), difference(group, same),
        ])  # fmt: skip
    titles = ["task", "K", "beta", "loss", "loss without", "change", "p", "accuracy",
              "difference"]  # fmt: skip
    yield table(titles, rows)


# -- 4 --------------------------------------------------------------------------------------------


def limits(diverging, accelerating, shards, folder):
    """Where it does not help."""
    plot_limits(diverging, accelerating, folder / "evidence_limits.png")
    yield "## Where it does not help"
    yield "![Divergence, and few blocks](evidence_limits.png)"
    rows = []
    for (rate, k), group in grouped(diverging, lambda run: (run.rate, run.k)).items():
        row = [f"{rate:g}", k]
        for of_beta in grouped(group, lambda run: run.beta).values():
            bad = sum(run.diverged for run in of_beta)
            loss = geometric(min(run.loss, 1e3) for run in of_beta)
            row.append(f"{bad} of {len(of_beta)} diverged" if bad else f"{loss:.2g}")
        rows.append(row)
    betas = sorted({run.beta for run in diverging})
    yield "### K, beta or the learning rate too large"
    yield (
        "The digits MLP: final training loss, or how many seeds ended at a loss of ln 10, that of "
        "guessing, or above (a run that is not finite stops with an error)."
    )
    yield table(["rate", "K", *(f"beta={beta:g}" for beta in betas)], rows)

    yield "### Few blocks"
    yield (
        "On the right of the plot: the training loss of M-AVG (beta=0.7) over that of K-AVG after "
        "so many boundaries, all tasks. Below 1 the momentum has paid."
    )

    yield "### Every replica sees other classes"
    alike = [
        run for run in accelerating
        if run.task == "mlp" and run.method in ("K-AVG", "M-AVG", "synchronous SGD")
        and run.rate == shards[0].rate and run.seed in {r.seed for r in shards}
    ]  # fmt: skip
    rows = []
    found = grouped(shards, lambda run: (run.k, run.beta))
    for k, beta in found:
        group = found[k, beta]
        same = [run for run in alike if (run.k, run.beta) == (k, beta)]
        rows.append([
            k, f"{beta:g}", mean_cell([r.loss for r in group]),
            mean_cell([r.accuracy for r in group]),
            mean_cell([r.loss for r in same]) if same else "",
            mean_cell([r.accuracy for r in same]) if same else "",
        ])  # fmt: skip
    yield (
        "The digits MLP, the training set sorted by class and cut into P shards, against the same "
        "settings with shuffled data. K=1, beta=0 is synchronous SGD."
    )
    titles = ["K", "beta", "by class: training loss", "test accuracy", "shuffled: training loss",
              "test accuracy"]  # fmt: skip
    yield table(titles, rows)


def plot_limits(diverging, accelerating, path):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (rate, k), group in grouped(diverging, lambda run: (run.rate, run.k)).items():
        by_beta = grouped([r for r in group if r.beta], lambda run: run.beta)
        x = [rate * k * beta / (1 - beta) for beta in by_beta]
        losses = [geometric(min(r.loss, 10) for r in of_beta) for of_beta in by_beta.values()]
        marker = "o" if k == 8 else "s"
        left.plot(x, losses, marker=marker, linewidth=0.8, label=f"rate {rate:g}, K={k}")
    left.axhline(math.log(10), color="grey", linestyle="--", linewidth=0.8)
    left.set_xlabel("rate · K · beta / (1 - beta)")
    left.set_ylabel("final training loss (10 or more: at 10)")
    left.set_xscale("log")
    left.set_yscale("log")
    left.legend(fontsize=7)
    for (task, k), group in grouped(accelerating, lambda run: (run.task, run.k)).items():
        ours = [r for r in group if r.method == "M-AVG" and r.beta == 0.7]
        plain = [r for r in group if r.method == "K-AVG" and ours and r.rate == ours[0].rate]
        if not plain:
            continue
        samples = ours[0].samples
        ratios = [
            geometric(r.loss_at(n) for r in ours) / geometric(r.loss_at(n) for r in plain)
            for n in samples
        ]
        blocks = samples / (BATCH * ours[0].replicas * k)
        right.plot(blocks, ratios, marker=".", linewidth=0.8, label=f"{task}, K={k}")
    right.axhline(1, color="grey", linestyle="--", linewidth=0.8)
    right.set_xlabel("boundaries so far")
    right.set_ylabel("training loss: M-AVG, beta=0.7, over K-AVG")
    right.set_xscale("log")
    right.set_yscale("log")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# -- numbers --------------------------------------------------------------------------------


def geometric(values):
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(list(values)))))


def half_width(values):
    """Half of a 95 % interval for the mean over the first axis."""
    values = np.asarray(values)
    n = len(values)
    if n < 2:
        return np.zeros(values.shape[1:])
    return stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / math.sqrt(n)


def mean_cell(values):
    if not np.all(np.isfinite(values)):
        return "diverged"
    return f"{np.mean(values):.4f} ± {half_width(values):.4f}"


def samples_cell(group, target):
    reached = [n for n in (run.samples_to(target) for run in group) if n is not None]
    if len(reached) < len(group):
        return f"{len(reached)} of {len(group)} seeds"
    return f"{np.mean(reached):,.0f} ± {half_width(reached):,.0f}"


def paired_ratio(group, baseline, target):
    """How many times the samples that the baseline needed, and a p; "" if a seed needed more
    than there were."""
    ours = [run.samples_to(target) for run in group]
    theirs = [run.samples_to(target) for run in baseline]
    if None in ours or None in theirs:
        return "", ""
    logs = np.log(ours) - np.log(theirs)
    p = stats.ttest_1samp(logs, 0).pvalue
    return f"{math.exp(logs.mean()):.2f}", "<.001" if p < 0.001 else f"{p:.3f}"


def p_value(text):
    return float(text.lstrip("<"))


def difference(group, baseline):
    gains = [a.accuracy - b.accuracy for a, b in zip(group, baseline, strict=True)]
    return f"{np.mean(gains):+.4f} ± {half_width(gains):.4f}"


def table(titles, rows):
    width = len(titles)
    lines = [titles, ["---"] * width, *([*row, *[""] * (width - len(row))] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
