"""Tables and plots of what speed.py recorded, and the cost model fitted to it."""

import csv
from collections import defaultdict
from dataclasses import dataclass

import matplotlib
from evidence_report import table
from speed import BATCHES, FORMS, PLAIN
from speed_fit import cost_model
from speed_growth import GROWTH_FORMS

from tf_blockmomentum.cost import COMPRESSED_BYTES, CostModel, parse_bandwidth

matplotlib.use("Agg")
from matplotlib import pyplot

NUMBERS = ("workers", "k", "steps", "step_seconds", "wire_bytes", "model_bytes", "memory",
           "target_steps", "variables", "boundary_seconds", "first_seconds",
           "first_boundary_seconds")  # fmt: skip


@dataclass
class Row:
    """What was recorded of one contender; None where it was not."""

    model: str
    workers: int
    link: str
    family: str
    method: str
    k: int
    steps: int
    step_seconds: float
    wire_bytes: float
    model_bytes: float
    memory: float
    target_steps: float
    variables: float | None = None
    boundary_seconds: float | None = None
    first_seconds: float | None = None
    first_boundary_seconds: float | None = None

    @property
    def label(self):
        return self.method if self.family == "ours" else f"{self.family}: {self.method}"

    @property
    def overlap(self):
        return FORMS.get(self.method, (False, None))[0]

    @property
    def share_of_bytes(self):
        """Of what it sends without compression."""
        return COMPRESSED_BYTES.get(FORMS.get(self.method, (False, None))[1], 4) / 4


class Place:
    """All rows of one model on so many workers over one link."""

    def __init__(self, rows):
        self.rows = rows
        self.model, self.workers, self.link = rows[0].model, rows[0].workers, rows[0].link
        self.size = next(r.model_bytes for r in rows if r.model_bytes)
        self.bare = next(r.step_seconds for r in rows if r.method == "all_reduce alone")
        self.one = next(r.step_seconds for r in rows if r.method == "all_reduce of one number")
        copies = (r.step_seconds for r in rows if r.method == "copy")
        self.copy = next(copies, None)  # seconds to copy the weights in memory
        # Seconds of a step by framework and steps of an execution: without any exchange (of ours
        # a block that never ends), and as its users would train alone.
        self._steps, plain = (
            {(r.family, r.steps): r.step_seconds for r in rows if r.method == method}
            for method in ("no communication", PLAIN)
        )
        self._plain = self._steps | plain

    def plain(self, row):
        """Seconds of a step of training alone, in the same framework and with as many steps at
        each execution (or the most)."""
        return _like(self._plain, row)

    def share(self, row):
        """Of that speed."""
        return self.plain(row) / row.step_seconds if self.plain(row) else None

    def alone(self, row):
        """Seconds of a local step, the boundary left out."""
        return _like(self._steps, row)

    def limit(self, row):
        """The share if the link gave its rate and took no processor, and a boundary's passes over
        the weights went as fast as a copy."""
        if row.method not in FORMS or self.link == "loopback" or not self.copy:
            return None
        cost = CostModel(
            step_seconds=self.plain(row),
            model_bytes=self.size * row.share_of_bytes,
            bandwidth=parse_bandwidth(self.link),
            boundary_seconds=self.copy * (16 if row.overlap else 9) / 2,
        )
        return cost.share(row.k, self.workers, row.overlap)

    def boundary(self, row):
        """Seconds that a block takes longer than its steps."""
        return (row.step_seconds - self.alone(row)) * row.k

    def throughput(self, row):
        return BATCHES[self.model] * self.workers / row.step_seconds

    @property
    def contenders(self):
        others = ("all_reduce alone", "all_reduce of one number", "copy")
        return [r for r in self.rows if r.method not in others and r.step_seconds]


def _like(seconds, row):
    """Of a row's framework and with its number of steps at each execution, or the most."""
    most = max((s or 0 for family, s in seconds if family == row.family), default=0)
    return seconds.get((row.family, row.steps)) or seconds.get((row.family, most or None))


def read(folder):
    """The rows of a folder's `speed.csv`."""
    with (folder / "speed.csv").open(newline="") as file:
        rows = [
            Row(**{n: (float(v) if n in NUMBERS else v) if v else None for n, v in row.items()})
            for row in csv.DictReader(file)
        ]
    for row in rows:
        row.k = int(row.k or 0)
        row.workers = int(row.workers)
    return rows


def places_of(rows):
    """The rows by model, number of workers and link."""
    groups = defaultdict(list)
    for row in rows:
        if row.link and row.step_seconds and row.model in BATCHES and row.workers > 1:
            groups[row.model, row.workers, row.link].append(row)
    return [Place(g) for g in groups.values() if any(r.method == "all_reduce alone" for r in g)]


def write(folder):
    """Writes `speed.md` and plots beside `speed.csv`."""
    rows = read(folder)
    text = text_of(rows, folder)
    (folder / "speed.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))
    return 0 if rows else 1


def text_of(rows, folder):
    """Paragraphs and tables; plots go into the folder."""
    places = places_of(rows)
    by_model = defaultdict(list)
    for place in places:
        by_model[place.model, place.workers].append(place)
    targets = {(r.method, r.k): r.target_steps for r in rows if r.target_steps}
    text = [*alone(rows), *memory(rows), *growth(rows)]
    for place in places:
        text += table_of(place)
    if places:
        text += cost_model(by_model)
        plot(by_model, folder)
    if targets and by_model["mlp", 2]:
        text += time_to_target(by_model["mlp", 2], targets, folder)
    return text


def alone(rows):
    """One worker beside Keras's own fit."""
    mine = [r for r in rows if r.workers == 1 and r.step_seconds]
    if not mine:
        return
    yield "## One worker"
    keras = {(r.model, r.steps): r.step_seconds for r in mine if r.method == PLAIN}
    cells = []
    for row in (r for r in mine if not r.k):
        plain = keras[row.model, row.steps]
        cells.append([
            row.model, int(row.steps), row.method, f"{plain / row.step_seconds:.3f}",
            f"{1000 * row.step_seconds:.3f}", f"{1000 * (row.step_seconds - plain):+.3f}",
        ])  # fmt: skip
    titles = ["model", "steps_per_execution", "method", "speed / Keras's", "ms a step",
              "ms more than Keras"]  # fmt: skip
    yield table(titles, cells)
    boundaries = [r for r in mine if r.k]
    if boundaries:
        yield (
            "A boundary where there is nobody else: what a block of one worker takes longer than "
            "its steps, which is all but the transport."
        )
        cells = []
        for row in boundaries:
            (step,) = (r.step_seconds for r in mine if (r.model, r.steps, r.method, r.k)
                       == (row.model, row.steps, "blocks, one worker", 0))  # fmt: skip
            seconds = (row.step_seconds - step) * row.k
            cells.append([row.model, row.method, f"{1000 * seconds:.1f}"])
        yield table(["model", "method", "ms a boundary"], cells)


def memory(rows):
    """Peaks of two sizes of a model: the difference is copies of the weights."""
    mine = defaultdict(list)
    for row in rows:
        if row.memory:
            mine[row.method].append(row)
    if not mine:
        return
    yield "## Memory"
    copies = {
        method: (large.memory - small.memory) / (large.model_bytes - small.model_bytes)
        for method, (small, large) in mine.items()
    }
    sizes = " and ".join(f"{r.model_bytes / 1e6:.0f}" for r in next(iter(mine.values())))
    yield (
        f"The most that a worker's process ever had, for MLPs of {sizes} MB. *Copies*: what the "
        "larger one had more, over what its weights have more."
    )
    plain = next(iter(copies.values()))
    cells = [
        [method, *(f"{r.memory / 1e6:.0f}" for r in mine[method]), f"{n:.1f}", f"{n - plain:+.1f}"]
        for method, n in copies.items()
    ]
    yield table(["method", "smaller, MB", "larger, MB", "copies", "more than Keras's"], cells)


def growth(rows):
    """Paragraphs and a table."""
    cases = defaultdict(dict)
    for row in rows:
        if row.variables:
            size = f"{row.model_bytes / 1e6:.3g}"
            cases[row.model, size, int(row.variables), row.workers][row.method] = row
    if not cases:
        return
    yield "## Growth"
    yield (
        "On loopback, all workers on the same cores, so beyond two they share them. *A boundary*: "
        "what an execution with one takes longer than one without, in seconds; in brackets over "
        "one all-reduce of as many bytes. *First step* and *first boundary*, in seconds: with all "
        "tracing and compiling; in brackets over plain Keras's first step."
    )
    cells = []
    for case, found in cases.items():
        plain, bare = found[PLAIN], found["all_reduce alone"].boundary_seconds
        for form in (form for form in found if form in GROWTH_FORMS):
            row = found[form]
            cells.append([
                *case, form,
                f"{row.boundary_seconds:.3f} ({row.boundary_seconds / bare:.2f})",
                f"{plain.first_seconds:.1f}",
                f"{row.first_seconds:.1f} ({row.first_seconds / plain.first_seconds:.1f})",
                f"{row.first_boundary_seconds:.1f}",
            ])  # fmt: skip
    titles = ["model", "MB", "variables", "workers", "form", "a boundary", "Keras's first step",
              "first step", "first boundary"]  # fmt: skip
    yield table(titles, cells)


def table_of(place):
    """One table, ratios first."""
    sent = 2 * (place.workers - 1) / place.workers
    yield f"## {place.model}, {place.workers} workers, {place.link}"
    yield (
        f"{place.size / 1e6:.1f} MB are averaged; one all_reduce of as many takes "
        f"{1000 * place.bare:.0f} ms. *Share*: of the speed of as many processes that train "
        "alone, each on its core, in the same framework (ours: plain Keras). *Limit*: what it "
        "could be if the link gave its rate, the transport took no processor, and passes over the "
        "weights went as fast as a copy in memory."
    )
    cells = []
    for row in place.contenders:
        share, limit = place.share(row), place.limit(row)
        blocks = row.method in FORMS
        wire = row.wire_bytes if blocks and place.link != "loopback" else None
        cells.append([
            row.label, row.k or "",
            f"{share:.2f}" if share else "", f"{limit:.2f}" if limit else "",
            f"{place.throughput(row):.0f}",
            f"{1000 * row.step_seconds:.1f}",
            f"{place.boundary(row) / place.bare:.2f}" if blocks else "",
            f"{wire / (sent * row.model_bytes):.3f}" if wire else "",
        ])  # fmt: skip
    titles = ["method", "K", "share", "limit", "examples/s", "ms a step",
              "boundary / all_reduce", "bytes / (2 (P - 1) / P weights)"]  # fmt: skip
    yield table(titles, cells)


# -- pictures -------------------------------------------------------------------------------------


def plot(groups, folder):
    """Throughput and share over K, a column for each link; a picture for each model and P."""
    for (model, workers), those in groups.items():
        colours: dict = {}
        figure, axes = pyplot.subplots(
            2, len(those), figsize=(max(4.2 * len(those), 7), 7.5), squeeze=False, sharey="row",
            sharex=True, layout="constrained",
        )  # fmt: skip
        for column, place in zip(axes.T, those, strict=True):
            lines = defaultdict(list)
            for row in place.contenders:
                if row.k and row.method != "no communication":
                    lines[row.label].append(row)
            for label, rows in lines.items():
                colours.setdefault(label, f"C{len(colours)}")
                style = {"marker": "o", "markersize": 4, "label": label, "color": colours[label]}
                style["linestyle"] = "-" if rows[0].family == "ours" else "--"
                k = [row.k for row in rows]
                column[0].plot(k, [place.throughput(row) for row in rows], **style)
                if all(place.share(row) for row in rows):
                    column[1].plot(k, [place.share(row) for row in rows], **style)
            column[0].set_title(f"{place.link}")
            column[1].set_xscale("log", base=2)
            column[1].set_ylim(0, 1.05)
            column[1].set_xlabel("sync_period (K)")
        axes[0, 0].set_ylabel("examples/s of all workers")
        axes[1, 0].set_ylabel("share of training alone")
        handles = {h.get_label(): h for axis in axes[0] for h in axis.get_lines()}
        figure.legend(handles=handles.values(), loc="outside lower center", ncols=3, fontsize=8)
        figure.suptitle(f"{model}, {workers} workers")
        figure.savefig(folder / f"speed_{model}_{workers}.png", dpi=100)
        pyplot.close(figure)


def time_to_target(those, targets, folder):
    """Steps to the target, which no link changes, times each link's seconds."""
    yield "## Seconds to a training loss"
    yield (
        "Steps that the MLP took, trained once with each method on loopback from the same start "
        "at the same learning rate, times the seconds of a step measured on each link."
    )
    cells, bars = [], {}
    for (method, k), steps in targets.items():
        seconds = [
            next((steps * r.step_seconds for r in p.rows
                  if (r.family, r.method, r.k) == ("ours", method, k)), None)
            for p in those
        ]  # fmt: skip
        cells.append([method, k, int(steps), *(f"{s:.1f}" if s else "" for s in seconds)])
        bars[method, k] = seconds
    yield table(["method", "K", "steps", *(f"{p.link}, s" for p in those)], cells)
    figure, axes = pyplot.subplots(
        1, len(those), figsize=(4 * len(those), 5), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    names = [f"{method}, K={k}" for method, k in bars]
    for i, (axis, place) in enumerate(zip(axes[0], those, strict=True)):
        axis.barh(names, [seconds[i] or 0 for seconds in bars.values()])
        axis.set_title(place.link)
        axis.set_xlabel("seconds to the loss")
    axes[0, 0].invert_yaxis()
    axes[0, 0].tick_params(axis="y", labelsize=7)
    figure.savefig(folder / "speed_target.png", dpi=100)
    pyplot.close(figure)
