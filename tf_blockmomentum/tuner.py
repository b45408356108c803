"""Tuning `sync_period` and `block_momentum` with KerasTuner, in one process or on all workers.

    Tuner = tfbm.tuner.distribute(keras_tuner.BayesianOptimization)
    tuner = Tuner(tfbm.tuner.BlockMomentumHyperModel(build), objective="val_loss",
                  distribution_strategy=strategy, directory="runs")
    tuner.search(x, y, validation_data=(x_val, y_val), epochs=10)

or, without a script of one's own, `python -m tf_blockmomentum.tuner script.py:build --workers 2`
(see `--help`). In one process `distribute` may be left out.
"""

import base64
import functools
import json
import math
import numbers
import statistics
import tempfile
import time
import traceback
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum import _keras
from tf_blockmomentum.callback import BlockTraining, _eagerly
from tf_blockmomentum.cost import CostModel, parse_bandwidth
from tf_blockmomentum.optimizer import BlockMomentum, find

try:
    import keras_tuner as kt
except ImportError as error:
    raise ImportError(
        f"tfbm.tuner needs KerasTuner, which cannot be imported here ({error}). "
        "Run: pip install tf-blockmomentum[tuner]"
    ) from error

K, BETA, INNER = "sync_period", "block_momentum", "inner_learning_rate"  # hyperparameters
MEASURED, PREDICTED = "measured_seconds", "predicted_seconds"  # metrics


# -- the search space ------------------------------------------------------------------------


class BlockMomentumHyperModel(kt.HyperModel):
    r"""Adds K, beta and, if wanted, the inner learning rate to a KerasTuner hypermodel.

    The compiled optimizer is wrapped in `BlockMomentum`, and fit runs in blocks. Works
    with every tuner of KerasTuner that trains Keras models.

    * `sync_period` (K) is searched on a log2 grid: lo, 2 lo, 4 lo, ... up to hi.
    * `block_momentum` (beta) is searched in the effective step $1/(1-\beta)$ on a log
      scale, two values an octave: by default 0, .283, .486, .632, ..., .93, .95.
      In the long run a boundary moves the anchor $1/(1-\beta)$ deltas far.
    * `inner_learning_rate` is searched on a log scale. It interacts with the two
      others: the stable region shrinks like $K \cdot \beta/(1-\beta) \cdot lr$, so what is best
      for one learning rate diverges at another.

    A trial whose loss stops being finite is recorded as failed, at the next batch. After
    `max_consecutive_failed_trials` such trials KerasTuner gives up; its default of 3
    is low for a space that reaches into divergence. Two metrics come with every epoch:
    `measured_seconds`, the training time so far without tracing and validation (steps
    and boundaries times their median durations), and with `time_to_target(...,
    bandwidth=...)` also `predicted_seconds`.

    The optimizer is built before KerasTuner loads a checkpoint (Hyperband's warm starts,
    `get_best_models`), so that anchor, velocity and the inner optimizer's state come
    back too; an unbuilt optimizer is skipped with a warning.

    Args:
        hypermodel: a `keras_tuner.HyperModel`, or a function of `hp` that returns a
            compiled model. Do not enter a strategy's scope in it: give the tuner
            `distribution_strategy`.
        sync_period: (lowest, highest) K; equal to fix it.
        block_momentum: (lowest, highest) beta in [0, 1); equal to fix it.
        inner_learning_rate: None leaves the learning rate alone; or (lowest, highest).

    Raises:
        ValueError: bounds out of range or the wrong way round; when a model is built, one
            that is not compiled or is compiled with a BlockMomentum already.
        TypeError: no hypermodel.

    Not for: choosing K for speed alone, which needs no search (`CostModel` says what a K
    costs); models so large that a trial costs more than the tuned values can save.

    Example:

    >>> def build(hp):
    ...     model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")
    ...     return model
    >>> hypermodel = tfbm.tuner.BlockMomentumHyperModel(build, sync_period=(4, 32))
    >>> hp = keras_tuner.HyperParameters()
    >>> hypermodel.build(hp).optimizer.sync_period, hp.space[0].values
    (4, [4, 8, 16, 32])
    """

    def __init__(
        self,
        hypermodel,
        sync_period=(1, 64),
        block_momentum=(0.0, 0.95),
        inner_learning_rate=None,
    ):
        if not (isinstance(hypermodel, kt.HyperModel) or callable(hypermodel)):
            raise TypeError(
                "BlockMomentumHyperModel wraps a keras_tuner.HyperModel or a function build(hp) "
                f"that returns a compiled model. Received: {hypermodel!r}."
            )
        self.hypermodel = hypermodel
        lo, hi = _bounds(
            K, sync_period, numbers.Integral, "whole numbers of at least 1", lambda k: k >= 1
        )
        self._periods = [lo * 2**i for i in range(int(math.log2(hi / lo) + 1e-9) + 1)]
        lo, hi = _bounds(
            BETA, block_momentum, numbers.Real, "numbers in [0, 1)", lambda beta: 0 <= beta < 1
        )
        ends = math.log2(1 / (1 - lo)), math.log2(1 / (1 - hi))
        octaves = np.linspace(*ends, math.ceil(2 * (ends[1] - ends[0]) - 1e-9) + 1)
        self._momenta = [float(lo), *(round(1 - 0.5 ** float(o), 3) for o in octaves[1:-1])]
        self._momenta += [float(hi)] * (hi > lo)
        self._inner = inner_learning_rate and _bounds(
            INNER, inner_learning_rate, numbers.Real, "numbers above 0", lambda lr: lr > 0
        )
        self.workers = None  # set by distribute()
        super().__init__(getattr(hypermodel, "name", None))

    def declare_hyperparameters(self, hp):
        """The wrapped hypermodel's."""
        if isinstance(self.hypermodel, kt.HyperModel):
            self.hypermodel.declare_hyperparameters(hp)

    def build(self, hp):
        """Builds the wrapped model for `hp` and compiles it with `BlockMomentum`."""
        build = getattr(self.hypermodel, "build", self.hypermodel)
        model = build(hp)
        if not isinstance(model, keras.Model) or not model.compiled:
            raise kt.errors.FatalValueError(
                "The hypermodel must return a compiled keras.Model. Received: "
                f"{model!r}. Call model.compile(optimizer=..., loss=...) before returning it "
                "from build(hp)."
            )
        if find(model.optimizer) is not None:
            raise kt.errors.FatalValueError(
                "BlockMomentumHyperModel wraps the compiled optimizer in BlockMomentum itself. "
                "Received: a model compiled with a BlockMomentum. Compile it with the inner "
                "optimizer, such as keras.optimizers.SGD(0.1)."
            )
        with model.distribute_strategy.scope():
            inner = model.optimizer
            if isinstance(inner, keras.optimizers.LossScaleOptimizer):
                inner = inner.inner_optimizer  # compile will wrap it again
            if self._inner:
                inner.learning_rate = hp.Float(INNER, *self._inner, sampling="log")
            _keras.recompile(
                model,
                BlockMomentum(
                    inner,
                    sync_period=hp.Choice(K, self._periods),
                    block_momentum=hp.Choice(BETA, self._momenta),
                ),
            )
        _build_optimizer_with(model)
        return model

    def fit(self, hp, model, *args, callbacks=(), **kwargs):
        """The wrapped hypermodel's fit (else the model's), in blocks.

        A `BlockTraining` among the callbacks is taken as a wish for its `jit_compile`.
        """
        if self.workers is None and _process_count(model.distribute_strategy) > 1:
            raise kt.errors.FatalValueError(
                "KerasTuner alone would let every worker search on its own. Received: a model "
                "under a strategy of several workers. Make the tuner with "
                "tfbm.tuner.distribute(keras_tuner.RandomSearch)(...)."
            )
        workers = self.workers or _Workers(None)
        objective = next((c.objective for c in callbacks if hasattr(c, "objective")), None)
        given = [c for c in callbacks if isinstance(c, BlockTraining)]
        others = [c for c in callbacks if c not in given]
        training = _TrialTraining(given[0].jit_compile if given else "auto", workers, objective)
        if workers.count > 1:
            others = [_InStep(others, training, workers)]
        fit = model.fit
        if isinstance(self.hypermodel, kt.HyperModel):
            fit = functools.partial(self.hypermodel.fit, hp, model)
        result = fit(*args, callbacks=[training, *others], **kwargs)
        if isinstance(result, keras.callbacks.History) and objective is not None:
            logs = {name: values[-1] for name, values in result.history.items()}
            if not objective.has_value(logs):
                raise kt.errors.FatalValueError(
                    f"The objective is not among the metrics of an epoch. Received: {objective}; "
                    f"an epoch has {', '.join(sorted(logs))}. Use one of these; for a val_ metric "
                    "give search() validation_data."
                )
        return result


def _bounds(name, bounds, kind, expected, valid):
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    if (
        not pair
        or any(isinstance(b, bool) or not isinstance(b, kind) or not valid(b) for b in bounds)
        or bounds[0] > bounds[1]
    ):
        raise ValueError(
            f"`{name}` must be a pair (lowest, highest) of {expected}. Received: "
            f"{name}={bounds!r}. Write the lower bound first; equal bounds fix the value."
        )
    return tuple(bounds)


def _build_optimizer_with(model):
    """Builds the optimizer as soon as the model is built: before weights are loaded."""

    def build_optimizer():
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)

    if model.built:
        build_optimizer()
        return
    build_from_config = model.build_from_config  # what KerasTuner calls before it loads

    def build_both(config):
        build_from_config(config)
        build_optimizer()

    model.build_from_config = build_both


# -- the objective ---------------------------------------------------------------------------


def time_to_target(
    metric, target, direction=None, bandwidth=None, step_seconds=None, give_up=3600.0
):
    """The objective "seconds of training until `metric` reaches `target`", to be minimized.

    Training stops when the target is reached; what is compared are the seconds at the
    end of that epoch, so make epochs short (`steps_per_epoch`). Seconds are

    * measured, by default: this cluster, this link;
    * predicted, with `bandwidth`: the steps taken times the measured duration of a local
      step, plus the boundaries times what `CostModel` predicts for that link and the
      number of replicas of the trial. So one tunes for the cluster that will be used.

    The number of replicas also decides how many steps are needed, and that no model
    predicts: tune with as many replicas as the cluster has. Replicas that share
    processor cores slow each other down: give `step_seconds` then.

    Args:
        metric: name of an epoch's metric, such as "val_accuracy".
        target: the value to reach.
        direction: "max" if larger is better, "min"; None infers it as KerasTuner does.
        bandwidth: None, bytes per second of each worker, or text such as "1gbit".
        step_seconds: seconds of a local step, instead of the measured ones.
        give_up: seconds after which a trial ends. One that never reaches the target counts
            as `give_up` times 1 to 2, the more the farther it was away: any finite
            number well above the times expected.

    Returns:
        A `keras_tuner.Objective`.

    Raises:
        ValueError: an argument out of range, or a metric of unknown direction.
    """
    return _TimeToTarget(metric, target, direction, bandwidth, step_seconds, give_up)


class _TimeToTarget(kt.Objective):
    def __init__(self, metric, target, direction, bandwidth, step_seconds, give_up):
        if direction is None and isinstance(metric, str):
            direction = kt.engine.metrics_tracking.infer_metric_direction(metric)
        if direction not in ("min", "max"):
            raise ValueError(
                "KerasTuner does not know whether this metric should be small or large. Received: "
                f'time_to_target({metric!r}, direction={direction!r}). Pass direction="min" or '
                'direction="max", or a metric such as "val_loss" or "val_accuracy".'
            )
        for name, value in {
            "target": target,
            "step_seconds": 1 if step_seconds is None else step_seconds,
            "give_up": give_up,
        }.items():
            finite = isinstance(value, numbers.Real) and math.isfinite(value)
            if not finite or (name != "target" and value <= 0):
                raise ValueError(
                    f"`{name}` must be a {'' if name == 'target' else 'positive '}finite number. "
                    f"Received: {name}={value!r}."
                )
        super().__init__(f"seconds_to_{metric}", "min")
        self.metric, self.target, self.maximize = metric, float(target), direction == "max"
        self.bandwidth = bandwidth
        if bandwidth is not None and not isinstance(bandwidth, numbers.Real):
            self.bandwidth = parse_bandwidth(bandwidth)
        self.step_seconds, self.give_up = step_seconds, float(give_up)

    @property
    def clock(self):
        return MEASURED if self.bandwidth is None else PREDICTED

    def reached(self, logs):
        value = logs[self.metric]
        return value >= self.target if self.maximize else value <= self.target

    def has_value(self, logs):
        return self.name in logs or (self.metric in logs and self.clock in logs)

    def get_value(self, logs):
        if self.name in logs:
            return logs[self.name]
        if self.reached(logs):
            return logs[self.clock]
        gap = abs(logs[self.metric] - self.target) / max(abs(self.target), 1e-9)
        return self.give_up * (1 + (gap / (1 + gap) if math.isfinite(gap) else 1.0))


# -- one trial -------------------------------------------------------------------------------


class _TrialTraining(BlockTraining):
    """BlockTraining that times itself, fails at divergence, and can leave an epoch early.

    An error on one worker must not leave the others waiting in a boundary that never
    comes. So with several workers it is kept, and this worker acts as if its data had
    ended: without steps it takes part in what the others communicate until the end of the
    epoch, where all learn of the error and fail together.
    """

    def __init__(self, jit_compile, workers, objective):
        super().__init__(jit_compile)
        self.workers, self.objective = workers, objective
        self.left, self.error = False, None
        self._steps, self._boundaries = _Durations(), _Durations()
        self._tested = None

    def leave(self, error=None):
        """Takes this worker out of the epoch, because of an error or to stop."""
        if self.workers.count == 1 and error is not None:
            raise error
        self.left, self.error = True, self.error or error

    def _train_function(self, iterator):
        if self._loop is None:  # on every worker: it makes variables, which communicates
            _keras.build(self.model, iterator.element_spec)
            self._prepare()
        assert self._loop is not None
        if not self.left:
            try:
                return super()._train_function(iterator)
            except StopIteration:
                raise
            except Exception as error:
                self.leave(error)
        if self._loop._finished is not iterator:
            with _eagerly(self.model.run_eagerly):
                self._loop._end_block(ended=True)
        raise StopIteration

    def _prepare(self):
        fresh = self._loop is None
        super()._prepare()
        if fresh:
            loop: Any = self._loop
            loop._local_steps = self._steps.of(loop._local_steps, lambda result: result[0])
            loop._boundary = self._boundaries.of(loop._boundary, lambda count: int(count) * 0 + 1)

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss) and not self.left:
            self.leave(
                kt.errors.FailedTrialError(
                    f"The trial diverged: the loss is {float(loss)} at batch {batch}. A smaller "
                    "sync_period, block_momentum or learning rate is more stable."
                )
            )

    def on_test_begin(self, logs=None):
        super().on_test_begin(logs)
        if self.workers.count > 1 and self.model.test_function is not self._tested:
            test_function = self.model.test_function

            def until_error(iterator):
                try:
                    if self.error is None:
                        return test_function(iterator)
                except StopIteration:
                    raise
                except Exception as error:
                    self.leave(error)
                raise StopIteration

            self._tested = self.model.test_function = until_error

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        optimizer = find(self.model.optimizer)
        steps, blocks = int(optimizer.iterations.numpy()), optimizer.blocks
        step, boundary = self._steps.median(), self._boundaries.median()
        logs[MEASURED] = steps * step + blocks * boundary
        goal = self.objective if isinstance(self.objective, _TimeToTarget) else None
        if goal is None:
            return
        if goal.bandwidth is not None:
            weights = [*self.model.trainable_variables, *_keras.statistics(self.model)]
            cost = CostModel(
                goal.step_seconds or step,
                sum(math.prod(w.shape) * max(tf.as_dtype(w.dtype).size, 4) for w in weights),
                goal.bandwidth,
            )
            replicas = self.model.distribute_strategy.num_replicas_in_sync
            logs[PREDICTED] = steps * cost.step_seconds + blocks * cost.boundary(replicas)
        if self.workers.chief and goal.has_value(logs):  # its clock counts
            done = goal.reached(logs) or logs[goal.clock] > goal.give_up
            self.model.stop_training = self.model.stop_training or done


class _Durations:
    """Durations of a function's calls, each per unit of its work."""

    def __init__(self):
        self._seconds = []

    def of(self, function, work):
        """The same function, timed. `work` waits for the result and says how much it was."""

        def timed(*args):
            started = time.perf_counter()
            result = function(*args)
            units = work(result)
            if units:
                self._seconds.append((time.perf_counter() - started) / units)
            return result

        return timed

    def median(self):
        """The first call traces, so it counts only where there is no other."""
        return statistics.median(self._seconds[1:] or self._seconds or [0.0])


# -- several workers -------------------------------------------------------------------------


class _Workers:
    """The workers of a strategy; what one sends, all receive. One worker without a strategy."""

    def __init__(self, strategy):
        self.strategy, self.count, self.chief = strategy, _process_count(strategy), True
        if self.count > 1:
            self.chief = strategy.extended.should_checkpoint
            self._all_gather = tf.function(
                lambda values: strategy.run(_all_gather, args=(values,)), autograph=False
            )
        self.agreed = None  # an error that all workers know of

    def exchange(self, message):
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
        rows = [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
        # A worker's replicas all say the same.
        return [json.loads(row) for row in rows[:: len(rows) // self.count]]

    def _gather(self, vector):
        """All replicas' vectors, which have one length, as the rows of a matrix."""
        values = self.strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(vector)
        )
        gathered = self._all_gather(values)
        return self.strategy.experimental_local_results(gathered)[0].numpy()

    def from_chief(self, action):
        """Does `action` on the chief alone; returns its result, or raises its error, on all."""
        result = error = None
        if self.chief:
            try:
                result = action()
            except Exception as raised:
                error = raised
        result, message = self.exchange([result, error and f"worker 0: {error}"])[0]
        if message:
            raise error or RuntimeError(message)
        return result

    def agree(self, error, stop=False):
        """Raises on all workers if one comes with an error; else whether one wants to stop."""
        if self.agreed is not None and error is self.agreed:
            raise error
        kinds = kt.errors.FatalError, kt.errors.FailedTrialError, Exception
        message = [None, stop]
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


def _all_gather(vector):
    context = tf.distribute.get_replica_context()
    row = tf.one_hot(
        context.replica_id_in_sync_group, context.num_replicas_in_sync, dtype=tf.int32
    )
    return context.all_reduce("SUM", row[:, None] * vector[None])


def _process_count(strategy):
    """How many worker processes a strategy has."""
    resolver = getattr(strategy, "cluster_resolver", None)
    spec = resolver.cluster_spec().as_dict() if resolver else {}
    return max(1, sum(len(spec.get(kind, ())) for kind in ("chief", "worker")))


class _InStep(keras.callbacks.Callback):
    """Runs a trial's callbacks on one of several workers: see _TrialTraining."""

    def __init__(self, callbacks, training, workers):
        super().__init__()
        self.callbacks, self.training, self.workers = callbacks, training, workers

    def _call(self, hook, *args, **kwargs):
        try:
            for callback in self.callbacks:
                if self.training.error is None:
                    getattr(callback, hook)(*args, **kwargs)
        except Exception as error:
            self.training.leave(error)

    def set_params(self, params):
        super().set_params(params)
        self._call("set_params", params)

    def set_model(self, model):
        super().set_model(model)
        self._call("set_model", model)

    def on_train_begin(self, logs=None):
        self._call("on_train_begin", logs)
        self.workers.agree(self.training.error)

    def on_train_batch_end(self, batch, logs=None):
        self._call("on_train_batch_end", batch, logs)
        if self.model.stop_training:  # this worker alone may want it
            self.model.stop_training = False
            self.training.leave()

    def on_epoch_end(self, epoch, logs=None):
        self._call("on_epoch_end", epoch, logs)
        wanted = self.training.left or bool(self.model.stop_training)
        self.model.stop_training = self.workers.agree(self.training.error, wanted)


def _forward(hook):
    return lambda self, *args, **kwargs: self._call(hook, *args, **kwargs)


for _hook in dir(keras.callbacks.Callback):
    if _hook.startswith("on_") and _hook not in vars(_InStep):
        setattr(_InStep, _hook, _forward(_hook))


def distribute(tuner_class):
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
    build meets no worker halfway. Messages are JSON through one `gather` at the
    beginning and end of a trial and at the end of an epoch (some tenths of a second).

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

    def __init__(self, *args, **kwargs):
        self.workers = _Workers(kwargs.get("distribution_strategy"))
        launched = (
            tf.distribute.cluster_resolver.TFConfigClusterResolver().cluster_spec().as_dict()
        )
        if self.workers.count == 1 and len(launched.get("worker", ())) > 1:
            raise ValueError(
                f"TF_CONFIG names {len(launched['worker'])} workers and the tuner has no strategy "
                "for them. Received: distribution_strategy="
                f"{kwargs.get('distribution_strategy')!r}. Pass "
                "distribution_strategy=tfbm.MultiWorkerBlockStrategy()."
            )
        if not self.workers.chief:
            self._scratch = tempfile.TemporaryDirectory(prefix="tfbm-tuner-")
            kwargs.update(directory=self._scratch.name, overwrite=False)
        super().__init__(*args, **kwargs)
        if not isinstance(self.hypermodel, BlockMomentumHyperModel):
            raise TypeError(
                "A distributed tuner needs a BlockMomentumHyperModel. Received: "
                f"{self.hypermodel!r}. Wrap it: tfbm.tuner.BlockMomentumHyperModel(build)."
            )
        self.hypermodel.workers = self.workers
        _share(self.oracle, self.workers)

    def on_search_begin(self):
        super().on_search_begin()
        self.save()  # a search cut short in its first trial can be resumed too

    def search(self, *args, **kwargs):
        if not self.workers.chief:
            kwargs["verbose"] = 0
        super().search(*args, **kwargs)

    def run_trial(self, trial, *args, **kwargs):
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

    def load_model(self, trial):
        self._fetch(trial.trial_id)
        return super().load_model(trial)

    def _fetch(self, trial_id):
        """Copies a past trial's files from worker 0 to the others' own directories."""
        if trial_id is None or self.workers.count == 1:
            return
        directory = self.get_trial_dir(trial_id)

        def read():
            names = [n for n in tf.io.gfile.listdir(directory) if n.endswith((".h5", ".json"))]
            return {name: _read_base64(f"{directory}/{name}") for name in names}

        for name, data in self.workers.from_chief(read).items():
            if not self.workers.chief:
                with tf.io.gfile.GFile(f"{directory}/{name}", "wb") as file:
                    file.write(base64.b64decode(data))


def _read_base64(path):
    with tf.io.gfile.GFile(path, "rb") as file:
        return base64.b64encode(file.read()).decode()


class _SharedOracle(kt.Oracle):
    """What distribute() puts in front of an oracle's class: worker 0's decides for all."""

    def create_trial(self, tuner_id):
        return self._mirror(lambda: super(_SharedOracle, self).create_trial(tuner_id))

    def update_trial(self, trial_id, metrics, step=0):
        return self._mirror(
            lambda: super(_SharedOracle, self).update_trial(trial_id, metrics, step=step)
        )

    def end_trial(self, trial):
        def end():
            super(_SharedOracle, self).end_trial(trial)
            return self.trials[trial.trial_id]

        self._mirror(end)

    def save(self):
        if self._workers.chief:
            super().save()

    def reload(self):
        if self._workers.chief:
            super().reload()

    def _mirror(self, action):
        """Worker 0's trial of the same state, on every worker."""
        trial = None

        def state():
            nonlocal trial
            trial = action()
            return trial.get_state()

        mirrored = self._workers.from_chief(state)
        if not self._workers.chief:
            trial = kt.engine.trial.Trial.from_state(mirrored)
            if trial.status not in ("STOPPED", "IDLE"):  # these are no trials
                self.trials[trial.trial_id] = trial
        return trial


def _share(oracle, workers):
    cls = type(oracle)
    oracle.__class__ = type(cls.__name__, (_SharedOracle, cls), {})
    oracle._workers = workers
    if isinstance(oracle, kt.oracles.GridSearchOracle) and oracle.trials:
        # KerasTuner does not save where its grid search stands, and then fails with a
        # KeyError or stops. Trials run in the grid's order, so that is easily restored.
        for trial_id in oracle.start_order:
            oracle._ordered_ids.insert(trial_id)
        oracle._populate_next = list(oracle.end_order)
    states = workers.from_chief(lambda: [t.get_state() for t in oracle.trials.values()])
    if not workers.chief:
        trials = [kt.engine.trial.Trial.from_state(state) for state in states]
        oracle.trials = {trial.trial_id: trial for trial in trials}
