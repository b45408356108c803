"""What the parts of `gpu_check.py` are measured on, and how they say what they found."""

import json
import os
import sys

import keras
import tensorflow as tf

NEVER = 10**9  # a block that does not end
GPUS = tf.config.list_physical_devices("GPU")
DEVICE = "GPU:0" if GPUS else "CPU:0"


def say(**row):
    print(json.dumps(row), flush=True)


def machine(quick):
    """What it is measured on."""
    names = [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in GPUS]
    say(
        GPUs=", ".join(map(str, names)) or "none: checked on the CPU, with small sizes",
        cores=len(os.sched_getaffinity(0)),
        TensorFlow=tf.__version__,
        Keras=keras.__version__,
        Python=sys.version.split()[0],
    )
