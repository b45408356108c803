"""Whether the workers still train one model, as a boundary shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum.boundary.exchange import gather
from tf_blockmomentum.boundary.header import crc
from tf_blockmomentum.strategy import meeting, worker_of


def check_anchors(numbers: Mapping[str, Any], strategy: tf.distribute.Strategy) -> bool:
    """Whether all workers have set the weights, but not to the same; from the header of a block
    that has arrived. Raises RuntimeError if the workers train different models."""
    was_set, anchors = numbers["set"] > 0, np.rint(numbers["anchor"]).astype(int)
    if was_set.any() and not was_set.all():
        raise RuntimeError(
            "Weights were set in the middle of training on some workers only: on "
            f"{_workers(was_set, strategy)}, not on {_workers(~was_set, strategy)}. A callback "
            "that sets weights has to run on all workers (not in ChiefOnly), or before fit, which "
            "takes the chief's weights."
        )
    told = anchors > 0
    if len(set(anchors[told].tolist())) > 1:
        if was_set.all():
            return True
        first = anchors[told][0]
        raise RuntimeError(
            "The workers have come apart: they should all have the same anchor, and "
            f"{_workers(told & (anchors != first), strategy)} has another one than "
            f"{_workers(told & (anchors == first), strategy)}. Is something in the script "
            "(a setting of the optimizer, an assignment to anchors, other software) done on "
            "some workers only? A fit started now takes the chief's weights."
        )
    return False


def check_steps_alike(
    changed: Sequence[Any], stepped: bool, replicas: int, strategy: tf.distribute.Strategy
) -> None:
    """Where steps run eagerly, only those taken tell what a step changes. Raises RuntimeError
    where they have told the workers differently.

    Args:
        changed: variables that a step changes, as far as this worker knows.
        stepped: whether it has taken any.
        replicas: how many this worker has.
        strategy: of which the replicas are.
    """
    if worker_of(strategy)[1] == 1:
        return
    told = crc([np.array([*v.shape, tf.as_dtype(v.dtype).as_datatype_enum]) for v in changed])
    rows = [[told, stepped]] * replicas
    with meeting(strategy, "the end of a block"):
        found = gather(strategy, rows)
    others = found[:, 0] != found[0, 0]
    if others.any():
        without = found[:, 1] == 0
        received = (
            f"{_workers(without, strategy)} has had no batch" if without.any() else "batches"
        )
        raise RuntimeError(
            "With run_eagerly=True only the steps that a worker has taken tell which "
            f"variables a step changes, and on {_workers(others, strategy)} they changed others "
            f"than on {_workers(~others, strategy)}. Received: {received}. Give every worker a "
            "batch in the first block, or compile with run_eagerly=False."
        )


def _workers(which: np.ndarray, strategy: tf.distribute.Strategy) -> str:
    each = len(which) // worker_of(strategy)[1]
    found = sorted({int(replica) // max(each, 1) for replica in np.flatnonzero(which)})
    return ("worker " if len(found) == 1 else "workers ") + ", ".join(map(str, found))
