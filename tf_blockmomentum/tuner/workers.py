"""How all workers of a cluster search in step: what `tfbm.tuner.distribute` is made of."""

import base64
import json
import math
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import keras
import keras_tuner as kt
import numpy as np
import tensorflow as tf

from tf_blockmomentum._private import keras_tuner as private


class Workers:
    """The workers of a strategy; what one sends, all receive. One worker without a strategy."""

    def __init__(self, strategy: tf.distribute.Strategy | None) -> None:
        self.strategy: Any = strategy
        self.count, self.chief = process_count(strategy), True
        if strategy is not None and self.count > 1:
            run = strategy.run
            self.chief = strategy.extended.should_checkpoint
            self._all_gather = tf.function(
                lambda values: run(_all_gather, args=(values,)), autograph=False
            )
        self.agreed: Exception | None = None  # an error that all workers know of

    def exchange(self, message: Any) -> list[Any]:
        """Sends JSON to all; returns the messages of all workers, in the workers' order."""
        if self.count == 1:
            return [message]
        data = json.dumps(message).encode()
        packed = np.frombuffer(data + b" " * (-len(data) % 4), np.int32)
        try:
            lengths = self._gather(np.asarray([packed.size], np.int32))[:, 0]
            # Few shapes, since each is traced once.
            size = 2 ** max(10, math.ceil(math.log2(max(lengths))))
            rows = self._gather(np.pad(packed, [0, size - packed.size]))
        except tf.errors.OpError as lost:
            self.agreed = kt.errors.FatalRuntimeError(
                "Another worker of the search has ended, cannot be reached, or has failed where "
                "the others did not expect it. The trials so far are in the search's directory: "
                "run the same command again to go on."
            )
            raise self.agreed from lost
        messages = [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
        # A worker's replicas all say the same.
        return [json.loads(text) for text in messages[:: len(messages) // self.count]]

    def _gather(self, vector: np.ndarray) -> np.ndarray:
        """All replicas' vectors, which have one length, as the rows of a matrix."""
        values = self.strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(vector)
        )
        gathered = self._all_gather(values)
        return self.strategy.experimental_local_results(gathered)[0].numpy()

    def from_chief(self, action: Callable[[], Any]) -> Any:
        """Does `action` on the chief alone; returns its result, or raises its error, on all."""
        result: Any = None
        error: Exception | None = None
        if self.chief:
            try:
                result = action()
            except Exception as raised:
                error = raised
        result, message = self.exchange([result, error and f"worker 0: {error}"])[0]
        if message:
            raise error or RuntimeError(message)
        return result

    def agree(self, error: Exception | None, stop: bool = False) -> bool:
        """Raises on all workers if one comes with an error; else whether one wants to stop."""
        if self.agreed is not None and error is self.agreed:
            raise error
        kinds = kt.errors.FatalError, kt.errors.FailedTrialError, Exception
        message: list[Any] = [None, stop]
        if error is not None:
            kind = next(i for i, kind in enumerate(kinds) if isinstance(error, kind))
            text = "".join(traceback.format_exception(error))
            message = [[kind, text], stop]
        messages = self.exchange(message)
        failed = {worker: failure for worker, (failure, _) in enumerate(messages) if failure}
        if not failed:
            return any(stop for _, stop in messages)
        text = "\n".join(f"worker {i} raised: {text}" for i, (_, text) in failed.items())
        kind = min(kind for kind, _ in failed.values())
        types = kt.errors.FatalRuntimeError, kt.errors.FailedTrialError, RuntimeError
        self.agreed = types[kind](f"The trial fails on all workers, since {text}")
        raise self.agreed from error


def _all_gather(vector: tf.Tensor) -> tf.Tensor:
    context = tf.distribute.get_replica_context()
    row = tf.one_hot(
        context.replica_id_in_sync_group, context.num_replicas_in_sync, dtype=tf.int32
    )
    return context.all_reduce("SUM", row[:, None] * vector[None])


def process_count(strategy: tf.distribute.Strategy | None) -> int:
    """How many worker processes a strategy has."""
    return _count(getattr(strategy, "cluster_resolver", None))


def _count(resolver: Any) -> int:
    spec = resolver.cluster_spec().as_dict() if resolver else {}
    return max(1, sum(len(spec.get(kind, ())) for kind in ("chief", "worker")))


class InStep(keras.callbacks.Callback):
    """Runs a trial's callbacks on one of several workers: see `trial.TrialTraining`."""

    def __init__(self, callbacks: Sequence[Any], training: Any, workers: Workers) -> None:
        super().__init__()
        self.callbacks, self.training, self.workers = callbacks, training, workers

    def _call(self, hook: str, *args: Any, **kwargs: Any) -> None:
        try:
            for callback in self.callbacks:
                if self.training.error is None:
                    getattr(callback, hook)(*args, **kwargs)
        except Exception as error:
            self.training.leave(error)

    def set_params(self, params: dict[str, Any]) -> None:
        super().set_params(params)
        self._call("set_params", params)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._call("set_model", model)

    def on_train_begin(self, logs: Any = None) -> None:
        self._call("on_train_begin", logs)
        self.workers.agree(self.training.error)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._call("on_train_batch_end", batch, logs)
        if self.model.stop_training:  # this worker alone may want it
            self.model.stop_training = False
            self.training.leave()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._call("on_epoch_end", epoch, logs)
        wanted = self.training.left or bool(self.model.stop_training)
        self.model.stop_training = self.workers.agree(self.training.error, wanted)


def _forward(hook: str) -> Callable[..., None]:
    return lambda self, *args, **kwargs: self._call(hook, *args, **kwargs)


for _hook in dir(keras.callbacks.Callback):
    if _hook.startswith("on_") and _hook not in vars(InStep):
        setattr(InStep, _hook, _forward(_hook))


def distribute(tuner_class: type[kt.Tuner]) -> type[kt.Tuner]:
    """Makes a KerasTuner class search on all workers of a cluster in step.

    Every worker runs the same script, makes the tuner with the arguments it would have
    alone plus `distribution_strategy=tfbm.MultiWorkerBlockStrategy()`, and calls the same
    methods. Worker 0 owns the oracle and the directory: it alone decides on trials, keeps
    their metrics, and writes; the others get a trial's values, its state and a past
    trial's checkpoint from it, so the directory need not exist for them and their seeds
    do not matter. `get_best_models` is called on all workers or on none.

    * A trial that raises on one worker fails on all, and the search goes on; so does one that
      diverges. Where fit is entered (a hypermodel's own `fit`), callbacks added there
      are beyond this: give callbacks to `search`.
    * One worker that stops training stops it on all, at the end of the epoch.
    * When a worker dies the others end with an error. The same command run again, by
      hand or by the launcher, goes on with the trial that was cut short.

    A trial's model is built once more, without the strategy, so that an error in the
    build meets no worker halfway. The workers exchange small JSON messages, by all-reduce,
    at the beginning and end of a trial and at the end of an epoch; for a warm start and
    for `get_best_models` also the checkpoint.

    In one process the class works as it did; `GridSearch` can then be resumed as well, which
    KerasTuner 1.4.8 alone cannot.

    Args:
        tuner_class: a subclass of `keras_tuner.Tuner`, such as `keras_tuner.Hyperband`.

    Returns:
        The subclass to use in its place.

    Raises:
        TypeError: not a tuner class; when called, a hypermodel that is not a
            `BlockMomentumHyperModel`.
        ValueError: when called, several workers in `TF_CONFIG` and no strategy for them.

    Source: KerasTuner's own `OracleClient` (one oracle, remote tuners); there each worker
    has a trial of its own, here all share one.

    Not for: a cluster whose machines could each train alone. KerasTuner's parallel search
    (KERASTUNER_ORACLE_IP) runs as many trials at a time.
    """
    if not (isinstance(tuner_class, type) and issubclass(tuner_class, kt.Tuner)):
        raise TypeError(
            "distribute takes a tuner class. Received: "
            f"{tuner_class!r}. Write tfbm.tuner.distribute(keras_tuner.RandomSearch)(hypermodel, "
            "..., distribution_strategy=strategy): a tuner that exists has already written."
        )
    return type(
        tuner_class.__name__, (_Distributed, tuner_class), {"__doc__": tuner_class.__doc__}
    )


class _Distributed(kt.Tuner):
    """What distribute() puts in front of a tuner class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.workers = Workers(kwargs.get("distribution_strategy"))
        launched = _count(tf.distribute.cluster_resolver.TFConfigClusterResolver())
        if launched > self.workers.count:
            raise ValueError(
                f"TF_CONFIG names {launched} workers and the tuner has no strategy for them. "
                f"Received: distribution_strategy={kwargs.get('distribution_strategy')!r}. Pass "
                "distribution_strategy=tfbm.MultiWorkerBlockStrategy()."
            )
        if not self.workers.chief:
            self._scratch = tempfile.TemporaryDirectory(prefix="tfbm-tuner-")
            kwargs.update(directory=self._scratch.name, overwrite=False)
        super().__init__(*args, **kwargs)
        if not isinstance(getattr(self.hypermodel, "workers", None), Workers):
            raise TypeError(
                "A distributed tuner needs a BlockMomentumHyperModel. Received: "
                f"{self.hypermodel!r}. Wrap it: tfbm.tuner.BlockMomentumHyperModel(build)."
            )
        self.hypermodel.workers = self.workers
        _share(self.oracle, self.workers)

    def on_search_begin(self) -> None:
        super().on_search_begin()
        self.save()  # a search cut short in its first trial can be resumed too

    def search(self, *args: Any, **kwargs: Any) -> None:
        if not self.workers.chief:
            kwargs["verbose"] = 0
        super().search(*args, **kwargs)

    def run_trial(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        error = results = None
        if self.workers.count > 1:
            try:
                self.hypermodel.build(trial.hyperparameters.copy())
            except Exception as raised:
                error = raised
            self.workers.agree(error)
            self._fetch(trial.hyperparameters.values.get("tuner/trial_id"))  # Hyperband's
        try:
            results = super().run_trial(trial, *args, **kwargs)
        except Exception as raised:
            error = raised
        if self.workers.count == 1 and error is not None:
            raise error
        self.workers.agree(error)
        return results

    def load_model(self, trial: Any) -> keras.Model:
        self._fetch(trial.trial_id)
        return super().load_model(trial)

    def _fetch(self, trial_id: str | None) -> None:
        """Copies a past trial's files from worker 0 to the others' own directories."""
        if trial_id is None or self.workers.count == 1:
            return
        directory = self.get_trial_dir(trial_id)

        def read() -> dict[str, str]:
            names = [n for n in tf.io.gfile.listdir(directory) if n.endswith((".h5", ".json"))]
            return {name: _read_base64(f"{directory}/{name}") for name in names}

        for name, data in self.workers.from_chief(read).items():
            if not self.workers.chief:
                with tf.io.gfile.GFile(f"{directory}/{name}", "wb") as file:
                    file.write(base64.b64decode(data))


def _read_base64(path: str) -> str:
    with tf.io.gfile.GFile(path, "rb") as file:
        return base64.b64encode(file.read()).decode()


class _SharedOracle(kt.Oracle):
    """What distribute() puts in front of an oracle's class: worker 0's decides for all."""

    def create_trial(self, tuner_id: str) -> Any:
        return self._mirror(lambda: super(_SharedOracle, self).create_trial(tuner_id))

    def update_trial(self, trial_id: str, metrics: dict[str, float], step: int = 0) -> Any:
        return self._mirror(
            lambda: super(_SharedOracle, self).update_trial(trial_id, metrics, step=step)
        )

    def end_trial(self, trial: Any) -> None:
        def end() -> Any:
            super(_SharedOracle, self).end_trial(trial)
            return self.trials[trial.trial_id]

        self._mirror(end)

    def save(self) -> None:
        if self._workers.chief:
            super().save()

    def reload(self) -> None:
        if self._workers.chief:
            super().reload()

    def _mirror(self, action: Callable[[], Any]) -> Any:
        """Worker 0's trial of the same state, on every worker."""
        trial = None

        def state() -> dict[str, Any]:
            nonlocal trial
            trial = action()
            return trial.get_state()

        mirrored = self._workers.from_chief(state)
        if not self._workers.chief:
            trial = kt.engine.trial.Trial.from_state(mirrored)
            if trial.status not in ("STOPPED", "IDLE"):  # these are no trials
                self.trials[trial.trial_id] = trial
        return trial


def _share(oracle: Any, workers: Workers) -> None:
    cls = type(oracle)
    oracle.__class__ = type(cls.__name__, (_SharedOracle, cls), {})
    oracle._workers = workers
    if isinstance(oracle, kt.oracles.GridSearchOracle):
        private.resume_grid_search(oracle)
    states = workers.from_chief(lambda: [t.get_state() for t in oracle.trials.values()])
    if not workers.chief:
        trials = [kt.engine.trial.Trial.from_state(state) for state in states]
        oracle.trials = {trial.trial_id: trial for trial in trials}
