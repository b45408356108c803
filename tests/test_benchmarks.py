"""The benchmarks: what they compare with is right, and they run."""

import csv
import math
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from helpers import replica_values, run_python
from test_oracles import close, data, start

import tf_blockmomentum as tfbm
from tf_blockmomentum.cost import CostModel

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_elastic_averaging(strategy_of, monkeypatch):
    """Zhang, Choromanska and LeCun (2015), equations 5 and 6, every three steps."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from elastic import ElasticAveraging

    strategy, beta, rate = strategy_of(2), 0.9, 0.1
    batches, dataset = data(9, 2)
    with strategy.scope():
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(3)])
        model.compile(
            ElasticAveraging(keras.optimizers.SGD(rate), sync_period=3, elasticity=beta),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    model.set_weights(start())
    model.fit(dataset, verbose=0, callbacks=[tfbm.BlockTraining()])

    centre = [w.astype("float64") for w in start()]
    local = [[w.copy() for w in centre] for _ in range(2)]
    for step, shares in enumerate(batches, 1):
        for j, (x, y) in enumerate(shares):
            _, grads = reference.softmax_gradients(local[j], x, y)
            local[j] = [w - rate * g for w, g in zip(local[j], grads, strict=True)]
        if step % 3 == 0:
            apart = [[w - c for w, c in zip(own, centre, strict=True)] for own in local]
            local = [
                [w - beta / 2 * a for w, a in zip(own, away, strict=True)]
                for own, away in zip(local, apart, strict=True)
            ]
            means = [np.mean(both, axis=0) for both in zip(*apart, strict=True)]
            centre = [c + beta * m for c, m in zip(centre, means, strict=True)]
    close([v.numpy() for v in model.optimizer.anchors], centre)
    for j in range(2):
        close([replica_values(w)[j] for w in model.trainable_variables], local[j])


def test_the_sweep_is_the_library(strategy_of, monkeypatch):
    """What the sweep over P, K and beta computes side by side are the anchors of BlockMomentum,
    under a falling rate and with a last block that is cut short."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import evidence_sweep
    import evidence_training
    from evidence_tasks import perceptron, schedule

    rng, steps, period, rate, beta = np.random.default_rng(0), 8, 3, 0.2, 0.7
    x = rng.normal(size=[steps, 2, 4, 40]).astype("float32")
    y = rng.integers(0, 10, size=[steps, 2, 4]).astype("int32")
    start = evidence_sweep.initial_weights(7)
    both = [np.stack([w, w]) for w in start]  # beside a run of another rate and beta
    batches = [(np.stack([a, a]), np.stack([b, b])) for a, b in zip(x, y, strict=True)]
    rates = np.outer(schedule(steps), [0.5, rate])
    anchors = evidence_sweep.train(both, batches, rates, [0.0, beta], period)

    strategy = strategy_of(2)
    with strategy.scope():
        model = perceptron(evidence_sweep.WIDTHS)
        peak = keras.Variable(rate, trainable=False)
        inner = keras.optimizers.SGD(evidence_training.falling(peak, schedule(steps)))
        model.compile(
            tfbm.BlockMomentum(inner, period, beta),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    model.set_weights(start)
    dataset = tf.data.Dataset.from_tensor_slices((x.reshape(-1, 40), y.ravel())).batch(8)
    model.fit(dataset, verbose=0, callbacks=[tfbm.BlockTraining()])
    close([v.numpy() for v in model.optimizer.anchors], [w[1] for w in anchors])

    own = [w[1:] for w in anchors]
    (loss, accuracy), logits = evidence_sweep.losses(own, x[0, 0], y[0, 0])[0], model(x[0, 0])
    assert loss == pytest.approx(float(model.loss(y[0, 0], logits)), rel=1e-5)
    assert accuracy == np.mean(np.argmax(logits, -1) == y[0, 0])


def test_a_search_brackets_the_best_rate(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from evidence_records import best_rate

    asked = []

    def score(rate):
        asked.append(rate)
        return math.inf if rate > 2 else abs(math.log2(rate / 1.6))

    best, scores = best_rate(score, 0.1)
    assert best == pytest.approx(1.6)
    assert sorted(scores) == sorted(asked) == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    assert best_rate(score, 0.1, most=4)[1] == pytest.approx(
        {rate: score(rate) for rate in (0.05, 0.1, 0.2, 0.4)}
    )


def test_evidence(tmp_path, strategy_of, monkeypatch):
    """A method with and without block momentum, from the same weights on the same batches, and
    the docs' tables from the docs' recorded runs."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import evidence_records
    import evidence_report
    import evidence_training

    monkeypatch.setattr(evidence_training, "strategy_of", strategy_of)
    trainers = evidence_training.Trainers(quick=True)
    setting = {"task": "digits", "replicas": 2, "sync_period": 8, "rate": 0.4, "option": ""}
    rows = [
        trainers.run({**setting, "method": method, "block_momentum": beta, "seed": seed})
        for method, beta, seed in (("K-AVG", 0.0, 0), ("M-AVG", 0.7, 0), ("M-AVG", 0.7, 100))
    ]
    losses = [float(row["validation_loss"]) for row in rows]
    assert losses[1] < losses[0] < 2.2
    assert [row["boundaries"] for row in rows] == [10, 10, 10]
    assert [row["samples"] for row in rows] == ["2560"] * 3
    assert float(rows[0]["test_loss"]) == losses[0]  # of digits they are the same examples
    assert "test_loss" not in rows[2]  # a search does not see them

    records = evidence_records.Records(tmp_path / "x" / "runs.csv")
    records.add(rows)
    again = evidence_records.Records(records.path)
    found = again.get({**setting, "method": "M-AVG", "block_momentum": 0.7, "seed": 0})
    assert float(found["validation_loss"]) == losses[1]
    assert again.get({**setting, "method": "M-AVG", "block_momentum": 0.7, "seed": 1}) is None

    docs = BENCHMARKS.parent / "docs"
    evidence_report.write(docs / "evidence_runs", tmp_path)
    assert (tmp_path / "evidence.md").read_text() == (docs / "evidence.md").read_text()
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == sorted(p.name for p in docs.glob("evidence_*.png"))
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.slow  # most of a minute, on one core
@pytest.mark.timeout(450)
def test_evidence_in_small(tmp_path):
    """Every study is run, goes on where it was stopped, and is reported from its records."""
    command = [BENCHMARKS / "evidence.py", "--quick"]
    run_python(*command, cwd=tmp_path, limit=400)
    folder = tmp_path / "runs" / "evidence-quick"
    records = folder / "evidence_runs"
    studies = {path.stem: path.read_text() for path in records.iterdir()}
    assert sorted(studies) == ["images", "language", "momentum", "options", "target"]
    text = (folder / "evidence.md").read_text()
    for method in ("SlowMo", "synchronous AdamW", "DiLoCo", "int4"):
        assert f"\n| {method} | " in text
    for picture in ("images", "language", "momentum", "target"):
        assert (folder / f"evidence_{picture}.png").read_bytes().startswith(b"\x89PNG")
    with (records / "images.csv").open(newline="") as file:
        runs = [run for run in csv.DictReader(file) if run["test_loss"]]
    losses = [float(run["test_loss"]) for run in runs if run["method"] == "SlowMo"]
    assert len(losses) == 2  # its two seeds
    assert f"{np.mean(losses):.3f} ± " in text

    # Cut off in the middle of a study, it runs what is missing and nothing else.
    lines = studies["momentum"].splitlines(keepends=True)
    (records / "momentum.csv").write_text("".join(lines[: len(lines) // 2]))
    run_python(*command, "--study", "momentum", cwd=tmp_path, limit=120)
    again = (records / "momentum.csv").read_text().splitlines(keepends=True)
    assert again[: len(lines) // 2] == lines[: len(lines) // 2]
    assert len(again) == len(lines)
    assert (folder / "evidence.md").read_text() == text


def test_the_cost_model_is_found_again(tmp_path, monkeypatch):
    """Fitted to the step times of a CostModel, it predicts what had no part in the fit."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed
    import speed_report

    rows, size = [], 19e6
    for link, bandwidth in (
        ("loopback", float("inf")),
        ("1gbit", 0.8 * 125e6),
        ("100mbit", 0.8 * 125e5),
    ):
        cost = CostModel(0.015, size, bandwidth, latency=0.001, boundary_seconds=0.05)
        half = CostModel(0.015, size / 2, bandwidth, latency=0.001, boundary_seconds=0.05)
        seconds = {("all_reduce alone", 0): 0.2, ("all_reduce of one number", 0): 0.002}
        for k in (8, 32):
            seconds["no communication", k] = 0.015
            seconds["blocks", k] = cost.step(k, 2)
            seconds["blocks, overlap=1.0, float16", k] = half.step(k, 2, overlap=1.0)
        for (method, k), value in seconds.items():
            common = {"model": "mlp", "workers": 2, "link": link, "family": "ours", "k": k}
            rows.append({**common, "method": method, "steps": k or None, "step_seconds": value})
            rows[-1]["model_bytes"] = size
    with (tmp_path / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, speed.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    assert speed_report.write(tmp_path) == 0
    text = (tmp_path / "speed.md").read_text()
    errors = next(line for line in text.splitlines() if line.startswith("| mlp | 2 | "))
    # Both slow links were slower than their rates by the same factor, as the model has it.
    assert errors.startswith("| mlp | 2 | 50 ms | 0.80 of its rate | 0% (at most 0%) | ")
    assert errors.endswith(" | 0% (at most 0%) | 0% (at most 0%) |")  # of the forms that ran
    assert (tmp_path / "speed_mlp_2.png").exists()


def test_the_pages_on_speed_are_of_the_newest_record(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_docs

    shutil.copy(speed_docs.DOCS / "speed.md", tmp_path)
    speed_docs.pages(speed_docs.newest(), tmp_path)
    for page in ("speed.md", "speed_record/index.md"):
        assert (tmp_path / page).read_text() == (speed_docs.DOCS / page).read_text(), page


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_speed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed

    forms = ["blocks", "blocks, overlap=0.5, int8"]
    text = run_python(
        BENCHMARKS / "speed.py", "--links", "loopback", "--periods", 2, "--rounds", 1,
        "--models", "mlp", "--workers", 2, "--only", "memory", "blocks", "--forms", *forms,
        cwd=tmp_path, limit=280,
    )  # fmt: skip
    with (tmp_path / "runs" / "bench" / "speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = {row["method"]: float(row["step_seconds"]) for row in rows if row["step_seconds"]}
    assert {speed.PLAIN, "no communication", "synchronous fit", *forms} <= set(timed)
    assert min(timed.values()) > 0
    peaks: dict = {}
    for row in rows:
        if row["memory"]:
            peaks.setdefault(row["method"], []).append(
                (float(row["memory"]), float(row["model_bytes"]))
            )
    copies = {m: (b[0] - a[0]) / (b[1] - a[1]) for m, (a, b) in peaks.items()}
    assert copies["blocks"] - copies[speed.PLAIN] > 1.5  # anchor, velocity
    assert "| blocks, overlap=0.5, int8 | 2 | " in text
    assert "## The cost model" in text
    assert (tmp_path / "runs" / "bench" / "speed_mlp_2.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shares(tmp_path):
    """Two workers with one setting of threads: its runs are kept, and told over those of none."""
    command = [BENCHMARKS / "shares.py", "--workers", "2", "--rounds", "1"]
    command += ["--settings", "none", "intra, inter=2", "--programs", "overlap"]
    command += ["--add", tmp_path / "runs"]
    text = run_python(*command, limit=280)
    assert len((tmp_path / "runs").read_text().splitlines()) == 2
    rows = [line.split() for line in text.splitlines() if line.startswith("overlap")]
    assert [row[1:3] for row in rows] == [["1.00", "(1.00-1.00)"]] * 2
    assert all(0.1 < float(row[5]) < 10 for row in rows)
