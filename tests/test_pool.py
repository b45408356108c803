"""The pool of workers that the other tests run on (pool.py)."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf

from tf_blockmomentum.strategy import worker_of


def who(strategy):
    return os.getpid(), worker_of(strategy)


def scaled_sum(strategy, x, scale=1.0):
    """The sum over the workers of x times the worker's number plus one."""
    index, _ = worker_of(strategy)
    print("this is worker", index)
    os.write(2, b"by descriptor\n")
    values = strategy.experimental_distribute_values_from_function(
        lambda _: tf.constant(x * (index + 1))
    )
    return {"sum": strategy.reduce("SUM", values, axis=None).numpy() * scale, "worker": index}


def test_results_come_by_worker(pair, triple):
    for workers, total in ((pair, 3.0), (triple, 6.0)):
        x = np.array([1.0, -2.0], np.float32)
        results = workers.run(scaled_sum, x, scale=10.0)
        assert [result["worker"] for result in results] == list(range(workers.workers))
        for index, result in enumerate(results):
            np.testing.assert_array_equal(result["sum"], x * total * 10)
            lines = workers.output[index].splitlines()
            assert lines.index(f"this is worker {index}") < lines.index("by descriptor")
        ids, numbers = zip(*workers.run(who), strict=True)
        assert numbers == tuple((i, workers.workers) for i in range(workers.workers))
        assert len({*ids, os.getpid()}) == workers.workers + 1
        assert workers.output == [""] * workers.workers


def disturb(strategy):
    strategy.compression = "float16"
    keras.config.set_dtype_policy("mixed_float16")
    tf.config.run_functions_eagerly(True)
    warnings.simplefilter("ignore")
    return keras.layers.Dense(1).name


@pytest.mark.filterwarnings("ignore:foreseen")
def test_each_call_finds_everything_as_new(pair):
    first = pair.run(disturb)
    assert pair.run(state) == [(None, "float32", False)] * 2
    assert pair.run(disturb) == first  # the layer's number
    errors = pair.run(warn, "unexpected", expect_error=True)
    assert [(e.type, e.text) for e in errors] == [("UserWarning", "unexpected")] * 2
    pair.run(warn, "Your input ran out of data; interrupting training")  # as in pyproject.toml
    pair.run(warn, "foreseen")


def state(strategy):
    return (
        strategy.compression,
        keras.config.dtype_policy().name,
        tf.config.functions_run_eagerly(),
    )


def warn(strategy, text):
    warnings.warn(text, stacklevel=1)


def fail(strategy, workers, how):
    """Fails on some workers; the others wait for them."""
    if worker_of(strategy)[0] in workers:
        print("just before")
        if how == "raise":
            raise KeyError("a mistake")
        if how == "exit":
            raise SystemExit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
    return float(strategy.reduce("SUM", tf.ones([]), axis=None))


def test_an_error_on_all_workers_keeps_them(pair):
    before = pair.run(who)
    with pytest.raises(pool.WorkerError, match=r"(?s)Worker \d of 2: KeyError.*, in fail\n.*just"):
        pair.run(fail, (0, 1), "raise")
    errors = pair.run(fail, (0, 1), "exit", expect_error=True)
    assert [(error.type, error.text) for error in errors] == [("SystemExit", "3")] * 2
    assert "in fail\n" in errors[1].traceback
    with pytest.raises(pool.WorkerError, match=r"No worker raised.*returned: \[2.0, 2.0\]"):
        pair.run(fail, (), "raise", expect_error=True)
    assert pair.run(who) == before


@pytest.mark.parametrize(
    ("how", "limit", "texts"),
    [
        pytest.param(
            *("raise", 60, ["Worker 1 of 2: KeyError: 'a mistake'", "in fail\n", "just before"]),
            marks=pytest.mark.slow,
        ),
        ("hang", 2, ["of 2: no answer: in 2 s", "in fail\n", "in reduce\n", "pool_worker.py"]),
        pytest.param(
            *("kill", 60, ["Worker 1 of 2: the process has ended: SIGKILL", "just before"]),
            marks=pytest.mark.slow,  # each starts two pairs
        ),
    ],
)
def test_others_are_started_after_a_failure_of_one(pair, monkeypatch, how, limit, texts):
    monkeypatch.setattr(pool, "SETTLE_SECONDS", 1.0)
    before = pair.run(who)
    began = time.monotonic()
    with pytest.raises(pool.WorkerError) as e:
        pair.run(fail, (1,), how, limit=limit)
    assert time.monotonic() - began < 20
    for text in texts:
        assert text in str(e.value)
    if how == "hang":
        assert str(e.value).count(" in fail\n") == 2  # both stacks
    else:
        assert str(e.value).startswith("Worker 1")  # worker 0 only waited
    for pid, _ in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert pair.run(fail, (), "raise") == [2.0, 2.0]
    assert not {pid for pid, _ in pair.run(who)} & {pid for pid, _ in before}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_workers_end_with_a_pytest_that_is_killed():
    script = textwrap.dedent("""
        import pool, test_pool, time
        print(*(pid for pid, _ in pool.Pool(2).run(test_pool.who)), flush=True)
        time.sleep(100)
    """)
    path = os.pathsep.join([str(pool.HERE), str(pool.HERE.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
    finally:
        process.kill()
        process.communicate()
    assert len(pids) == 2
    until = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
