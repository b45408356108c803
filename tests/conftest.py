"""Several replicas in this process: four logical CPU devices, before TensorFlow runs."""

import gc
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import tensorflow as tf
from helpers import forget_keras_state
from pool import Pool

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

# Ignored in a run that a shell has put in the background, and by all that such a run starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one

_strategies = {}


def pytest_collection_finish():
    """What has been imported need not be looked through after each test: Keras's `clear_session`
    collects garbage, which took .3 s of every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def strategy_of():
    """Returns the strategy of P replicas in this process; None for P = 1; one for a device."""
    import tf_blockmomentum as tfbm

    def make(replicas):
        if replicas == 1:
            return None
        if isinstance(replicas, str):
            return tfbm.MultiDeviceBlockStrategy([replicas])
        if replicas not in _strategies:
            # TensorFlow's own tests do this: groups of different sizes in one process
            # would otherwise share a collective key.
            tf.distribute.MirroredStrategy._collective_key_base += 100000
            devices = [f"CPU:{i}" for i in range(replicas)]
            _strategies[replicas] = tfbm.MultiDeviceBlockStrategy(devices)
        return _strategies[replicas]

    return make


@pytest.fixture(scope="session")
def pools():
    """By size, those of this process of pytest; the first use of each starts its workers."""
    with Pool(2) as two, Pool(3) as three:
        yield {2: two, 3: three}


def pool_for(test, pool):
    """With the test's filters of warnings: the configuration's, and its marks'."""
    marks = [line for mark in test.iter_markers("filterwarnings") for line in mark.args]
    pool.filters = [*test.config.getini("filterwarnings"), *marks]
    return pool


@pytest.fixture
def pair(request, pools):
    """Two real workers, see pool.py."""
    return pool_for(request.node, pools[2])


@pytest.fixture
def triple(request, pools):
    """Three real workers."""
    return pool_for(request.node, pools[3])


@pytest.fixture(autouse=True)
def _forget_keras_state():
    yield
    forget_keras_state()
    gc.freeze()  # as above: what survives tests grew, and took up to a second of each
