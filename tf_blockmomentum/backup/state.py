"""What a backup holds, and what the workers say of theirs."""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum._private import models as _models
from tf_blockmomentum.boundary.exchange import gather
from tf_blockmomentum.loop import BlockLoop
from tf_blockmomentum.optimizer import find
from tf_blockmomentum.strategy import meeting

OFFERED = 16  # newest backups a worker offers to the others when fit begins


def variables_of(model: keras.Model, loop: BlockLoop) -> list[Any]:
    """All state of a training: the model's, the optimizer's, the metrics', the loop's."""
    metrics = [v for metric in model.metrics for v in metric.variables]
    optimizers = [model.optimizer, *_models.optimizers_of(model, find)]  # a GAN has several
    states = [v for optimizer in optimizers if optimizer for v in optimizer.variables]
    found = [*model.variables, *states, *metrics, *loop.variables]
    return list({id(v): v for v in found}.values())


def describe(variables: Sequence[Any], flat: Sequence[Any] = ()) -> list[list[Any]]:
    """Names, shapes and types. `flat`: those whose length goes by the number of replicas."""
    varying = {id(v) for v in flat}
    return [
        [
            getattr(v, "path", v.name),
            [-1] if id(v) in varying else list(v.shape),
            tf.as_dtype(v.dtype).name,
        ]
        for v in variables
    ]


def plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Those attributes that JSON keeps as they are."""
    scalars = {k: v.item() if isinstance(v, np.generic) else v for k, v in attributes.items()}
    return {
        k: v
        for k, v in scalars.items()
        # Keras turns min_delta's sign itself once it knows which way a metric improves.
        if isinstance(v, int | float | str | type(None)) and k != "min_delta"
    }


def position_of(iterator: Any) -> dict[str, np.ndarray]:
    """tf.data's own checkpoint of an iterator, as arrays; nothing if it cannot be had."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            path = tf.train.Checkpoint(iterator=iterator).write(f"{directory}/data")
        except (tf.errors.FailedPreconditionError, tf.errors.UnimplementedError, ValueError):
            return {}
        files = pathlib.Path(directory).glob("data.*")
        return {
            f"data/{file.name.partition('.')[2]}": np.frombuffer(file.read_bytes(), np.uint8)
            for file in files
            if file.name.startswith(pathlib.Path(path).name)
        }


def set_position(iterator: Any, piece: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in piece:
            if name.startswith("data/"):
                pathlib.Path(directory, f"data.{name[5:]}").write_bytes(piece[name].tobytes())
        tf.train.Checkpoint(iterator=iterator).read(f"{directory}/data").assert_consumed()


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def exchange(
    strategy: tf.distribute.Strategy, local: int, numbers: Sequence[int]
) -> tuple[list[set[int]], int]:
    """Gives every worker what each replica's worker offers, and all one random number: a single
    all-reduce. `local`: how many replicas this worker has."""
    own = [int.from_bytes(os.urandom(7), "big"), *numbers, *[0] * (OFFERED - len(numbers))]
    progress.note("waits to agree on a backup")
    with meeting(strategy, "BlockBackup's beginning"):
        rows = gather(strategy, [own] * local)
    progress.note("agreed on a backup")
    return [set(row[1:].tolist()) for row in rows], int(rows[0, 0])
