"""Seeds that differ between replicas."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

# Odd and without pattern: seeds that a user numbered 1, 2, 3 stay apart.
_ODD = 2654435769


def give_replicas_different_seeds(
    generator: Any, strategy: tf.distribute.Strategy, ids: Sequence[int]
) -> None:
    """Moves a seed generator's seed apart on each of this worker's replicas, which have these
    `replica_ids`; replica 0 keeps its own.

    Under tf.distribute all replicas start from one state and would drop the same units.
    Weights loaded later bring one state for all again, so this is done before every fit.
    """
    states = strategy.experimental_local_results(generator.state.value)
    seeds = [int(state.numpy()[0]) for state in states]
    offsets = [i * _ODD for i in ids]
    base = getattr(generator, "_tfbm_seed", None)
    if base is not None and seeds == [(base + offset) % 2**32 for offset in offsets]:
        return
    generator._tfbm_seed = seeds[0]
    for state, offset in zip(states, offsets, strict=True):
        seed = tf.constant((seeds[0] + offset) % 2**32, state.dtype)
        state.assign(tf.stack([seed, state[1]]))


def keep_seeds(generator: Any, strategy: tf.distribute.Strategy, ids: Sequence[int]) -> None:
    """Takes restored seeds for those that `give_replicas_different_seeds` gave."""
    state = strategy.experimental_local_results(generator.state.value)[0]
    offset = ids[0] * _ODD
    generator._tfbm_seed = (int(state.numpy()[0]) - offset) % 2**32


def replica_ids(strategy: tf.distribute.Strategy) -> list[int]:
    """The numbers of this worker's replicas among all replicas."""
    ids = tf.function(lambda: strategy.run(_replica_id), autograph=False)()
    return [int(i) for i in strategy.experimental_local_results(ids)]


def _replica_id() -> tf.Tensor:
    return tf.identity(tf.distribute.get_replica_context().replica_id_in_sync_group)
