"""The search space: K, beta and the inner learning rate around a hypermodel of the user's."""

import functools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import keras
import keras_tuner as kt
import numpy as np

from tf_blockmomentum._private import models as _models
from tf_blockmomentum.callback import BlockTraining
from tf_blockmomentum.landing import check_overlap
from tf_blockmomentum.optimizer import BlockMomentum, find
from tf_blockmomentum.tuner.trial import StopAtTarget, TimeToTarget, TrialTraining
from tf_blockmomentum.tuner.workers import InStep, Workers, process_count

Bounds = tuple[Any, Any] | list[Any]  # a pair: lowest and highest

K, BETA, INNER = "sync_period", "block_momentum", "inner_learning_rate"  # hyperparameters


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
        overlap: as in `BlockMomentum`, for all trials.

    Raises:
        ValueError: bounds out of range or the wrong way round; when a model is built, one
            that is not compiled or is compiled with a BlockMomentum already.
        TypeError: no hypermodel.

    Not for: choosing K for speed alone, which needs no search (`CostModel` says what a K
    costs); models so large that a trial costs more than the tuned values can save.

    Example:

    >>> import keras_tuner
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
        hypermodel: kt.HyperModel | Callable[[kt.HyperParameters], keras.Model],
        sync_period: Bounds = (1, 64),
        block_momentum: Bounds = (0.0, 0.95),
        inner_learning_rate: Bounds | None = None,
        overlap: float | bool = False,
    ) -> None:
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
        between = (round(1 - float(f"{0.5**octave:.3g}"), 9) for octave in octaves[1:-1])
        self._momenta = [float(lo), *between, *[float(hi)] * (hi > lo)]
        self._inner = inner_learning_rate and _bounds(
            INNER, inner_learning_rate, numbers.Real, "numbers above 0", lambda lr: lr > 0
        )
        self._overlap = check_overlap(overlap)
        self.workers = Workers(None)  # distribute() sets others
        super().__init__(getattr(hypermodel, "name", None))

    def declare_hyperparameters(self, hp: kt.HyperParameters) -> None:
        """The wrapped hypermodel's."""
        if isinstance(self.hypermodel, kt.HyperModel):
            self.hypermodel.declare_hyperparameters(hp)

    def build(self, hp: kt.HyperParameters) -> keras.Model:
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
            _models.recompile(
                model,
                BlockMomentum(
                    inner,
                    sync_period=hp.Choice(K, self._periods),
                    block_momentum=hp.Choice(BETA, self._momenta),
                    overlap=self._overlap,
                ),
            )
        _build_optimizer_with(model)
        return model

    def fit(
        self,
        hp: kt.HyperParameters,
        model: keras.Model,
        *args: Any,
        callbacks: Iterable[Any] = (),
        **kwargs: Any,
    ) -> Any:
        """The wrapped hypermodel's fit (else the model's), in blocks.

        A `BlockTraining` among the callbacks is taken as a wish for its `jit_compile`.
        """
        if process_count(model.distribute_strategy) > self.workers.count:
            raise kt.errors.FatalValueError(
                "KerasTuner alone would let every worker search on its own. Received: a model "
                "under a strategy of several workers. Make the tuner with "
                "tfbm.tuner.distribute(keras_tuner.RandomSearch)(...)."
            )
        objective = next((c.objective for c in callbacks if hasattr(c, "objective")), None)
        given = [c for c in callbacks if isinstance(c, BlockTraining)]
        others = [c for c in callbacks if c not in given]
        training = TrialTraining(
            given[0].jit_compile if given else "auto", self.workers, objective
        )
        if isinstance(objective, TimeToTarget) and self.workers.chief:  # its clock counts
            others.append(StopAtTarget(objective))
        if self.workers.count > 1:
            others = [InStep(others, training, self.workers)]
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


def _bounds(
    name: str, bounds: Any, kind: type[Any], expected: str, valid: Callable[[Any], bool]
) -> tuple[Any, Any]:
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


def _build_optimizer_with(model: keras.Model) -> None:
    """Builds the optimizer as soon as the model is built: before weights are loaded."""

    def build_optimizer() -> None:
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)

    if model.built:
        build_optimizer()
        return
    build_from_config = model.build_from_config  # what KerasTuner calls before it loads

    def build_both(config: Any) -> None:
        build_from_config(config)
        build_optimizer()

    model.build_from_config = build_both
