"""Several replicas in this process: four logical CPU devices, before TensorFlow runs."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import tensorflow as tf

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


@pytest.fixture(autouse=True)
def _forget_keras_state():
    import keras

    yield
    keras.backend.clear_session()
    keras.config.set_dtype_policy("float32")
