"""What glibc and TensorFlow are told, and that the user's word wins."""

import ctypes
import os
import re
import sys

import pytest
from helpers import run_python

from tf_blockmomentum import process

PROGRAM = """
import resource
import tf_blockmomentum as tfbm
import numpy as np

tfbm.MultiDeviceBlockStrategy(["CPU:0"])
for n in range(60):
    if n == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(190_000)  # 1.5 MB, freed at once
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(
    "given",
    [{}, pytest.param({"MALLOC_MMAP_THRESHOLD_": "1000000"}, marks=pytest.mark.slow)],
)
def test_memory_that_is_freed_is_kept(given):
    """Under a strategy the same buffer costs pages once; with the user's own setting, each time
    as without us."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    text = run_python("-c", PROGRAM, environment=environment | given, limit=60)
    faults = int(re.search(r"faults (\d+)", text)[1])
    assert faults > 10_000 if given else faults < 2_000


def test_what_a_worker_is_told():
    told = process.memory_settings({}, 1)
    assert told["MALLOC_ARENA_MAX"] == "1"
    for user in ("MALLOC_ARENA_MAX", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        assert process.memory_settings({user: "x"}, 1) == {}
    assert process.memory_settings({}, 64) == {}  # threads of many cores would wait for one arena


THREADS = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import tensorflow as tf
import tf_blockmomentum as tfbm

tf.config.threading.set_inter_op_parallelism_threads(int(os.environ.get("OWN", 0)))
tfbm.MultiWorkerBlockStrategy()
print("threads", tf.config.threading.get_inter_op_parallelism_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="affinity")
@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, 2),
        pytest.param({"OWN": "1"}, 1, marks=pytest.mark.slow),
        pytest.param({process.INTEROP: "1"}, 0, marks=pytest.mark.slow),  # not told anything
    ],
)
def test_messages_do_not_wait_for_a_step_on_the_only_core(given, threads):
    environment = {k: v for k, v in os.environ.items() if k != process.INTEROP} | given
    text = run_python("-c", THREADS, environment=environment, limit=60)
    assert f"threads {threads}\n" in text


COPIES = """
import ctypes, gc
import keras, numpy as np
import tf_blockmomentum as tfbm

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
def used():
    gc.collect()
    return mallinfo2().uordblks + mallinfo2().hblkhd

strategy = tfbm.MultiWorkerBlockStrategy()
before = used()
with strategy.scope():
    layers = [keras.Input([4000]), keras.layers.Dense(4000), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(tfbm.BlockMomentum("sgd", 2), "mse")
x = np.zeros([12, 4000], "float32")
for _ in range(2):
    model.fit(x, x[:, :1], batch_size=1, verbose=0, callbacks=[tfbm.BlockTraining(False)])
print("copies", (used() - before) / 64e6)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc from 2.33 on")
def test_nothing_of_the_size_of_the_model_is_left_besides_its_variables():
    """After a fit weights and anchor share a buffer, and there is the velocity. TensorFlow's graph
    optimizer makes constants of zeros, as large as what they stand for, and keeps them."""
    # oneDNN's allocator keeps what is freed.
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    text = run_python("-c", COPIES, environment=environment, limit=100)
    assert float(re.search(r"copies (.+)", text)[1]) < 2.8
