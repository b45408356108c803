"""BlockReport: what a fit's time went to, and what to change."""

import functools
import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum._private.trainer import fit_of, training_of
from tf_blockmomentum.boundary.exchange import gather
from tf_blockmomentum.report import timeline as _timeline
from tf_blockmomentum.report.advice import advise
from tf_blockmomentum.report.epochs import Epoch, measured, table
from tf_blockmomentum.report.recorder import Block, Recorder
from tf_blockmomentum.strategy import meeting, replicas_of, worker_of


class BlockReport(keras.callbacks.Callback):
    """Says what the time of a fit goes to, and what to change. Beside `BlockTraining`.

    After every epoch the chief prints one line: how many boundaries, bytes that it sent, the share
    of the time in boundaries, how much of that is waiting for the slowest worker, and the drift.
    At the end of fit it prints a table by epoch and, if there is something to gain, advice: a
    longer block, overlap or compression with what the cost model predicts for them, a worker that
    the others wait for, block momentum that is too large. docs/report.md explains every number.

    It runs on all workers (not in `ChiefOnly`), anywhere among the callbacks. What workers tell
    each other is three numbers in the header of the boundary. Norms take a pass over the weights
    each, so that above 100,000 weights only every eighth of the first 64 blocks and every 32nd
    later has them. docs/report.md has what it takes: under 1 % of the time where a block takes
    100 ms or more. With a `timeline` the workers also gather at the end of an epoch.

    Args:
        log_dir: a folder for TensorBoard, written by the chief alone: scalars by block.
        timeline: a file for a timeline of all workers, written by the chief alone, that
            ui.perfetto.dev and chrome://tracing open, and that `python -m
            tf_blockmomentum.report FILE` draws. It grows by some 100 bytes for each thing that
            a worker does, about 1 kB a block and worker; for a few epochs.
        history: whether the numbers are also in the logs of an epoch (`block_drift`,
            `block_boundary_share`, ...) and so in History. Shares of time are the worker's own, so
            a callback that decides something by them decides otherwise on each worker.

    Raises:
        TypeError: `log_dir` or `timeline` is no path, or `history` no bool.
        ValueError: `timeline` is a folder, or in one that does not exist.
        RuntimeError: from fit: there is no `BlockTraining` among its callbacks.

    Not for: a loop of your own with `BlockLoop`, or `train_on_batch`. On a GPU the seconds
    of a boundary are not split exactly, since the host does not wait for each part.

    Example:

    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
    >>> model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=2), "mse")
    >>> report = tfbm.BlockReport(history=True)
    >>> history = model.fit(np.ones([64, 4]), np.ones([64, 1]), batch_size=8, verbose=0,
    ...                     callbacks=[tfbm.BlockTraining(), report])  # doctest: +ELLIPSIS
    4 boundaries, ... % of the time in boundaries
    ...
    >>> history.history["block_boundaries"]
    [4.0]
    """

    on_all_workers = True  # read by ChiefOnly

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        timeline: str | os.PathLike[str] | None = None,
        history: bool = False,
    ) -> None:
        super().__init__()
        self.log_dir = _path("log_dir", log_dir, "a folder")
        self.timeline = _path("timeline", timeline, "a file")
        if self.timeline is not None:
            _timeline.check_path(self.timeline)
        if not isinstance(history, bool):
            raise TypeError(f"`history` must be True or False. Received: history={history!r}.")
        self.history = history
        self._training: Any = None
        self.epochs: list[Epoch] = []
        self.advice: list[str] = []

    # -- Keras calls these ------------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """A new fit: begins to listen to its loop."""
        self._training = training_of(self.model)
        if self._training is None or not self._training.is_fitting:
            raise RuntimeError(
                "BlockReport reports on blocks, which BlockTraining makes. Received: a fit without"
                " it. Give both: fit(..., callbacks=[tfbm.BlockTraining(), tfbm.BlockReport()])."
            )
        self._strategy = self.model.distribute_strategy
        self._worker, self._workers = worker_of(self._strategy)
        self._recorder = Recorder(self._worker, self._workers, self.timeline is not None)
        self._training.observe(self._recorder)
        self.epochs, self.advice, self._said = [], [], ""
        self._blocks = 0
        self._scalars = _Scalars(self.log_dir) if self.log_dir and self._is_chief else None
        self._trace = None
        if self.timeline and self._is_chief:
            self._trace = _timeline.Trace(self.timeline)
        for file in (self._scalars, self._trace):
            if file:
                fit_of(self.model).at_end(file.close)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Says what there was in the last one: Keras's own line of that is complete now."""
        self._say()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Validation, for the timeline."""
        if self._training is not None:  # it is part of a fit
            self._training.flush()
            self._tests = self._recorder.span("validation")
            self._tests.__enter__()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Validation, for the timeline."""
        if self._training is not None:
            self._tests.__exit__(None, None, None)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sums the epoch up."""
        self._training.flush()
        taken = self._recorder.take()
        if not taken.blocks:
            return
        found = Epoch.of(epoch + 1, taken.blocks, taken.began)
        self.epochs.append(found)
        if self._is_chief:
            self._said = found.line()
        if self.history and logs is not None:
            logs.update(found.logs())
        if self._scalars:
            self._scalars.write(self._blocks, taken.blocks)
        self._blocks += len(taken.blocks)
        if self.timeline:
            rows = self._everybodys(_timeline.encode(taken.spans, taken.marks))
            if self._trace:
                self._trace.add(rows)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """The table and the advice."""
        self._say()
        if not self.epochs:
            return
        optimizer = self._training.optimizer
        numbers = measured(
            self.epochs,
            bool(optimizer.overlap),
            getattr(self._strategy, "compression", None),
            optimizer.block_momentum,
        )
        self.advice, self._training = advise(numbers), None
        if self._is_chief:
            print(table(self.epochs), *self.advice, sep="\n", flush=True)

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _is_chief(self) -> bool:
        return self._worker == 0

    def _say(self) -> None:
        if self._said:
            print(self._said, flush=True)
        self._said = ""

    def _everybodys(self, rows: np.ndarray) -> list[np.ndarray]:
        """Every worker's rows, of which each has another number; called by all workers."""
        if self._workers == 1:
            return [rows]
        replicas = len(replicas_of(self._training.optimizer.iterations, self._strategy))
        gathered = functools.partial(self._gather, replicas)
        counts = gathered(np.array([len(rows)]))[:, 0]
        padded = np.zeros([int(counts.max()), rows.shape[1]], np.int64)
        padded[: len(rows)] = rows
        everybodys = gathered(padded.ravel()).reshape(self._workers, *padded.shape)
        return [own[:count] for own, count in zip(everybodys, counts, strict=True)]

    def _gather(self, replicas: int, numbers: np.ndarray) -> np.ndarray:
        with meeting(self._strategy, "a timeline"):
            found = gather(self._strategy, [numbers.tolist()] * replicas)
        return found[::replicas]


class _Scalars:
    """Writes scalars by block for TensorBoard."""

    def __init__(self, log_dir: str) -> None:
        self._writer = tf.summary.create_file_writer(log_dir)

    def write(self, first: int, blocks: list[Block]) -> None:
        """Of blocks from number `first` on."""
        with self._writer.as_default():
            for step, block in enumerate(blocks, start=first):
                values = {k: v for k, v in _scalars(block).items() if np.isfinite(v)}
                summary = tf.compat.v1.Summary(
                    value=[
                        tf.compat.v1.Summary.Value(tag=f"block/{name}", simple_value=value)
                        for name, value in values.items()
                    ]
                )
                tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step)
        self._writer.flush()

    def close(self) -> None:
        """No more blocks."""
        self._writer.close()


def _scalars(block: Block) -> dict[str, float]:
    seconds = {}
    if not block.compiled:
        seconds = {
            "boundary_seconds": block.boundary,
            "boundary_seconds/passes": block.passes,
            "boundary_seconds/waiting": block.waiting,
            "boundary_seconds/transfer": block.transfer,
        }
    steps = {f"step_seconds/worker_{i}": x for i, x in enumerate(block.stepping)}
    return seconds | steps | {
        "bytes": block.bytes,
        "K": block.steps,
        "drift": block.drift,
        "delta_norm": block.delta,
        "velocity_norm": block.velocity,
        "velocity_cosine": block.cosine,
    }  # fmt: skip


def _path(name: str, value: Any, what: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError(f"`{name}` must be {what}'s path, or None. Received: {name}={value!r}.")
    return os.fspath(value)
