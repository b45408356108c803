"""The backups in a directory: which count, and which have had their time."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from tf_blockmomentum.backup.pieces import Damaged, Piece, worker_counts, write
from tf_blockmomentum.backup.state import OFFERED, exchange, hash_of


class Shelf:
    """One worker's view of the directory.

    Args:
        directory: where the backups are.
        keep: complete ones to keep.
        worker: this one's number.
        workers: how many there are.
        replicas: the numbers of this worker's.
        all_replicas: how many there are.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int,
        worker: int,
        workers: int,
        replicas: list[int],
        all_replicas: int,
    ) -> None:
        self._directory, self._keep = directory, keep
        self._worker, self._workers = worker, workers
        self._replicas, self._all_replicas = replicas, all_replicas
        self._names: list[str] = []  # of the backups that count, the oldest first
        self.run = 0  # a number of this fit's, once `newest` has been asked for

    def put(self, name: str, members: Iterable[tuple[str, np.ndarray | np.generic]]) -> None:
        """Writes this worker's piece of a backup, and removes its oldest. Raises OSError."""
        directory = self._directory / name
        path = directory / f"worker-{self._worker}-of-{self._workers}.npz"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write(path, members)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.with_suffix(".tmp").unlink()
                directory.rmdir()  # if it is empty
            raise OSError(
                f"BlockBackup could not write {path}: {error.strerror or error}. Training cannot "
                "go on safely without its backups. Free some space or give another directory; "
                "started again, training goes on from the last complete backup."
            ) from error
        self._names.append(directory.name)
        self._prune()

    def _prune(self) -> None:
        """Removes this worker's oldest pieces. All workers finished the backup before this one,
        or this worker could not have come to its boundary: so `keep` complete ones remain."""
        self._names = self._names[-self._keep - 1 :]
        for directory in self._backups():
            if directory.name >= self._names[0]:
                continue
            patterns = [f"worker-{self._worker}-of-*"]
            if self._worker == 0:  # those of workers that are no more
                indices = {p.name.split("-")[1] for p in directory.glob("worker-*-of-*")}
                patterns += [f"worker-{i}-of-*" for i in indices if int(i) >= self._workers]
            with contextlib.suppress(OSError):  # another worker may be removing it too
                for path in [p for pattern in patterns for p in directory.glob(pattern)]:
                    path.unlink()
                directory.rmdir()

    def _backups(self) -> list[pathlib.Path]:
        """Directories of backups, the newest first."""
        return sorted(self._directory.glob("epoch-*-step-*"), reverse=True)

    def newest(self, strategy: tf.distribute.Strategy) -> list[Piece] | None:
        """Agrees with the other workers on the newest backup; returns its pieces, or None."""
        found, problems = {}, {}
        for directory in self._backups():
            for workers in worker_counts(directory) or [self._workers]:
                try:
                    pieces = self._open(directory, workers)
                except Damaged as error:
                    problems[directory.name] = str(error)
                else:
                    name = f"{directory.name} of {workers} workers, run {pieces[0].meta['run']}"
                    found[name] = pieces
        offered = dict(list(found.items())[:OFFERED])
        hashes = {hash_of(name): name for name in offered}
        rows, self.run = exchange(strategy, len(self._replicas), list(hashes))
        common = [name for key, name in hashes.items() if all(key in row for row in rows)]
        chosen = found[common[0]] if common else None
        newest = chosen[0].path.parent.name if chosen else ""
        # Newer ones, which do not count, must not push out those that do.
        self._names = sorted(d.name for d in self._backups() if d.name <= newest)
        for directory in self._backups():
            if directory.name > newest:
                reason = problems.get(directory.name, "another worker's piece is not whole")
                warnings.warn(
                    f"BlockBackup: {directory} does not count: {reason}. Going back to "
                    f"{newest or 'the beginning'}.",
                    stacklevel=2,
                )
        return chosen

    def _open(self, directory: pathlib.Path, workers: int) -> list[Piece]:
        """This worker's piece of a backup if nothing has changed; else the pieces of all."""
        if workers == self._workers:
            piece = Piece(directory / f"worker-{self._worker}-of-{workers}.npz")
            if self.is_ours(piece):
                return [piece]
        pieces = [Piece(directory / f"worker-{i}-of-{workers}.npz") for i in range(workers)]
        if len({piece.meta["run"] for piece in pieces}) > 1:
            raise Damaged("its pieces are of different runs")
        return pieces

    def is_ours(self, piece: Piece) -> bool:
        """Whether it is this worker's, of as many replicas as there are."""
        return piece.meta["replicas"] == self._replicas and (
            piece.meta["all_replicas"] == self._all_replicas
        )
