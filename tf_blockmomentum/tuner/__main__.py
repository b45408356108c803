"""`python -m tf_blockmomentum.tuner SCRIPT:BUILD`: a search without a script of one's own."""

import argparse
import importlib
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
import keras_tuner as kt
import tensorflow as tf

from tf_blockmomentum import launch
from tf_blockmomentum.published import published_rules
from tf_blockmomentum.strategy import MultiDeviceBlockStrategy, MultiWorkerBlockStrategy
from tf_blockmomentum.tuner.report import as_text, heat_map, results_table
from tf_blockmomentum.tuner.search import BlockMomentumHyperModel
from tf_blockmomentum.tuner.trial import time_to_target
from tf_blockmomentum.tuner.workers import distribute

TUNERS = {
    "bayesian": kt.BayesianOptimization,
    "random": kt.RandomSearch,
    "hyperband": kt.Hyperband,
    "grid": kt.GridSearch,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parse(arguments)
    if options.workers > 1 and not os.environ.get("TF_CONFIG"):
        this = ["-m", "tf_blockmomentum.tuner"]
        restarts = ["--max-restarts", str(options.max_restarts)] if options.max_restarts else []
        return launch.main(["--workers", str(options.workers), *restarts, *this, *arguments])
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


def _tuner(
    options: argparse.Namespace,
    build: Callable[[Any], keras.Model],
    strategy: tf.distribute.Strategy | None,
    epochs: int,
) -> Any:
    """The tuner that the command's options describe; it tells of every trial."""

    base: Any = TUNERS[options.tuner]

    class Telling(base):
        def on_trial_end(self, trial: Any) -> None:
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


def _load(script: str) -> types.ModuleType:
    """Imports a script by its path, as Python finds modules beside the script it runs."""
    path = os.path.abspath(script if script.endswith(".py") else script + ".py")
    sys.path[0] = os.path.dirname(path)
    return importlib.import_module(os.path.basename(path)[:-3])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
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
    sys.exit(main())
