"""Real worker processes over TF_CONFIG, started by the launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import reference
from helpers import examples
from test_oracles import close

HERE = Path(__file__).parent


def launch(out, workers, script, *arguments, isolated=False, limit=420):
    """Runs a script of this folder on several workers; returns what the launcher printed."""
    command = [sys.executable, "-m", "tf_blockmomentum.launch", "--workers", str(workers)]
    command += [str(HERE / script), str(out), *arguments]
    if isolated:
        inside = 'ip link set lo up && exec "$@"'
        command = ["unshare", "--net", "--map-root-user", "sh", "-c", inside, "sh", *command]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def equal_on_all(saw, prefix):
    """What each worker saw under this name, which must be equal to the bit."""
    names = [name for name in saw[0] if name.startswith(prefix)]
    assert names
    for name in names:
        for other in saw[1:]:
            np.testing.assert_array_equal(saw[0][name], other[name], err_msg=name)


@pytest.mark.parametrize(
    ("workers", "parts"),
    [
        (2, "12"),
        (3, "1345"),
        pytest.param(2, "1345", marks=pytest.mark.slow),
        pytest.param(3, "12", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(450)
def test_cluster(tmp_path, workers, parts):
    """The first part is the oracle; the others share a launch as time allows."""
    printed = launch(tmp_path, workers, "worker.py", parts)
    for index in range(workers):
        assert f"[worker {index}] end" in printed
    saw = [dict(np.load(tmp_path / f"{index}.npz")) for index in range(workers)]

    # 1. The weights of every replica at every boundary are those of NumPy's M-AVG.
    for case, settings in enumerate(
        [
            {"sync_period": 3, "block_momentum": 0.5},
            {"sync_period": 4, "block_momentum": 0.9, "nesterov": True},
            {"sync_period": 1, "block_momentum": 0.0},
            {"sync_period": 2, "block_momentum": 0.5, "overlap": True},
        ]
    ):
        equal_on_all(saw, f"start_{case}")
        rng = np.random.default_rng(case)
        x = rng.normal(size=[7, workers, 4, 5]).astype("float32")
        y = rng.integers(3, size=[7, workers, 4])
        batches = [[(x[s, j], y[s, j]) for j in range(workers)] for s in range(7)]
        overlap = settings.pop("overlap", False)
        method = reference.overlapped_m_avg if overlap else reference.m_avg
        boundaries = method(
            [saw[0][f"start_{case}_kernel"], saw[0][f"start_{case}_bias"]],
            batches * 2, reference.softmax_gradients, learning_rate=0.1, epoch_steps=7,
            **settings,
        )  # fmt: skip
        if not overlap:  # all replicas are at the anchor
            anchors, before = boundaries
            assert all(len(replicas) == workers for replicas in before)
            boundaries = [[anchor] * workers for anchor in anchors]
        period = settings["sync_period"]
        ends = [s for s in range(1, 15) if (s - 1) % 7 % period == period - 1 or s % 7 == 0]
        assert all(own[f"blocks_{case}"] == len(ends) == len(boundaries) for own in saw)
        for end, want in zip(ends, boundaries, strict=True):
            for j, own in enumerate(saw):
                at = [own[f"kernels_{case}"][end - 1], own[f"biases_{case}"][end - 1]]
                close(at, want[j])
                if not overlap or end % 7 == 0:
                    np.testing.assert_array_equal(at[0], saw[0][f"kernels_{case}"][end - 1])
                if j and end - 1 not in ends and end > 1:
                    inside = own[f"kernels_{case}"][end - 2]
                    assert not np.array_equal(inside, saw[0][f"kernels_{case}"][end - 2])
    if "2" in parts:
        check_fit(tmp_path, saw)
    else:
        check_the_rest(saw)


def check_fit(tmp_path, saw):
    # 2. fit: logs, weights and statistics are the same on all workers, and it learns.
    for prefix in ("history_", "evaluate_", "predict_", "weight_"):
        equal_on_all(saw, prefix)
    first = saw[0]
    assert first["history_loss"][-1] < 0.8 * first["history_loss"][0]
    assert first["history_val_loss"][-1] == pytest.approx(first["evaluate_after"][0], rel=1e-6)
    assert len({int(own["seeds"][0]) for own in saw}) == len(saw)
    model = keras.models.load_model(tmp_path / "model.keras")
    x, y = examples()
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), first["evaluate_after"], rtol=1e-5)
    # Predictions come in the order of the workers' shards of each batch.
    rows = np.concatenate([np.sort(first["predict_after"], axis=0)])
    np.testing.assert_allclose(rows, np.sort(model.predict(x, verbose=0), axis=0), rtol=1e-4,
                               atol=1e-5)  # fmt: skip


def check_the_rest(saw):
    workers = len(saw)
    # 3. Uneven data: everyone ends, a worker without steps left is not in the mean.
    for spe, overlap in ((1, False), (3, False), (2, True)):
        equal_on_all(saw, f"uneven_{spe}")
        rng = np.random.default_rng(9)
        x = rng.normal(size=[10, workers, 4, 5]).astype("float32")
        y = rng.integers(3, size=[10, workers, 4])
        kernel, blocks = uneven_m_avg(saw[0][f"uneven_{spe}_start"], x, y, 2, overlap)
        assert saw[0][f"uneven_{spe}_blocks"] == blocks
        close([saw[0][f"uneven_{spe}_kernel"]], [kernel], 2e-6)

    # 4. Keras's own optimizer trains synchronously.
    equal_on_all(saw, "stock_")
    rng = np.random.default_rng(5)
    x = rng.normal(size=[6, workers, 4, 5]).astype("float32").reshape(6, -1, 5)
    y = rng.integers(3, size=[6, workers, 4]).reshape(6, -1)
    plain = keras.Sequential([keras.Input([5]), keras.layers.Dense(3)])
    plain.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    plain.set_weights([saw[0]["stock_start"], np.zeros(3)])
    accuracies = []
    for _ in range(2):
        results = []
        for a, b in zip(x, y, strict=True):
            plain.reset_metrics()  # older Keras goes on from the batch before
            results.append(plain.train_on_batch(a, b)[1])
        accuracies.append(np.mean(results))
    close([saw[0]["stock_kernel"]], [plain.get_weights()[0]], 2e-6)
    np.testing.assert_allclose(saw[0]["stock_accuracy"], accuracies, rtol=1e-5)

    # What a train_step returned itself, the worker's number, is averaged over the workers.
    for own in saw:
        assert own["own_log"].tolist() == [(workers - 1) / 2]

    # 5. Errors name the remedy, on every worker.
    for own in saw:
        assert "must divide by the number of replicas" in str(own["error_batch"])
        assert f"batch_size={9 * workers};" in str(own["error_batch"])
        assert "callbacks=[tfbm.BlockTraining()]" in str(own["error_callback"])


def uneven_m_avg(kernel, x, y, epochs, overlap):
    """K=4, beta=.5, with 10, 7 and 4 steps on the workers; those that took none are left out."""
    steps = [10 - 3 * j for j in range(x.shape[1])]
    anchor = np.append(kernel.astype("float64"), np.zeros([1, 3]), axis=0)
    velocity = np.zeros_like(anchor)
    blocks = 0
    for _ in range(epochs):
        start, late = [anchor] * len(steps), None
        for begin in range(0, 10, 4):
            deltas = {}
            for j, count in enumerate(steps):
                local = start[j].copy()
                for s in range(begin, min(begin + 4, count)):
                    _, grads = reference.softmax_gradients(
                        [local[:-1], local[-1]], x[s, j], y[s, j]
                    )
                    local -= 0.1 * np.append(grads[0], grads[1][None], axis=0)
                if begin < count:
                    deltas[j] = local - start[j]
            arrived, late = (late, deltas) if overlap else (deltas, None)
            for landing in (arrived, late if begin == 8 else None):
                if landing is not None:
                    velocity = 0.5 * velocity + np.mean(list(landing.values()), axis=0)
                    anchor = anchor + velocity
            # Those whose data has ended do not train any more.
            start = [
                anchor + overlap * (0.5 * velocity + deltas.get(j, 0)) for j in range(len(steps))
            ]
            blocks += 1
    return anchor[:-1], blocks


def can_isolate():
    try:
        test = ["unshare", "--net", "--map-root-user", "ip", "link", "set", "lo", "up"]
        return subprocess.run(test, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.skipif(
    not can_isolate(), reason="needs unshare and ip, and leave to make a network namespace"
)
@pytest.mark.timeout(300)
def test_communication_is_a_packed_all_reduce_a_boundary_and_the_metrics(tmp_path):
    """Bytes read from a loopback interface of the test's own.

    A ring all-reduce of S bytes on P workers sends 2 (P - 1) / P S from each, so 2 S in all
    for P = 2. The metrics, headers and heartbeats must fit in 5 % and 100 kB.
    """
    launch(tmp_path, 2, "traffic_worker.py", isolated=True)
    for index in range(2):
        saw = json.loads((tmp_path / f"{index}.json").read_text())
        for settings, blocks in (
            ("None 1", 10),
            ("None 4", 3),
            ("None 100", 1),
            ("float16 1", 10),
        ):
            run = saw[settings]
            assert run["blocks"] == blocks
            half = settings.startswith("float16")  # the header travels as float32
            dtypes = ["float16", "float32"] if half else ["float32"]
            assert run["collectives"] == [f"CollectiveReduceV2:{dtype}" for dtype in dtypes]
            assert run["weights"] > 1_000_000
            want = blocks * 2 * run["weights"] * (0.5 if half else 1)
            assert want <= run["bytes"] <= 1.05 * want + 100_000, (settings, run)
        assert saw["two dtypes"] == ["CollectiveReduceV2:float16", "CollectiveReduceV2:float32"]
