"""The benchmarks: what they compare with is right, and they run."""

import csv
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import reference
from helpers import replica_values
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


def test_evidence(tmp_path, strategy_of, monkeypatch):
    """One setting of a study with and without block momentum, from the same weights, and the
    docs' tables from the docs' recorded runs."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import evidence
    import evidence_report

    losses = {}
    for setting in evidence.settings(quick=True):
        if (setting["study"], setting["sync_period"]) == ("acceleration", 8):
            beta = setting["block_momentum"]
            if setting["method"] in ("K-AVG", "M-AVG"):
                row = evidence.Trainer(strategy_of(4), setting).run(setting, 0, quick=True)
                assert list(row) == list(evidence.FIELDS)
                assert row["boundaries"] == 10
                assert row["samples"] == "2048 4096 5120"
                losses[beta] = [float(loss) for loss in row["loss"].split()]
    assert losses[0.7][-1] < losses[0.0][-1] < losses[0.0][0]

    docs = BENCHMARKS.parent / "docs"
    evidence_report.write(docs / "evidence_runs.csv", tmp_path, quick=False)
    assert (tmp_path / "evidence.md").read_text() == (docs / "evidence.md").read_text()
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == sorted(p.name for p in docs.glob("evidence_*.png"))
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.slow  # three minutes: a fifth of the gate's time
@pytest.mark.timeout(450)
def test_evidence_in_small(tmp_path, monkeypatch):
    """Every study is run and reported, from recorded runs."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import evidence

    subprocess.run(
        [sys.executable, BENCHMARKS / "evidence.py", "--quick", "--jobs", "1"],
        cwd=tmp_path, check=True, timeout=430, capture_output=True,
    )  # fmt: skip
    folder = tmp_path / "runs" / "evidence-quick"
    with (folder / "evidence_runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    wanted = [(s, seed) for s in evidence.settings(quick=True) for seed in s["seeds"]]
    assert len(runs) == len(wanted)
    losses = [[float(loss) for loss in run["loss"].split()] for run in runs]
    assert all(own[0] > own[-1] for own in losses if len(own) > 1)
    # Of the same seed, block momentum has the lower loss.
    by_beta = {
        beta: [
            own[-1]
            for own, run in zip(losses, runs, strict=True)
            if (run["study"], run["method"], run["sync_period"]) == ("acceleration", method, "8")
        ]
        for beta, method in ((0.0, "K-AVG"), (0.7, "M-AVG"))
    }
    assert all(b < a for a, b in zip(by_beta[0.0], by_beta[0.7], strict=True))
    text = (folder / "evidence.md").read_text()
    for title in ("Acceleration", "Scaling", "inner optimizer's state", "Overlap", "not help"):
        assert f"{title}\n" in text or title in text
    mean = np.mean(by_beta[0.7])
    assert "| M-AVG | 0.2 | 8 | 0.7 | " in text
    assert f"{mean:.4f} ± " in text
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("*.png"))) == 3


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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_speed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed

    forms = ["blocks", "blocks, overlap=0.5, int8"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "speed.py", "--links", "loopback", "--periods", "2",
         "--rounds", "1", "--models", "mlp", "--workers", "2", "--only", "memory", "blocks",
         "--forms", *forms],
        cwd=tmp_path, check=True, timeout=280, capture_output=True, text=True,
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
    assert "| blocks, overlap=0.5, int8 | 2 | " in done.stdout
    assert "## The cost model" in done.stdout
    assert (tmp_path / "runs" / "bench" / "speed_mlp_2.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shares(tmp_path):
    """Two workers with one setting of threads: its runs are kept, and told over those of none."""
    command = [sys.executable, BENCHMARKS / "shares.py", "--workers", "2", "--rounds", "1"]
    command += ["--settings", "none", "intra, inter=2", "--programs", "overlap"]
    command += ["--add", tmp_path / "runs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs").read_text().splitlines()) == 2
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("overlap")]
    assert [row[1:3] for row in rows] == [["1.00", "(1.00-1.00)"]] * 2
    assert all(0.1 < float(row[5]) < 10 for row in rows)
