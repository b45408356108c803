"""Block training under Ray Train, which starts the workers and sets their TF_CONFIG.

    pip install "ray[train]"
    python examples/ray_trainer.py

A run that fails is started again by Ray (`max_failures`), and `BlockBackup` goes on from the
last complete backup; its directory has to be one that all nodes see.
"""

import argparse
import pathlib

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer


def train(settings):
    """Runs in each of Ray's workers; TensorFlow is imported here, after TF_CONFIG is set."""
    import keras
    import numpy as np

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[512, 8]).astype("float32")
    y = (x.sum(axis=1) > 0).astype("float32")
    with strategy.scope():
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(1)])
        model.compile(
            tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=4),
            keras.losses.BinaryCrossentropy(from_logits=True),
        )
    backup = tfbm.BlockBackup(settings["backup"])
    model.fit(x, y, batch_size=32, epochs=3, verbose=0, callbacks=[tfbm.BlockTraining(), backup])
    loss = model.evaluate(x, y, batch_size=32, verbose=0)  # on every worker
    index, count = strategy.cluster_resolver.task_id, strategy.num_replicas_in_sync
    print(f"worker {index} of {count}: loss {loss:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/ray"))
    options = parser.parse_args()
    folder = options.folder.absolute()
    trainer = TensorflowTrainer(
        train,
        train_loop_config={"backup": str(folder / "backup")},
        scaling_config=ScalingConfig(num_workers=options.workers),
        run_config=RunConfig(
            storage_path=str(folder), failure_config=FailureConfig(max_failures=3)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
