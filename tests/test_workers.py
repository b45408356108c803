"""Real worker processes over TF_CONFIG: block training against NumPy's, and plain Keras's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import programs
import pytest
import reference
from helpers import examples
from test_oracles import close

HERE = Path(__file__).parent


def on(*names, slow=()):
    """Parametrizes `workers` by these pools of conftest.py."""
    return pytest.mark.parametrize(
        "workers",
        [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in names],
        indirect=True,
    )


@pytest.fixture
def workers(request):
    return request.getfixturevalue(request.param)


def equal_on_all(saw, prefix=""):
    """What each worker saw under this name, which must be equal to the bit."""
    names = [name for name in saw[0] if name.startswith(prefix)]
    assert names
    for name in names:
        for other in saw[1:]:
            np.testing.assert_array_equal(saw[0][name], other[name], err_msg=name)


@pytest.mark.parametrize(
    ("workers", "seed", "jit", "settings"),
    [
        pytest.param(pool, *case, marks=[pytest.mark.slow] * (pool != enough))
        for enough, *case in (
            ("triple", 0, False, {"sync_period": 3, "block_momentum": 0.5}),
            ("pair", 1, True, {"sync_period": 4, "block_momentum": 0.9, "nesterov": True}),
            ("pair", 2, False, {"sync_period": 1, "block_momentum": 0.0}),
        )
        for pool in ("pair", "triple")
    ],
    indirect=["workers"],
)
def test_weights_at_boundaries_are_those_of_m_avg(workers, seed, jit, settings):
    """Of every replica at every boundary; inside a block the replicas differ."""
    count = workers.workers
    x, y = programs.oracle_data(count, 7, seed=seed)
    saw = workers.run(programs.oracle, x, y, jit, settings)
    equal_on_all(saw, "start_")
    batches = [[(x[s, j], y[s, j]) for j in range(count)] for s in range(7)]
    anchors, before = reference.m_avg(
        [saw[0]["start_kernel"], saw[0]["start_bias"]],
        batches * 2, reference.softmax_gradients, learning_rate=0.1, epoch_steps=7,
        **settings,
    )  # fmt: skip
    assert all(len(replicas) == count for replicas in before)
    period = settings["sync_period"]
    ends = [s for s in range(1, 15) if (s - 1) % 7 % period == period - 1 or s % 7 == 0]
    assert all(own["blocks"] == len(ends) == len(anchors) for own in saw)
    for end, want in zip(ends, anchors, strict=True):
        for j, own in enumerate(saw):
            at = [own["kernels"][end - 1], own["biases"][end - 1]]
            close(at, want)
            np.testing.assert_array_equal(at[0], saw[0]["kernels"][end - 1])
            if j and end - 1 not in ends and end > 1:
                inside = own["kernels"][end - 2]
                assert not np.array_equal(inside, saw[0]["kernels"][end - 2])


@on("pair", "triple", slow=["triple"])
def test_fit(workers, tmp_path):
    """Logs, weights and statistics are the same on all workers, and it learns."""
    saw = workers.run(programs.fit, str(tmp_path))
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


@on("pair", "triple", slow=["pair"])
@pytest.mark.parametrize(
    ("steps_per_execution", "overlap"),
    [pytest.param(1, False, marks=pytest.mark.slow), (3, False), (2, 1.0), (1, 0.5)],
)
def test_uneven_data(workers, steps_per_execution, overlap):
    """Everyone ends, a worker without steps left is not in the mean."""
    x, y = programs.oracle_data(workers.workers, 10, seed=9)
    saw = workers.run(programs.uneven, x, y, steps_per_execution, overlap)
    equal_on_all(saw)
    kernel, blocks = uneven_m_avg(saw[0]["start"], x, y, 2, overlap)
    assert saw[0]["blocks"] == blocks
    close([saw[0]["kernel"]], [kernel], 2e-6)


def uneven_m_avg(kernel, x, y, epochs, overlap):
    """K=4, beta=.5, with 10, 7 and 4 steps on the workers; those that took none are left out."""
    steps = [10 - 3 * j for j in range(x.shape[1])]
    anchor = np.append(kernel.astype("float64"), np.zeros([1, 3]), axis=0)
    velocity = np.zeros_like(anchor)
    blocks = 0

    def land(anchor, velocity, deltas):
        velocity = 0.5 * velocity + np.mean(list(deltas.values()), axis=0)
        return anchor + velocity, velocity

    for _ in range(epochs):
        start, late = [anchor] * len(steps), None
        for begin in range(0, 10, 4):
            base = start
            if late is not None:  # the mean lands within this block, after half of it or all
                anchor, velocity = land(anchor, velocity, late)
                base = [anchor] * len(steps)
            deltas = {}
            for j, count in enumerate(steps):
                local = start[j].copy()
                for s in range(begin, min(begin + 4, count)):
                    _, grads = reference.softmax_gradients(
                        [local[:-1], local[-1]], x[s, j], y[s, j]
                    )
                    local -= 0.1 * np.append(grads[0], grads[1][None], axis=0)
                    if s + 1 == begin + 4 * overlap:
                        local, start[j] = base[j] + (local - start[j]), base[j]
                if begin < count:
                    deltas[j] = local - start[j]
            late = deltas
            if not overlap or begin == 8:
                anchor, velocity = land(anchor, velocity, deltas)
                late = None
            # Those whose data has ended do not train any more.
            start = [
                anchor + bool(overlap) * (0.5 * velocity + deltas.get(j, 0))
                for j in range(len(steps))
            ]
            blocks += 1
    return anchor[:-1], blocks


@on("pair", "triple", slow=["pair"])
def test_an_optimizer_of_keras_trains_synchronously(workers):
    x, y = programs.oracle_data(workers.workers, 6, seed=5)
    saw = workers.run(programs.stock, x, y)
    equal_on_all(saw)
    plain = programs.linear(keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy"])
    plain.set_weights([saw[0]["start"], np.zeros(3)])
    x, y = x.reshape(6, -1, 5), y.reshape(6, -1)
    accuracies = []
    for _ in range(2):
        results = []
        for a, b in zip(x, y, strict=True):
            plain.reset_metrics()  # older Keras goes on from the batch before
            results.append(plain.train_on_batch(a, b)[1])
        accuracies.append(np.mean(results))
    close([saw[0]["kernel"]], [plain.get_weights()[0]], 2e-6)
    np.testing.assert_allclose(saw[0]["accuracy"], accuracies, rtol=1e-5)


@on("pair", "triple", slow=["pair"])
def test_logs_of_a_train_step_are_averaged_over_the_workers(workers):
    count = workers.workers
    saw = workers.run(programs.own_log, *programs.oracle_data(count, 6, seed=5))
    assert saw == [[(count - 1) / 2]] * count


@on("pair", "triple", slow=["pair"])
def test_errors_name_the_remedy_on_every_worker(workers):
    count = workers.workers
    for error in workers.run(programs.fit_ones, 40, 8 * count + 1, True, expect_error=True):
        assert error.type == "ValueError"
        assert "must divide by the number of replicas" in error.text
        assert f"batch_size={9 * count};" in error.text
    for error in workers.run(programs.fit_ones, 24, 4 * count, False, expect_error=True):
        assert error.type == "RuntimeError"
        assert "callbacks=[tfbm.BlockTraining()]" in error.text


def launch_isolated(out, workers, script, limit=280):
    """Runs a script of this folder on several workers that have a loopback of their own."""
    command = [sys.executable, "-m", "tf_blockmomentum.launch", "--workers", str(workers)]
    command += [str(HERE / script), str(out)]
    inside = 'ip link set lo up && exec "$@"'
    command = ["unshare", "--net", "--map-root-user", "sh", "-c", inside, "sh", *command]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


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
    launch_isolated(tmp_path, 2, "traffic_worker.py")
    for index in range(2):
        saw = json.loads((tmp_path / f"{index}.json").read_text())
        for settings, blocks in (
            ("None 1", 10),
            ("None 4", 3),
            ("None 100", 1),
            ("float16 1", 10),
            ("int8 1", 10),
            ("int4 1", 10),
        ):
            run = saw[settings]
            assert run["blocks"] == blocks
            compression = settings.split()[0]
            collectives = ["CollectiveReduceV2:float32"]  # the header, and what has no code
            if compression == "float16":
                collectives = ["CollectiveReduceV2:float16", *collectives]
            elif compression != "None":
                codes = ("CollectiveAllToAllV2:int32", "CollectiveGatherV2:int32")
                collectives = [*codes, *collectives]
            assert run["collectives"] == collectives
            assert run["weights"] > 1_000_000
            # Least what codes take, most with scales and padding.
            least = {"None": 1, "float16": 0.5, "int8": 0.25, "int4": 0.125}[compression]
            want = blocks * 2 * run["weights"] * least
            if compression in ("int8", "int4"):
                most = {"int8": 0.26, "int4": 0.135}[compression] * blocks * 2 * run["weights"]
                assert want <= run["bytes"] <= 1.01 * most + 100_000, (settings, run)
                continue
            assert want <= run["bytes"] <= 1.05 * want + 100_000, (settings, run)
        assert saw["two dtypes"] == ["CollectiveReduceV2:float16", "CollectiveReduceV2:float32"]
