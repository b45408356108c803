"""Everybody starts the same: what the workers compare when a fit begins."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum.boundary.exchange import gather, take_from_first
from tf_blockmomentum.boundary.header import crc
from tf_blockmomentum.optimizer import find
from tf_blockmomentum.strategy import meeting, replicas_of, worker_of


def start_alike(
    strategy: tf.distribute.Strategy, wrappers: Sequence[Any], variables: Sequence[Any], data: int
) -> None:
    """Before the first step of a fit: all replicas have the first one's weights, the anchor is
    where they are, and nothing else has moved. Called by all workers.

    A checksum tells whether they have them already; then each replica keeps its own inner
    optimizer state. Else all take the first one's, weights and optimizer state.

    Args:
        strategy: of which the replicas are.
        wrappers: the optimizers, built.
        variables: more variables that should be the same, such as a model's.
        data: a checksum of what this worker was given as data, if each is to have the same.
    """
    optimizers = [o for o in map(find, wrappers) if o is not None]
    if strategy.num_replicas_in_sync > 1:
        same = [v for o in optimizers for v in [*o.built_variables, *o.shared_state]]
        same = list({id(v): v for v in [*variables, *same]}.values())
        parts = [replicas_of(v, strategy) for v in same]
        count = max(len(part) for part in parts)
        rows = [[crc(part[r % len(part)] for part in parts), data] for r in range(count)]
        with meeting(strategy, "the beginning of a fit"):
            told = gather(strategy, rows)
        _compare_data(told[:, 1], strategy)
        others = np.flatnonzero(told[:, 0] != told[0, 0])
        if others.size:
            theirs = [v for wrapper in wrappers for v in wrapper.variables]
            with meeting(strategy, "the beginning of a fit"):
                take_from_first(strategy, list({id(v): v for v in [*same, *theirs]}.values()))
            if worker_of(strategy)[0] == 0:
                print(
                    f"tf_blockmomentum: {_name(others, strategy)} began with other weights than "
                    "worker 0, and took its weights and optimizer state.",
                    file=sys.stderr,
                    flush=True,
                )
    for optimizer in optimizers:
        optimizer.restart_block()


def _compare_data(data: np.ndarray, strategy: tf.distribute.Strategy) -> None:
    if not (data == data[0]).all():
        workers = worker_of(strategy)[1]
        warnings.warn(
            "fit was given other arrays on some workers than on others. Arrays are sharded: of "
            f"each batch every worker takes 1/{workers}, so the rest of its own arrays is never "
            "used. If each worker has its own part of the data already, give fit "
            "strategy.distribute_datasets_from_function(lambda context: "
            "tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(batch)), where "
            "batch is the number of examples for one replica.",
            stacklevel=2,
        )


def _name(replicas: np.ndarray, strategy: tf.distribute.Strategy) -> str:
    """The workers of some replicas, in words; of one process, the replicas."""
    workers = worker_of(strategy)[1]
    each = strategy.num_replicas_in_sync // workers
    numbers = sorted({int(replica) // each for replica in replicas})
    kind = "worker" if workers > 1 else "replica"
    return f"{kind}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
