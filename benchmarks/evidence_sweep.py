"""How long blocks and how much momentum: M-AVG of a small perceptron, thousands of runs.

In NumPy, many runs side by side; the tests hold it against the library, step by step. It exists
because the library takes some twenty times as long for so small a model.
"""

import itertools

import numpy as np
from evidence_records import SEARCH
from evidence_tasks import mnist1d, schedule, shuffled

WIDTHS = (40, 64, 32, 10)
BATCH, SAMPLES = 16, 196608  # of one replica's step; in all
REPLICAS, PERIODS = (1, 2, 4, 8, 16), (1, 4, 16, 32, 128)
MOMENTA = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
RATES = tuple(0.0125 * 2**i for i in range(9))
CLOSER = (0.57, 1.13)  # between those at the top, where the best are
CLOSER_FOR = ((4, 4), (4, 16), (4, 32), (16, 4), (16, 16), (16, 32))  # P and K
# Rates, the seeds of the search, and others: as it is run, and in small.
WHOLE = RATES, (SEARCH, SEARCH + 1), range(5)
QUICK = (0.1, 0.4), (SEARCH,), range(2)
TOGETHER = 63  # runs side by side


def initial_weights(seed):
    """Weights and biases of each layer, as Keras's defaults draw them."""
    rng, made = np.random.default_rng(seed), []
    for rows, columns in itertools.pairwise(WIDTHS):
        limit = np.sqrt(6 / (rows + columns))
        made += [rng.uniform(-limit, limit, [rows, columns]), np.zeros([columns])]
    return [w.astype("float32") for w in made]


def gradients(weights, x, y):
    """Mean gradients of the cross-entropy for any number of models side by side.

    Args:
        weights: matrices [..., inputs, outputs] and biases [..., outputs] in turn.
        x: [..., batch, inputs].
        y: classes, [..., batch].
    """
    inputs = [x]
    for i in range(0, len(weights), 2):
        x = inputs[-1] @ weights[i] + weights[i + 1][..., None, :]
        inputs.append(np.maximum(x, 0))
    error = np.exp(x - x.max(-1, keepdims=True))
    error /= error.sum(-1, keepdims=True)
    error -= np.eye(x.shape[-1], dtype=x.dtype)[y]
    error /= x.shape[-2]
    found = []
    for i in range(len(weights) - 2, -1, -2):
        found += [error.sum(-2), np.swapaxes(inputs[i // 2], -1, -2) @ error]
        if i:
            error = error @ np.swapaxes(weights[i], -1, -2)
            error *= inputs[i // 2] > 0
    return found[::-1]


def train(start, batches, rates, momenta, period):
    """M-AVG's anchors after training, one for each run.

    Args:
        start: weights, each [runs, ...].
        batches: what each step takes: an iterable of (x, y), [runs, replicas, batch, ...].
        rates: of each step and run, [steps, runs].
        momenta: beta of each run.
        period: K.
    """

    def of_each_run(values, like):
        return np.asarray(values, "float32").reshape([-1] + [1] * (like.ndim - 1))

    anchors = [w.copy() for w in start]
    velocities = [np.zeros_like(w) for w in anchors]
    replicas = None
    for step, (x, y) in enumerate(batches):
        if replicas is None:
            replicas = [np.repeat(w[:, None], x.shape[1], axis=1) for w in anchors]
        for w, gradient in zip(replicas, gradients(replicas, x, y), strict=True):
            w -= of_each_run(rates[step], w) * gradient
        if (step + 1) % period == 0 or step + 1 == len(rates):
            for w, anchor, v in zip(replicas, anchors, velocities, strict=True):
                v *= of_each_run(momenta, v)
                v += w.mean(1) - anchor
                anchor += v
                w[:] = anchor[:, None]
    return anchors


def losses(weights, x, y):
    """Cross-entropy and accuracy of each run's model on the same examples."""
    found = []
    for own in zip(*weights, strict=True):
        z = x
        for i in range(0, len(own), 2):
            z = (z if i == 0 else np.maximum(z, 0)) @ own[i] + own[i + 1]
        z = z - z.max(-1, keepdims=True)
        chosen = np.take_along_axis(z, y[:, None], -1)[:, 0]
        loss = np.mean(np.log(np.exp(z).sum(-1)) - chosen)
        found.append((float(loss), float(np.mean(z.argmax(-1) == y))))
    return found


def run(settings, quick=False):
    """Runs settings of one P and K side by side; returns their rows."""
    x, y = mnist1d(5000 if quick else 50000)
    samples = SAMPLES // (64 if quick else 1)
    training, searched = len(x) * 8 // 10, len(x) * 9 // 10
    replicas, period = settings[0]["replicas"], settings[0]["sync_period"]
    steps = samples // (BATCH * replicas)
    orders, starts = {}, {}
    for seed in {s["seed"] for s in settings}:
        rng = np.random.default_rng(seed)
        order = shuffled(np.arange(training), steps * replicas * BATCH, rng)
        orders[seed] = order.reshape(steps, replicas, BATCH)
        starts[seed] = initial_weights(seed)
    weights = [np.stack(own) for own in zip(*(starts[s["seed"]] for s in settings), strict=True)]

    def batches():
        for step in range(steps):
            indices = np.stack([orders[s["seed"]][step] for s in settings])
            yield x[indices], y[indices]

    rates = np.outer(schedule(steps), [s["rate"] for s in settings])
    with np.errstate(all="ignore"):
        momenta = [s["block_momentum"] for s in settings]
        trained = train(weights, batches(), rates, momenta, period)
        searching = settings[0]["seed"] >= SEARCH
        part = slice(training, searched) if searching else slice(searched, None)
        found = losses(trained, x[part], y[part])
    kind = "validation" if searching else "test"
    return [
        {
            **setting,
            "boundaries": -(-steps // period),
            f"{kind}_loss": f"{loss:.5g}",
            f"{kind}_accuracy": f"{accuracy:.4f}",
        }
        for setting, (loss, accuracy) in zip(settings, found, strict=True)
    ]


def cells(replicas, quick=False):
    """The settings of one P but for rate and seed, of each K in turn."""
    periods, momenta = ((1, 16), (0.0, 0.5)) if quick else (PERIODS, MOMENTA)
    base = {"task": "signals", "method": "M-AVG", "replicas": replicas, "option": ""}
    for period in periods:
        yield [{**base, "sync_period": period, "block_momentum": beta} for beta in momenta]


def of_search(cell, quick):
    """The rates that are tried, the seeds of the search, and those that are reported."""
    rates, search, seeds = QUICK if quick else WHOLE
    if not quick and (cell["replicas"], cell["sync_period"]) in CLOSER_FOR:
        rates += CLOSER
    return rates, search, seeds


def study(replicas, records, quick=False):
    """All runs of one P that are not recorded yet: every rate on the seeds of the search, then
    the best rate of each beta on others."""
    for of_period in cells(replicas, quick):
        rates, search, seeds = of_search(of_period[0], quick)
        wanted = [
            {**cell, "rate": r, "seed": s} for s in search for cell in of_period for r in rates
        ]
        run_missing(wanted, records, quick)
        best = [{**cell, "rate": chosen(cell, records, rates, search)} for cell in of_period]
        run_missing([{**cell, "seed": s} for cell in best for s in seeds], records, quick)


def run_missing(wanted, records, quick):
    missing = [setting for setting in wanted if records.get(setting) is None]
    for i in range(0, len(missing), TOGETHER):
        part = missing[i : i + TOGETHER]
        records.add(run(part, quick))


def chosen(cell, records, rates, search):
    """The rate of the lowest mean validation loss over the seeds of the search; None if one of
    the runs is not recorded."""
    scores = {}
    for rate in rates:
        runs = [records.get({**cell, "rate": rate, "seed": seed}) for seed in search]
        if None in runs:
            return None
        loss = np.mean([float(run["validation_loss"]) for run in runs])
        scores[rate] = loss if np.isfinite(loss) else np.inf
    return min(scores, key=lambda rate: scores[rate])


def outcome(cell, records, quick=False):
    """The rate that the search chose and the test losses with it, if all is recorded."""
    rates, search, seeds = of_search(cell, quick)
    rate = chosen(cell, records, rates, search)
    runs = [records.get({**cell, "rate": rate, "seed": s}) for s in seeds] if rate else [None]
    if None in runs:
        return None
    return rate, np.array([float(run["test_loss"]) for run in runs])
