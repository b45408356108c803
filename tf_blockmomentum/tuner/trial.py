"""One trial of a search: its objective, its clock, and how it ends."""

import functools
import math
import numbers
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import keras
import keras_tuner as kt
import tensorflow as tf

from tf_blockmomentum.callback import BlockTraining
from tf_blockmomentum.cost import COMPRESSED_BYTES, CostModel, parse_bandwidth
from tf_blockmomentum.steps import eagerly
from tf_blockmomentum.tuner.workers import Workers

MEASURED, PREDICTED = "measured_seconds", "predicted_seconds"  # metrics of an epoch


def time_to_target(
    metric: str,
    target: float,
    direction: str | None = None,
    bandwidth: float | str | None = None,
    step_seconds: float | None = None,
    give_up: float = 3600.0,
) -> kt.Objective:
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
    return TimeToTarget(metric, target, direction, bandwidth, step_seconds, give_up)


class TimeToTarget(kt.Objective):
    def __init__(
        self,
        metric: str,
        target: float,
        direction: str | None,
        bandwidth: float | str | None,
        step_seconds: float | None,
        give_up: float,
    ) -> None:
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
        self.bandwidth: Any = bandwidth
        if bandwidth is not None and not isinstance(bandwidth, numbers.Real):
            self.bandwidth = parse_bandwidth(cast(str, bandwidth))
        self.step_seconds, self.give_up = step_seconds, float(give_up)

    @property
    def clock(self) -> str:
        return MEASURED if self.bandwidth is None else PREDICTED

    def reached(self, logs: dict[str, float]) -> bool:
        value = logs[self.metric]
        return value >= self.target if self.maximize else value <= self.target

    def has_value(self, logs: dict[str, float]) -> bool:
        return self.name in logs or (self.metric in logs and self.clock in logs)

    def get_value(self, logs: dict[str, float]) -> float:
        if self.name in logs:
            return logs[self.name]
        if self.reached(logs):
            return logs[self.clock]
        gap = abs(logs[self.metric] - self.target) / max(abs(self.target), 1e-9)
        return self.give_up * (1 + (gap / (1 + gap) if math.isfinite(gap) else 1.0))


# -- one trial -------------------------------------------------------------------------------


_DIVERGED = (
    "The trial diverged. {} A smaller sync_period, block_momentum or learning rate is more stable."
)


class TrialTraining(BlockTraining):
    """BlockTraining that times itself, fails at divergence, and can leave an epoch early.

    An error on one worker must not leave the others waiting in a boundary that never
    comes. So with several workers it is kept, and this worker acts as if its data had
    ended: without steps it takes part in what the others communicate until the end of the
    epoch, where all learn of the error and fail together.
    """

    def __init__(self, jit_compile: bool | str, workers: Workers, objective: Any) -> None:
        super().__init__(jit_compile)
        self.workers, self.objective = workers, objective
        self.left = False
        self.error: Exception | None = None
        self._steps, self._boundaries, self._landings = (_Durations() for _ in range(3))
        self._tested: Any = None

    def leave(self, error: Exception | None = None) -> None:
        """Takes this worker out of the epoch, because of an error or to stop."""
        if isinstance(error, FloatingPointError):  # of a boundary, and raised on all workers
            error = kt.errors.FailedTrialError(_DIVERGED.format(error))
        if self.workers.count == 1 and error is not None:
            raise error
        self.left, self.error = True, self.error or error

    def _train_function(self, iterator: Any) -> Any:
        # On every worker: it makes variables, which communicates.
        loop = self.ready_loop(iterator.element_spec)
        if not self.left:
            try:
                return super()._train_function(iterator)
            except StopIteration:
                raise
            except Exception as error:
                self.leave(error)
        while not (loop.data.has_finished(iterator) or loop.ending.all_ended):
            with eagerly(self.model.run_eagerly):
                try:
                    loop._end_block(ended=True)
                except FloatingPointError as error:
                    self.leave(error)
        raise StopIteration

    def ready_loop(self, element_spec: Any) -> Any:
        fresh = self._loop is None
        loop: Any = super().ready_loop(element_spec)
        if fresh:
            loop.take_steps = self._steps.of(loop.take_steps, lambda result: result[0])
            for name, durations in (
                ("meet", self._boundaries),  # without overlap
                ("send_block", self._boundaries),  # with it
                ("land_within", self._landings),
            ):
                timed = durations.of(getattr(loop.ending, name), lambda _: 1)
                setattr(loop.ending, name, timed)
        return loop

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss) and not self.left:
            self.leave(
                kt.errors.FailedTrialError(
                    _DIVERGED.format(f"The loss is {float(loss)} at batch {batch}.")
                )
            )

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_test_begin(logs)
        if self.workers.count > 1 and self.model.test_function is not self._tested:
            test_function = self.model.test_function

            @functools.wraps(test_function)
            def until_error(iterator: Any) -> Any:
                try:
                    if self.error is None:
                        return test_function(iterator)
                except StopIteration:
                    raise
                except Exception as error:
                    self.leave(error)
                raise StopIteration

            self._tested = self.model.test_function = until_error

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        assert logs is not None  # Keras always gives them
        optimizer = self.optimizer
        steps, blocks = int(optimizer.iterations.numpy()), optimizer.blocks
        step = self._steps.median()
        boundary = self._boundaries.median() + self._landings.median()
        logs[MEASURED] = steps * step + blocks * boundary
        goal = self.objective
        if isinstance(goal, TimeToTarget) and goal.bandwidth is not None:
            strategy = self.model.distribute_strategy
            replica = self.ready_loop(None).ending.replica
            compression = getattr(strategy, "compression", None)
            cost = CostModel(
                goal.step_seconds or step,
                _bytes_on_the_wire(replica.trained, compression)
                + _bytes_on_the_wire(replica.statistics),
                goal.bandwidth,
            )
            replicas = strategy.num_replicas_in_sync
            period = steps / max(blocks, 1)
            logs[PREDICTED] = blocks * cost.block(period, replicas, optimizer.overlap)


class StopAtTarget(keras.callbacks.Callback):
    """Stops at the target, or when it takes too long. Comes last, when all metrics are there."""

    def __init__(self, goal: TimeToTarget) -> None:
        super().__init__()
        self.goal = goal

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        goal = self.goal
        assert logs is not None  # Keras always gives them
        if goal.has_value(logs) and (goal.reached(logs) or logs[goal.clock] > goal.give_up):
            self.model.stop_training = True


def _bytes_on_the_wire(variables: Sequence[Any], compression: str | None = None) -> float:
    def each(v: Any) -> float:
        if compression:
            return COMPRESSED_BYTES[compression]
        return tf.as_dtype("float32" if v.dtype == "bfloat16" else v.dtype).size  # see `pack`

    return sum(math.prod(v.shape) * each(v) for v in variables)


class _Durations:
    """Durations of a function's calls, each per unit of its work."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def of(self, function: Callable[..., Any], work: Callable[[Any], float]) -> Callable[..., Any]:
        """The same function, timed. `work` waits for the result and says how much it was."""

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            units = work(result)
            if units:
                self._seconds.append((time.perf_counter() - started) / units)
            return result

        return timed

    def median(self) -> float:
        """The first call traces, so it counts only where there is no other."""
        return statistics.median(self._seconds[1:] or self._seconds or [0.0])
