"""Kills workers of a training job at random, and compares its end with an undisturbed one.

    python benchmarks/chaos.py --kills 20

trains a small CNN on scikit-learn's digits over 2 workers, first undisturbed, then under
`tfbm-launch --max-restarts` while this process sends SIGKILL to one or both workers: most
often a few blocks after the last start, sometimes while they start. `BlockBackup` writes every
4 blocks. Prints kills, restarts, blocks computed twice, seconds lost, and whether all state of
both replicas is the same to the bit in the end.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

WORKERS, EPOCHS, BATCH = 2, 48, 64


def train(out):
    """What every worker runs."""
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape([-1, 8, 8, 1]).astype("float32") / 16
    data = tf.data.Dataset.from_tensor_slices((images[:1408], labels[:1408]))
    data = data.shuffle(1408, seed=1).batch(BATCH)
    with strategy.scope():
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input([8, 8, 1]),
                layers.Conv2D(16, 3, activation="relu"),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dropout(0.3),
                layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = tfbm.BlockMomentum(keras.optimizers.Adam(1e-3), sync_period=4)
        model.compile(optimizer, loss, metrics=["accuracy"])
    index = strategy.cluster_resolver.task_id

    class Trace(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if index == 0:
                with open(out / "blocks", "a") as file:
                    file.write(f"{optimizer.blocks}\n")

    callbacks = [tfbm.BlockTraining(), Trace(), tfbm.BlockBackup(out / "backup", every=4)]
    history = model.fit(data, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    digest = hashlib.sha256()
    for variable in [*model.variables, *model.optimizer.variables]:
        for part in strategy.experimental_local_results(variable.value):
            digest.update(part.numpy().tobytes())
    digest.update(json.dumps([history.history[k][-1] for k in ("loss", "accuracy")]).encode())
    (out / f"end-{index}").write_text(digest.hexdigest())


def blocks(out):
    """The numbers of the blocks that worker 0 has finished, in order, doubles too."""
    with contextlib.suppress(FileNotFoundError):
        steps = [int(line) for line in (out / "blocks").read_text().split()]
        return [b for a, b in itertools.pairwise(steps) if b == a + 1]
    return []


def children(pid):
    with contextlib.suppress(FileNotFoundError):
        text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in text.split()]
    return []


def run(out, kills, rng):
    """Returns (seconds, kills done, what the launcher printed)."""
    command = [sys.executable, "-m", "tf_blockmomentum.launch", "--workers", str(WORKERS)]
    command += ["--max-restarts", str(2 * kills), "--hang-timeout", "120", __file__, "--out", out]
    began, done = time.monotonic(), 0
    with open(out / "printed", "w") as printed:
        job = subprocess.Popen([*map(str, command)], stdout=printed, stderr=printed)
    try:
        while done < kills and job.poll() is None:
            start, workers = len(blocks(out)), children(job.pid)
            if rng.random() < 0.1:  # while they import, join or compile
                time.sleep(rng.uniform(0, 5))
            else:
                ahead = rng.randint(1, 12)
                while len(blocks(out)) < start + ahead and job.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.02))
            victims = rng.choice([workers[:1], workers[-1:], workers])
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    done += 1
            while job.poll() is None and (
                not children(job.pid) or set(children(job.pid)) & set(workers)
            ):
                time.sleep(0.01)  # until the launcher has started others
        status = job.wait(timeout=600)
    finally:
        job.terminate()
        job.wait()
    text = (out / "printed").read_text()
    if status:
        raise SystemExit(f"the job failed with exit status {status}:\n{text[-3000:]}")
    return time.monotonic() - began, done, text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        train(options.out)
        return
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        ends, seconds = [], []
        for name, kills in (("undisturbed", 0), ("killed", options.kills)):
            out = pathlib.Path(folder, name)
            out.mkdir()
            took, done, printed = run(out, kills, rng)
            seconds.append(took)
            ends.append([(out / f"end-{i}").read_text() for i in range(WORKERS)])
        finished = blocks(out)
    print(f"kills: {done}")
    print(f"restarts: {printed.count('tfbm-launch: restart')}")
    print(f"blocks recomputed: {len(finished) - len(set(finished))} of {len(set(finished))}")
    print(f"seconds lost: {seconds[1] - seconds[0]:.0f} (undisturbed: {seconds[0]:.0f})")
    print(f"bit-identical: {'yes' if ends[0] == ends[1] else 'no'}")
    if ends[0] != ends[1] or done < options.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
