"""Tuning `sync_period` and `block_momentum` with KerasTuner, in one process or on all workers.

    Tuner = tfbm.tuner.distribute(keras_tuner.BayesianOptimization)
    tuner = Tuner(tfbm.tuner.BlockMomentumHyperModel(build), objective="val_loss",
                  distribution_strategy=strategy, directory="runs")
    tuner.search(x, y, validation_data=(x_val, y_val), epochs=10)

or, without a script of one's own, `python -m tf_blockmomentum.tuner script.py:build --workers 2`
(see `--help`). In one process `distribute` may be left out.
"""

import argparse
import functools
import importlib
import math
import numbers
import os
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum import launch
from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.callback import BlockTraining
from tf_blockmomentum.landing import check_overlap
from tf_blockmomentum.optimizer import BlockMomentum, find
from tf_blockmomentum.strategy import MultiDeviceBlockStrategy, MultiWorkerBlockStrategy
from tf_blockmomentum.tuner_report import as_text, heat_map, published_rules, results_table
from tf_blockmomentum.tuner_trial import StopAtTarget, TimeToTarget, TrialTraining, time_to_target
from tf_blockmomentum.tuner_workers import InStep, Workers, distribute, kt, process_count

__all__ = [
    "BlockMomentumHyperModel",
    "distribute",
    "heat_map",
    "results_table",
    "time_to_target",
]


K, BETA, INNER = "sync_period", "block_momentum", "inner_learning_rate"  # hyperparameters


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
        hypermodel,
        sync_period=(1, 64),
        block_momentum=(0.0, 0.95),
        inner_learning_rate=None,
        overlap=False,
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
        between = (round(1 - float(f"{0.5**octave:.3g}"), 9) for octave in octaves[1:-1])
        self._momenta = [float(lo), *between, *[float(hi)] * (hi > lo)]
        self._inner = inner_learning_rate and _bounds(
            INNER, inner_learning_rate, numbers.Real, "numbers above 0", lambda lr: lr > 0
        )
        self._overlap = check_overlap(overlap)
        self.workers = Workers(None)  # distribute() sets others
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
                    overlap=self._overlap,
                ),
            )
        _build_optimizer_with(model)
        return model

    def fit(self, hp, model, *args, callbacks=(), **kwargs):
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


# -- the command -----------------------------------------------------------------------------

TUNERS = {
    "bayesian": kt.BayesianOptimization,
    "random": kt.RandomSearch,
    "hyperband": kt.Hyperband,
    "grid": kt.GridSearch,
}


def main(arguments=None):
    """Runs the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parse(arguments)
    if options.workers > 1 and not os.environ.get("TF_CONFIG"):
        restarts = ["--max-restarts", str(options.max_restarts)] if options.max_restarts else []
        return launch.main(["--workers", str(options.workers), *restarts, __file__, *arguments])
    strategy = None
    if os.environ.get("TF_CONFIG"):
        strategy = MultiWorkerBlockStrategy()
    elif options.replicas > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * options.replicas,
        )
        strategy = MultiDeviceBlockStrategy([f"CPU:{i}" for i in range(options.replicas)])
    script = _load(options.script)
    fit = {"epochs": 10, **getattr(script, options.data)()}
    fit["epochs"] = options.epochs or fit["epochs"]
    tuner = _tuner(options, getattr(script, options.build), strategy, fit["epochs"])
    tuner.search(**fit, verbose=0)
    if tuner.workers.chief:
        replicas = strategy.num_replicas_in_sync if strategy else 1
        print(f"\n{results_table(tuner)}\n")
        best = tuner.get_best_hyperparameters()[0].values
        print("chosen: " + ", ".join(f"{name}={value}" for name, value in best.items()))
        for rule, beta in published_rules(replicas).items():
            print(f"for comparison, {rule} at P={replicas}: block_momentum={beta:.3g}")
        path = options.heat_map or os.path.join(tuner.project_dir, "heat_map.png")
        heat_map(tuner, path, replicas)
        print(f"heat map: {path}")
    return 0


def _tuner(options, build, strategy, epochs):
    """The tuner that the command's options describe; it tells of every trial."""

    base: Any = TUNERS[options.tuner]

    class Telling(base):
        def on_trial_end(self, trial):
            super().on_trial_end(trial)
            if not self.workers.chief:
                return
            trials = self.oracle.trials
            values = {n: v for n, v in trial.hyperparameters.values.items() if "/" not in n}
            best = self.oracle.get_best_trials(1)[0]
            print(
                f"trial {len(trials)}: "
                + ", ".join(f"{name}={value:.4g}" for name, value in values.items())
                + f"; {self.oracle.objective.name} {as_text(trials[trial.trial_id].score)}, "
                f"best {as_text(best.score)} {trials[trial.trial_id].status}",
                flush=True,
            )

    if options.target is None:
        objective = options.metric
    else:
        objective = time_to_target(
            options.metric,
            options.target,
            bandwidth=options.bandwidth,
            step_seconds=options.step_seconds,
            give_up=options.give_up,
        )
    if options.tuner == "hyperband":
        budget = {"max_epochs": epochs}
    else:
        budget = {"max_trials": options.trials}
    return distribute(Telling)(
        BlockMomentumHyperModel(
            build, options.sync_period, options.block_momentum, options.inner_learning_rate
        ),
        objective=objective,
        distribution_strategy=strategy,
        directory=options.directory,
        project_name=f"{options.tuner}_{options.build}",
        overwrite=options.overwrite,
        seed=options.seed,
        max_consecutive_failed_trials=options.trials,  # divergence is part of the picture
        **budget,
    )


def _load(script):
    """Imports a script by its path, as Python finds modules beside the script it runs."""
    path = os.path.abspath(script if script.endswith(".py") else script + ".py")
    sys.path[0] = os.path.dirname(path)
    return importlib.import_module(os.path.basename(path)[:-3])


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m tf_blockmomentum.tuner",
        description="Searches sync_period (K) and block_momentum (beta) for a model.",
        epilog="The script defines build(hp), which returns a compiled model, and data(), which "
        "returns fit's arguments as a dict. The same command run again resumes the search.",
    )
    parser.add_argument("script", metavar="SCRIPT:BUILD", help="such as train.py:build")
    parser.add_argument("--data", default="data", help="the script's function for the data")
    parser.add_argument("--workers", type=int, default=1, help="worker processes to start")
    parser.add_argument("--max-restarts", type=int, default=0, help="as of tfbm-launch")
    parser.add_argument("--replicas", type=int, default=1, help="replicas in one process (CPU)")
    parser.add_argument("--tuner", choices=TUNERS, default="bayesian")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, help="of a trial at most (the data's, else 10)")
    parser.add_argument("--metric", default="val_loss", help="what to optimize (val_loss)")
    parser.add_argument("--target", type=float, help="optimize the seconds until metric is there")
    parser.add_argument("--bandwidth", help="predict these seconds for a link such as 1gbit")
    parser.add_argument("--step-seconds", type=float, help="use this, not the measured step")
    parser.add_argument("--give-up", type=float, default=3600.0, help="seconds (3600)")
    pair: dict[str, Any] = {"nargs": 2, "metavar": ("LO", "HI")}
    parser.add_argument("--sync-period", type=int, default=(1, 64), **pair)
    parser.add_argument("--block-momentum", type=float, default=(0.0, 0.95), **pair)
    parser.add_argument("--inner-learning-rate", type=float, **pair)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default="runs/tuner", help="the search's (runs/tuner)")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, do not resume")
    parser.add_argument("--heat-map", metavar="PNG", help="(in the search's directory)")
    options = parser.parse_args(arguments)
    options.script, _, options.build = options.script.rpartition(":")
    path = options.script if options.script.endswith(".py") else options.script + ".py"
    if not os.path.isfile(path):
        parser.error(
            f"there is no script to search for. Received: {options.script!r}, and {path!r} is not "
            "a file. Write SCRIPT:BUILD, as in train.py:build."
        )
    if options.bandwidth and options.target is None:
        parser.error(
            "--bandwidth predicts seconds to a target. Add --target, as in "
            "--metric val_accuracy --target 0.97."
        )
    return options


if __name__ == "__main__":
    # Not this copy, which goes by another name than the one the script imports.
    sys.exit(importlib.import_module("tf_blockmomentum.tuner").main())
