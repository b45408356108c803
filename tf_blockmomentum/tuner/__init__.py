"""Tuning `sync_period` and `block_momentum` with KerasTuner, in one process or on all workers.

    Tuner = tfbm.tuner.distribute(keras_tuner.BayesianOptimization)
    tuner = Tuner(tfbm.tuner.BlockMomentumHyperModel(build), objective="val_loss",
                  distribution_strategy=strategy, directory="runs")
    tuner.search(x, y, validation_data=(x_val, y_val), epochs=10)

or, without a script of one's own, `python -m tf_blockmomentum.tuner script.py:build --workers 2`
(see `--help`). In one process `distribute` may be left out.
"""

try:
    import keras_tuner as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"tfbm.tuner needs KerasTuner, which cannot be imported here ({error}). "
        "Run: pip install tf-blockmomentum[tuner]"
    ) from error

from tf_blockmomentum.tuner.report import heat_map, results_table
from tf_blockmomentum.tuner.search import BlockMomentumHyperModel
from tf_blockmomentum.tuner.trial import time_to_target
from tf_blockmomentum.tuner.workers import distribute

__all__ = [
    "BlockMomentumHyperModel",
    "distribute",
    "heat_map",
    "results_table",
    "time_to_target",
]
