"""Several replicas in this process: four logical CPU devices, before TensorFlow runs."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import tensorflow as tf
from helpers import forget_keras_state
from pool import Pool

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

_strategies = {}


@pytest.fixture
def strategy_of():
    """Returns the strategy of P replicas in this process; None for P = 1."""
    import tf_blockmomentum as tfbm

    def make(replicas):
        if replicas == 1:
            return None
        if replicas not in _strategies:
            # TensorFlow's own tests do this: groups of different sizes in one process
            # would otherwise share a collective key.
            tf.distribute.MirroredStrategy._collective_key_base += 100000
            devices = [f"CPU:{i}" for i in range(replicas)]
            _strategies[replicas] = tfbm.MultiDeviceBlockStrategy(devices)
        return _strategies[replicas]

    return make


@pytest.fixture(scope="session")
def pair():
    """Two real workers, see pool.py; each process of pytest has its own, started when used."""
    with Pool(2) as workers:
        yield workers


@pytest.fixture(scope="session")
def triple():
    """Three real workers."""
    with Pool(3) as workers:
        yield workers


@pytest.fixture(autouse=True)
def _forget_keras_state():
    yield
    forget_keras_state()
