"""BlockBackup: every worker's exact state on disk, and a fit that goes on from it."""

import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum._private import models as _models
from tf_blockmomentum._private.epochs import epochs_of, set_initial_epoch
from tf_blockmomentum._private.trainer import fit_of
from tf_blockmomentum.backup.pieces import Piece, to_bytes
from tf_blockmomentum.backup.restoring import (
    check_variables,
    described_start,
    own_values,
    progress_of,
    redistributed,
    restore_callbacks,
)
from tf_blockmomentum.backup.shelf import Shelf
from tf_blockmomentum.backup.state import describe, plain, position_of, set_position, variables_of
from tf_blockmomentum.callback import BlockTraining
from tf_blockmomentum.chief_only import ChiefOnly
from tf_blockmomentum.seeds import give_replicas_different_seeds, keep_seeds, replica_ids
from tf_blockmomentum.strategy import replicas_of, worker_of


class BlockBackup(keras.callbacks.Callback):
    """Backs up the exact state of training, and goes on from it in the next fit.

    Put it last in the list of callbacks, on every worker. Each worker writes a file of its
    own: for each of its replicas the weights, anchor, velocity, inner optimizer state,
    statistics, seed states and metrics; learning rate, epoch, step and position in the data.
    When fit begins, the workers agree on the newest backup that all of them have finished,
    restore it and go on in the middle of the epoch. A fit that was stopped and resumed so
    ends in the same weights, bit for bit, as one that never stopped, given the same script,
    workers, devices and deterministic operations (CPUs are; see
    `tf.config.experimental.enable_op_determinism` for GPUs).

    Position in the data: of a fit without a strategy, tf.data's own iterator checkpoint where
    the dataset supports it (a shuffle's buffer is then in the backup). Else, and always under
    a strategy, whose iterators TensorFlow cannot checkpoint, batches are taken and thrown
    away up to the position; iterators of earlier epochs are made and thrown away for their
    seeds. Both are exact for a dataset that gives the same again in a new process: shuffled
    with a seed, or after `keras.utils.set_random_seed`. With `steps_per_epoch` over a dataset
    that repeats, skipping starts from the very first batch.

    Another number of workers (their directory must be shared): weights, anchor, velocity,
    statistics, learning rate and counters are taken as they are, and metrics summed; replica
    j takes the inner optimizer state of the former replica j modulo their number; seeds are
    made different again; local steps since the last boundary are dropped. Of compression, what
    owners have kept back of sums is laid out anew, what senders have of their deltas is dropped.

    Args:
        directory: where to write, one directory per fit; shared by the workers, or each
            machine's own if their number stays the same. Holds `epoch-E-step-S/worker-I-of-P.npz`
            and its SHA-256.
        every: blocks between backups within an epoch; None: only at the ends of epochs. With
            `steps_per_execution` that does not divide the block, at the next batch end. In an
            epoch in which some worker's data has ended already, none until its end.
        keep: complete backups to keep, at least 1; one more is on disk.
        callbacks: callbacks of your own whose progress is to be restored too: numbers, strings
            and lists of arrays among their attributes that fit has changed. That of Keras's
            callbacks in the same fit (EarlyStopping, ReduceLROnPlateau, ModelCheckpoint and so
            on, in ChiefOnly too) and History are restored in any case.

    Cost: on every worker the time to write its replicas' state, during which all wait, and
    the host memory of the largest variable. Disk: `keep + 1` times that state.

    Stopping: a fit that EarlyStopping (or another callback at the end of an epoch) or its last
    epoch has ended is finished, and begun again it trains no more. One that is stopped within
    an epoch is backed up there, and goes on. SIGTERM to any worker, as a machine that is about
    to be reclaimed gets, ends the block on all workers, writes a backup and raises
    `SystemExit(143)` from fit, so that the script does not go on with a half-trained model; a
    SIGTERM handler of the script's own is left alone.

    Lost on failure: the blocks since the last complete backup. A torn, missing or changed
    piece makes its backup not count, with a warning. The state of Python's and NumPy's random
    generators is not in a backup.

    Not for: sharing trained models (use `model.save`).

    Raises:
        ValueError: an argument out of range; in fit, no BlockTraining before it, a backup of
            another model, or of another `steps_per_execution`.
        OSError: a backup cannot be written; the backups before it remain.
        SystemExit: from fit, after SIGTERM.

    Example:

    >>> import tempfile
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
    >>> model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=4), "mse")
    >>> backup = tfbm.BlockBackup(tempfile.mkdtemp(), keep=1)
    >>> history = model.fit(np.ones([64, 4]), np.ones([64, 1]), batch_size=8, epochs=3, verbose=0,
    ...                     callbacks=[tfbm.BlockTraining(), backup])
    >>> sorted(path.name for path in backup.directory.iterdir())
    ['epoch-000002-step-000000000', 'epoch-000003-step-000000000']
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int | None = None,
        keep: int = 2,
        callbacks: Iterable[keras.callbacks.Callback] = (),
    ) -> None:
        super().__init__()
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(
                "`every` must be a number of blocks of at least 1, or None for the ends of epochs "
                f"only. Received: every={every!r}."
            )
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"`keep` must be at least 1. Received: keep={keep!r}.")
        self.directory = pathlib.Path(directory)
        self.every = every
        self.keep = keep
        self._own_callbacks = list(callbacks)
        # (part of a variable, value) for when fit has reset them
        self._metrics: list[tuple[Any, Any]] = []

    # -- Keras calls these ----------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restores the newest backup that all workers have."""
        model = self.model
        training = getattr(model.train_function, "__self__", None)
        if not isinstance(training, BlockTraining):
            raise ValueError(
                "BlockBackup needs BlockTraining in the same fit. Received: callbacks without it. "
                "Use callbacks=[tfbm.BlockTraining(), ..., tfbm.BlockBackup(directory)]."
            )
        self._strategy = model.distribute_strategy
        self._epochs = epochs_of(model)
        self._training = training
        self._loop = training.ready_loop(self._epochs.element_spec)
        self._loop.prepare_spec(self._epochs.element_spec)
        self._optimizers = self._loop.optimizers
        self._worker, self._workers = worker_of(self._strategy)
        self._replicas = replica_ids(self._strategy)
        self._variables = variables_of(model, self._loop)
        known = [*self._own_callbacks, *fit_of(model).keras_callbacks]
        inside = [c.callback if isinstance(c, ChiefOnly) else c for c in known]
        self._callbacks = list({id(c): c for c in inside}.values())
        self._begun_with = [plain(vars(callback)) for callback in self._callbacks]
        self._history: dict[str, Any] | None = None  # of the fit that goes on
        self._saved_midway = False
        self._shelf = Shelf(
            self.directory,
            self.keep,
            self._worker,
            self._workers,
            self._replicas,
            self._strategy.num_replicas_in_sync,
        )
        self._restore(self._shelf.newest(self._strategy))
        self._last_blocks = self._optimizers[0].blocks
        self._listen_to_sigterm()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Restores the metrics, which fit has just reset."""
        for part, value in self._metrics:
            part.assign(value)
        self._metrics = []
        self._epoch = epoch
        self._saved_midway = False
        self._restore_history()
        set_initial_epoch(self.model, None)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        due = self.every and self._optimizers[0].blocks >= self._last_blocks + self.every
        steps, ending = self.params["steps"], self._loop.ending
        # Where all workers are to stop, and know it; else this worker's wish is not yet heard.
        stops = ending.stopping or (self._workers == 1 and self.model.stop_training)
        midway = stops and (steps is None or batch + 1 < steps)
        # A worker whose data has ended is not here and could not write its piece.
        if (midway or (due and not stops)) and not ending.ended:
            self._save(self._epoch, batch + 1)
            self._saved_midway = midway
            self._leave_if_asked()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        stopped_within = self._loop.ending.stopping
        self._training.after_callbacks()  # all workers note the same about stopping
        if not self._saved_midway:
            over = bool(self.model.stop_training) and not stopped_within
            self._save(epoch + 1, 0, over and not self._loop.ending.leaving, logs)
        self._leave_if_asked()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._restore_history()
        set_initial_epoch(self.model, None)

    # -- SIGTERM ----------------------------------------------------------------------------------

    def _listen_to_sigterm(self) -> None:
        loop = self._loop

        def note(number: int, frame: Any) -> None:
            loop.wants_to_leave = True

        here = threading.current_thread() is threading.main_thread()
        if here and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, note)
            fit_of(self.model).at_end(lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        loop.wants_to_leave = False

    def _leave_if_asked(self) -> None:
        """Ends the process, as all workers do now; the last backup is complete."""
        if self._loop.ending.leaving:
            self._loop.ending.drop()
            if self._worker == 0:
                text = "BlockBackup: leaving as asked, with a backup; start again to go on"
                print(text, file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGTERM)

    # -- History ----------------------------------------------------------------------------------

    def _history_with(self, logs: dict[str, Any] | None) -> dict[str, list[float]]:
        """History's logs, and those of an epoch that it has yet to hear of."""
        history = self.model.history
        past = {k: [float(v) for v in values] for k, values in history.history.items()}
        for name, value in (logs or {}).items():
            past.setdefault(name, []).append(float(value))
        return past

    def _restore_history(self) -> None:
        if self._history is not None:
            history, past = self.model.history, self._history
            self._history = None
            history.history.update(past)
            history.epoch[:] = range(max(map(len, history.history.values()), default=0))

    # -- saving -----------------------------------------------------------------------------------

    def _save(
        self, epoch: int, step: int, over: bool = False, logs: dict[str, Any] | None = None
    ) -> None:
        """`over`: the fit has come to its end. `logs`: of the epoch that ends."""
        progress.note("writes a backup")
        iterator, batches, one_more = self._loop.data.batches
        epochs = self._epochs.state(epoch_ended=step == 0)
        meta = {
            "format": 1,
            "run": self._shelf.run,
            "worker": self._worker,
            "workers": self._workers,
            "replicas": self._replicas,
            "all_replicas": self._strategy.num_replicas_in_sync,
            "epoch": epoch,
            "step": step,
            "steps": self.params["steps"],
            "position": self._loop.position,
            "batches": 0 if epochs["fresh"] else batches,
            "epochs": epochs,
            "stopped": over,
            "history": self._history_with(logs),
            "variables": self._described,
        }
        meta["callbacks"], arrays = progress_of(self._callbacks, self._begun_with)
        if self._loop.kept is not None:
            arrays |= self._loop.kept.arrays()
        if epochs["goes_on"] and not one_more and isinstance(iterator, tf.data.Iterator):
            arrays |= position_of(iterator)

        def members() -> Iterator[tuple[str, np.ndarray | np.generic]]:
            yield "meta", np.frombuffer(json.dumps(meta).encode(), np.uint8)
            yield from arrays.items()
            for i, variable in enumerate(self._variables):
                for r, part in enumerate(replicas_of(variable, self._strategy)):
                    yield f"{r}/{i}", to_bytes(part.numpy())

        name = f"epoch-{epoch:06d}-step-{step:09d}"
        with self._loop.ending.observer.span("backup"):
            self._shelf.put(name, members())
        self._last_blocks = self._optimizers[0].blocks
        progress.note("wrote a backup")

    # -- restoring --------------------------------------------------------------------------------

    def _restore(self, pieces: list[Piece] | None) -> None:
        if pieces is None:
            return
        meta, model = pieces[0].meta, self.model
        check_variables(pieces[0], self._described)
        step, batches = meta["step"], meta["batches"]
        values = own_values(pieces[0], len(self._replicas))
        exact = self._shelf.is_ours(pieces[0])
        if not exact:
            replica = self._loop.ending.replica
            values = redistributed(pieces, self._variables, model, replica, self._replicas)
            old, new = meta["steps"] or 1, self.params["steps"] or meta["steps"] or 1
            step, batches = step * new // old, batches * new // old
        if step % model.steps_per_execution:
            if exact:
                raise ValueError(
                    f"{pieces[0].path} was written at step {step} of its epoch, which "
                    "steps_per_execution does not divide. Received: steps_per_execution="
                    f"{model.steps_per_execution}. Compile with the former one."
                )
            step -= step % model.steps_per_execution
        metrics = {id(v) for m in model.metrics for v in m.variables}
        self._metrics = []
        for variable, parts in zip(self._variables, values, strict=True):
            for part, value in zip(replicas_of(variable, self._strategy), parts, strict=True):
                part.assign(value)
                if step and id(variable) in metrics:
                    self._metrics.append((part, value))
        for generator in _models.seed_generators(model):
            if exact:
                keep_seeds(generator, self._strategy, self._replicas)
            else:
                generator._tfbm_seed = None
                give_replicas_different_seeds(generator, self._strategy, self._replicas)
        if exact:
            self._loop.go_on(meta["position"])
            if self._loop.kept is not None:
                self._loop.kept.restore(pieces[0], self._epochs.element_spec)
        else:
            for optimizer in self._optimizers:
                optimizer.discard_block()
        restore_callbacks(pieces[0], self._callbacks)
        self._history = meta.get("history")

        def restore_position(iterator: Any) -> None:
            data: dict[str, Any] = (
                pieces[0] if exact and isinstance(iterator, tf.data.Iterator) else {}
            )
            if "data/index" in data:
                set_position(iterator, data)
                self._loop.data.skip(iterator, 0, taken=batches)
            else:
                self._loop.data.skip(iterator, batches)

        self._epochs.resume(meta["epochs"], step, restore_position)
        over = meta["stopped"] and step == 0
        set_initial_epoch(model, self.params["epochs"] if over else meta["epoch"])
        if self._worker == 0:
            now = None if exact else (self._workers, self._strategy.num_replicas_in_sync)
            text = described_start(pieces[0], self.params["epochs"], over, now)
            print(f"BlockBackup: {text}", file=sys.stderr, flush=True)

    @property
    def _described(self) -> list[list[Any]]:
        return describe(self._variables, self._loop.ending.replica.parts)
