"""One worker that reads what its training puts on the network: `traffic_worker.py OUT`.

The launcher, and so every worker, has a loopback interface to itself.
"""

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import tf_blockmomentum as tfbm
from tf_blockmomentum.boundary.header import TOLD

STEPS = 10
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
strategy = tfbm.MultiWorkerBlockStrategy(compression="float16")


def loopback_bytes():
    """Bytes received on loopback, after all workers have come here."""
    strategy.reduce("SUM", tf.ones([]), axis=None)
    with open("/proc/net/dev") as lines:
        (line,) = (line for line in lines if line.strip().startswith("lo:"))
    strategy.reduce("SUM", tf.ones([]), axis=None)
    return int(line.split(":")[1].split()[0])


def collectives(function):
    """The collective operations in a compiled function's graph, by kind."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return sorted(
        f"{node.op}:{tf.dtypes.as_dtype(node.attr['T'].type).name}"
        for node in nodes
        if "Collective" in node.op and "Group" not in node.op
    )


saw = {}
x = np.random.default_rng(0).normal(size=[STEPS * 16, 256]).astype("float32")
data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(16)
for compression in ("int8", "int4", "float16", None):
    strategy.compression = compression
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([256]), keras.layers.Dense(1024), keras.layers.Dense(1)]
        )
        optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(1e-4), sync_period=1)
        model.compile(optimizer, "mse", metrics=["mae"])
    blocks = tfbm.BlockTraining()
    model.fit(data, verbose=0, callbacks=[blocks])  # everything is compiled now
    weights = 4 * sum(int(np.prod(w.shape)) for w in model.trainable_variables)
    for sync_period in (1,) if compression else (1, 4, 100):
        optimizer.sync_period = sync_period
        before, blocks_before = loopback_bytes(), optimizer.blocks
        model.fit(data, verbose=0, callbacks=[blocks])
        after = loopback_bytes()
        boundary = blocks._loop.ending.boundary.get_concrete_function(tf.zeros([len(TOLD)]))
        saw[f"{compression} {sync_period}"] = {
            "bytes": after - before,
            "blocks": optimizer.blocks - blocks_before,
            "weights": weights,
            "collectives": collectives(boundary),
        }

# Two dtypes: one packed all-reduce for each, whatever the number of variables.
with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input([256]),
            keras.layers.Dense(8, dtype="float16"),
            keras.layers.Dense(8, dtype="float16"),
            keras.layers.Dense(8),
            keras.layers.Dense(1),
        ]
    )
    model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(1e-4)), "mse")
blocks = tfbm.BlockTraining()
model.fit(data, verbose=0, callbacks=[blocks])
boundary = blocks._loop.ending.boundary.get_concrete_function(tf.zeros([len(TOLD)]))
saw["two dtypes"] = collectives(boundary)
with open(os.path.join(sys.argv[1], f"{index}.json"), "w") as file:
    json.dump(saw, file)
