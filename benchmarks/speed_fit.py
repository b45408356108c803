"""The cost model, fitted to what speed.py recorded, and what it says of more workers."""

import dataclasses
import statistics
from collections import defaultdict

import numpy as np
from evidence_report import table
from speed import FORMS

from tf_blockmomentum.cost import CostModel, parse_bandwidth


def fitted(places):
    """A CostModel for each link, fitted to the blocks without overlap or compression of one model
    on one number of workers: t_0, and how much longer the messages take than their bytes at the
    link's rate. Loopback has no rate, so what it takes is all t_0's.
    """
    lines, values, costs = [], [], {}
    for place in places:
        row = next(r for r in place.rows if r.method == "no communication" and r.family == "ours")
        cost = costs[place.link] = CostModel(
            step_seconds=place.alone(row),
            model_bytes=place.size,
            bandwidth=float("inf") if place.link == "loopback" else parse_bandwidth(place.link),
            latency=place.one / (2 * (place.workers - 1)),
        )
        for row in place.rows:
            if row.method == "blocks":
                block = row.k * row.step_seconds  # errors are relative to it
                lines.append([1 / block, (cost.messages(place.workers) - place.one) / block])
                values.append((place.boundary(row) - place.one) / block)
    lines, values = np.array(lines), np.array(values)

    def slope(x, y):
        return x @ y / (x @ x)

    if np.linalg.matrix_rank(lines) > 1:
        (own, slower), *_ = np.linalg.lstsq(lines, values)
    else:  # one link cannot tell the two apart
        slower = 1.0
        own = slope(lines[:, 0], values - lines[:, 1])
    if own <= 0:
        own, slower = 0.0, slope(lines[:, 1], values)
    elif slower <= 0:
        own, slower = slope(lines[:, 0], values), 1.0
    return own, slower, {
        link: dataclasses.replace(c, boundary_seconds=own, bandwidth=c.bandwidth / slower)
        for link, c in costs.items()
    }  # fmt: skip


def predicted(cost, row, alone):
    """Seconds of a step as the model has it."""
    cost = dataclasses.replace(
        cost, step_seconds=alone, model_bytes=cost.model_bytes * row.share_of_bytes
    )
    return cost.step(row.k, row.workers, row.overlap)


def cost_model(groups):
    """The fit, its error, and what it says of more workers."""
    yield "## The cost model"
    yield (
        "`tf_blockmomentum.cost.CostModel`, fitted for each model and number of workers to the "
        "rows called *blocks* on all links: seconds of a boundary apart from its messages, and "
        "the link's speed as TensorFlow uses it. The errors are those of predicted step times; "
        "only the first of their columns had a part in the fit. (One link alone cannot tell the "
        "two apart: its messages are then taken to need the link's rate.)"
    )
    methods = {row.method for those in groups.values() for p in those for row in p.rows}
    forms = [name for name in FORMS if name in methods]
    cells, shown = [], None
    for (model, workers), those in groups.items():
        own, slower, costs = fitted(those)
        errors = defaultdict(list)
        for place in those:
            for row in place.rows:
                if row.method in FORMS:
                    guess = predicted(costs[place.link], row, place.alone(row))
                    errors[row.method].append(abs(guess / row.step_seconds - 1))
        cells.append([
            model, workers, f"{1000 * own:.0f} ms", f"{1 / slower:.2f} of its rate",
            *(f"{statistics.median(errors[f]):.0%} (at most {max(errors[f]):.0%})"
              if f in errors else "" for f in forms),
        ])  # fmt: skip
        shown = shown or (model, costs)
    titles = ["model", "workers", "boundary without messages", "link", *forms]
    yield table(titles, cells)
    model, costs = shown
    links = [link for link in costs if link != "loopback"]
    if not links:
        return
    yield (
        f"**A prediction, not a measurement**: the share of the speed without communication that "
        f"the model fitted to {model} gives for more workers (a ring; no stragglers; processor "
        f"time as with the workers measured)."
    )
    counts, cells = (8, 64, 256, 1024), []
    for link in links:
        for overlap in (False, 1.0):
            for k in (8, 32):
                shares = [
                    k * costs[link].step_seconds / costs[link].block(k, n, overlap) for n in counts
                ]
                cells.append(
                    [link, k, "overlap" if overlap else "", *(f"{s:.2f}" for s in shares)]
                )
    yield table(["link", "K", "", *(f"P={n}" for n in counts)], cells)
