"""What a GPU needs of the library, as far as a machine without one can tell."""

import json
import os
import re
from pathlib import Path

import pytest
import tensorflow as tf
from helpers import run_python

from tf_blockmomentum.feed import is_there
from tf_blockmomentum.steps import LocalSteps

ROOT = Path(__file__).parent.parent

PROGRAM = """
import keras, numpy as np
import tf_blockmomentum as tfbm

for overlap in (False, True):
    strategy = tfbm.MultiDeviceBlockStrategy(["CPU:0"])
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([6]), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
        )
        optimizer = tfbm.BlockMomentum(keras.optimizers.Adam(0.1), sync_period=2, overlap=overlap)
        model.compile(optimizer, "mse", steps_per_execution=4)
    training = tfbm.BlockTraining(jit_compile=True, refresh_statistics=0)
    model.fit(np.zeros([32, 6]), np.zeros([32, 3]), batch_size=4, verbose=0, callbacks=[training])
"""


@pytest.mark.timeout(120)
def test_compiled_steps_and_boundaries_do_not_call_the_host(tmp_path):
    """From what XLA was given: no way back to the host, and variables assigned in place."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    }
    run_python("-c", PROGRAM, environment=environment, limit=100)
    found = {}
    for path in tmp_path.glob("*.before_optimizations.txt"):
        name = re.search(r"inference_+(.+?)_+\d+_", path.name)[1]
        found.setdefault(name, []).append(path.read_text())
    # The step is a functools.partial, which TensorFlow calls "function".
    assert set(found) >= {"function", "packed", "come_back", "keep", "begin_next", "outer_step"}
    for name, modules in found.items():
        assert len(modules) <= 2, f"{name} was compiled more than once for each model"
        for text in modules:
            instructions = set(re.findall(r" = \S+ ([a-z-]+)\(", text))
            away = {"infeed", "outfeed", "send", "recv", "custom-call"} & instructions
            assert not away, f"{name}: {away}"
            if name != "packed":  # which assigns nothing
                assert "input_output_alias" in text.splitlines()[0], name


@pytest.mark.slow  # a minute
@pytest.mark.timeout(300)
@pytest.mark.parametrize("devices", [2, "CPU:1"])
def test_iterators_that_are_dropped_in_mid_air(strategy_of, devices):
    """500 of them, each with a batch on its way: TensorFlow's own buffer on the device crashed
    one process in some dozens, when an iterator was deleted that read ahead."""
    strategy = strategy_of(devices)
    data = tf.data.Dataset.range(32).map(lambda x: tf.fill([64], x)).batch(4)
    steps = LocalSteps(tf.reduce_sum, strategy, False)
    for _ in range(500):
        iterator = iter(strategy.experimental_distribute_dataset(data))
        taken, _, following = steps(iterator, 2, peek=True)
        assert taken == 2
        assert is_there(following)
        del iterator, following


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_check_runs_without_a_gpu(tmp_path):
    """`make gpu-check` says that there is none, and checks the same on the CPU."""
    run_python(
        "benchmarks/gpu_check.py", "--quick", "--to", tmp_path, "--only", "right",
        cwd=ROOT, limit=140,
    )  # fmt: skip
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert "none" in results["machine"]["rows"][0]["GPUs"]
    rows = results["right"]["rows"]
    assert len(rows) >= 5
    assert all(row["right"] for row in rows)
    assert "| M-AVG |" in (tmp_path / "gpu_check.md").read_text()
