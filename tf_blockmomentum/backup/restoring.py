"""What becomes of a backup's values: each variable's, and the callbacks' progress."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tf_blockmomentum._private import models as _models
from tf_blockmomentum.backup.pieces import Piece, from_bytes
from tf_blockmomentum.backup.state import plain
from tf_blockmomentum.boundary.boundary import Boundary


def check_variables(piece: Piece, described: list[list[Any]]) -> None:
    """Raises ValueError if the backup is of another model."""
    for n, (theirs, ours) in enumerate(itertools.zip_longest(piece.meta["variables"], described)):
        if theirs is None or ours is None or theirs[1:] != ours[1:]:
            raise ValueError(
                f"{piece.path} is a backup of another model. Received: for variable {n} "
                f"(path, shape, type) {ours}, in the backup {theirs}. Use another directory "
                "for another model, or empty this one."
            )


def own_values(piece: Piece, replicas: int) -> Iterator[list[np.ndarray]]:
    """For every variable, the values of this worker's replicas, of which there are so many."""
    for i, (_, shape, dtype) in enumerate(piece.meta["variables"]):
        yield [from_bytes(piece[f"{r}/{i}"], shape, dtype) for r in range(replicas)]


def redistributed(
    pieces: Sequence[Piece],
    variables: Sequence[Any],
    model: keras.Model,
    replica: Boundary,
    replicas: Sequence[int],
) -> Iterator[list[np.ndarray]]:
    """As `own_values`, from the pieces of other workers.

    Args:
        pieces: all of a backup.
        variables: whose values.
        model: which is trained.
        replica: its `Boundary`.
        replicas: the numbers of this worker's.
    """
    old = {r: (p, k) for p in pieces for k, r in enumerate(p.meta["replicas"])}
    metrics = {id(v) for m in model.metrics for v in m.variables}
    shared = {id(g.state) for g in _models.seed_generators(model)}
    anew = {id(v) for v in replica.of_this_block}
    parts = {id(v) for v in replica.parts}
    for i, variable in enumerate(variables):
        _, shape, dtype = pieces[0].meta["variables"][i]

        def value(former: int, i: int = i, shape: Any = shape, dtype: str = dtype) -> np.ndarray:
            piece, k = old[former]
            return from_bytes(piece[f"{k}/{i}"], shape, dtype)

        if id(variable) in metrics:  # sums over the replicas
            first = replicas[0] == 0
            zero = np.zeros_like(value(0))
            total = sum((value(r) for r in old), zero) if first else zero
            yield [total if r == 0 else zero for r in replicas]
        elif id(variable) in parts:
            whole = [value(r) for r in range(len(old))]
            yield [replica.layout.anew(whole, r) for r in replicas]
        elif id(variable) in anew:
            yield [np.zeros_like(value(0)) for _ in replicas]
        else:
            same = id(variable) in shared
            yield [value(0 if same else r % len(old)) for r in replicas]


def progress_of(
    callbacks: Sequence[Any], begun_with: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Of each callback what fit has changed: numbers and strings, and arrays by a name.
    `begun_with`: their attributes, as `plain`, when it began."""
    changed: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for n, (callback, before) in enumerate(zip(callbacks, begun_with, strict=True)):
        now = plain(vars(callback))
        changed.append({k: v for k, v in now.items() if before.get(k, ...) != v})
        for name, value in vars(callback).items():
            if isinstance(value, list) and all(
                isinstance(a, np.ndarray | np.generic)
                for a in value  # a scalar weight is no array
            ):
                arrays |= {f"callback-{n}/{name}/{k}": a for k, a in enumerate(value)}
    return changed, arrays


def restore_callbacks(piece: Piece, callbacks: Sequence[Any]) -> None:
    """What was noted of them in `progress_of`."""
    for n, (callback, changed) in enumerate(zip(callbacks, piece.meta["callbacks"], strict=False)):
        vars(callback).update(changed)
        lists: dict[str, list[np.ndarray]] = {}
        for name in piece:
            owner, _, rest = name.partition("/")
            if owner == f"callback-{n}":
                lists.setdefault(rest.rpartition("/")[0], []).append(piece[name])
        vars(callback).update(lists)


def described_start(
    piece: Piece, epochs: int, over: bool, others: tuple[int, int] | None = None
) -> str:
    """What a fit of so many epochs says that begins with a backup.

    Args:
        over: whether the fit before had come to its end, maybe before its last epoch.
        others: workers and replicas of this fit, if they are not those of the backup.
    """
    meta, path = piece.meta, piece.path.parent
    if meta["step"] == 0 and (over or meta["epoch"] >= epochs):
        more = "" if over else f"epochs={epochs} asks for no more, "
        return (
            f"this fit has ended already, after {meta['epoch']} epochs: the model is as in "
            f"{path}; {more}another directory begins anew"
        )
    text = f"going on from {path}"
    if others is not None:
        text += (
            f" of {meta['workers']} workers ({meta['all_replicas']} replicas) on {others[0]} "
            f"({others[1]}): weights, anchor, velocity and counters as they were, a replica's own "
            "state another's or new"
        )
    return f"{text}; epoch {meta['epoch'] + 1}, step {meta['step']}"
