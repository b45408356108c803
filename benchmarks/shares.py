"""What threads each worker of one machine should start, measured.

    python benchmarks/shares.py --workers 2 4 --rounds 3

trains six small programs under `tfbm-launch` with several settings of TensorFlow's threads, one
round after the other, and prints medians over the rounds, as multiples of those of workers that
are told nothing. About a minute a setting and round on 2 cores; nothing
else should run. `--add FILE` keeps every run in a file, so that rounds can be had one by one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("MLP", "CNN", "transformer", "preprocessing", "slow reads", "overlap")


def settings(each):
    """Variables by name; `each` is a worker's share of the cores."""
    intra, inter, openmp = "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"
    return {
        "none": {},
        "intra": {intra: each},
        "intra, inter=share": {intra: each, inter: each, openmp: each},
        "intra, inter=2": {intra: each, inter: max(2, each), openmp: each},
    }


def train(programs):
    """What every worker runs; worker 0 prints a line of JSON a program."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    keras.utils.set_random_seed(0)
    layers = keras.layers
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def of(x, classes, batch):
        y = np.arange(len(x)) % classes
        data = tf.data.Dataset.from_tensor_slices((x, y)).repeat()
        return data.batch(batch, drop_remainder=True).prefetch(2)

    def random(*shape):
        return np.random.default_rng(0).normal(size=shape).astype("float32")

    def mlp(width=512):
        return keras.Sequential(
            [
                keras.Input([784]),
                layers.Dense(width, activation="relu"),
                layers.Dense(width, activation="relu"),
                layers.Dense(10),
            ]
        )

    def cnn(size):
        return keras.Sequential(
            [
                keras.Input([size, size, 3]),
                layers.Conv2D(16, 3, activation="relu"),
                layers.BatchNormalization(),
                layers.MaxPooling2D(),
                layers.Conv2D(32, 3, activation="relu"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(10),
            ]
        )

    def transformer():
        sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
        import text_transformer

        return text_transformer.transformer(64, 2, 64)

    def prepared():
        """Pictures that are cropped, turned and coloured anew each time: most of a step."""
        pictures = np.random.default_rng(0).integers(0, 255, [256, 64, 64, 3], "uint8")
        seeds = tf.data.Dataset.random(seed=1, rerandomize_each_iteration=True).batch(2)

        def prepare(picture, seed):
            seed = tf.cast(seed, tf.int32)
            picture = tf.image.stateless_random_crop(picture, [48, 48, 3], seed)
            picture = tf.image.resize(tf.cast(picture, tf.float32) / 255, [32, 32])
            picture = tf.image.stateless_random_hue(picture, 0.1, seed)
            return tf.image.stateless_random_contrast(picture, 0.5, 1.5, seed), seed[0] % 10

        data = tf.data.Dataset.from_tensor_slices(pictures).repeat()
        data = tf.data.Dataset.zip(data, seeds).map(prepare, tf.data.AUTOTUNE)
        return data.map(lambda x, y: (x, abs(y))).batch(32).prefetch(tf.data.AUTOTUNE)

    def read():
        """Each example takes 5 ms to arrive, as from a storage that is far away."""

        def wait(i):
            time.sleep(0.005)
            return i

        def example(i):
            i = tf.ensure_shape(tf.numpy_function(wait, [i], tf.int64), [])
            return tf.fill([784], tf.cast(i % 7, tf.float32)), i % 10

        data = tf.data.Dataset.range(10**9).map(example, num_parallel_calls=16)
        return data.batch(32).prefetch(tf.data.AUTOTUNE)

    text = np.random.default_rng(0).integers(0, 256, [512, 64])
    made = {  # model, data, batch, K, steps an epoch, overlap
        "MLP": (mlp, of(random(2048, 784), 10, 64), 8, 160, False),
        "CNN": (lambda: cnn(32), of(random(512, 32, 32, 3), 10, 32), 8, 64, False),
        "transformer": (
            transformer,
            tf.data.Dataset.from_tensors((text[:16], text[16:32])).repeat(),
            5,
            30,
            False,
        ),
        "preprocessing": (lambda: cnn(32), prepared(), 8, 32, False),
        "slow reads": (mlp, read(), 8, 32, False),
        "overlap": (lambda: mlp(1024), of(random(2048, 784), 10, 64), 8, 80, 1.0),
    }
    index = strategy.cluster_resolver.task_id
    for name in programs:
        make, data, period, steps, overlap = made[name]
        with strategy.scope():
            model = make()
            inner = keras.optimizers.SGD(0.001)
            optimizer = tfbm.BlockMomentum(inner, period, 0.5, overlap=overlap)
            model.compile(optimizer, crossentropy)
        clock = _clock(keras)
        model.fit(
            strategy.distribute_datasets_from_function(lambda _, data=data: data),
            steps_per_epoch=steps,
            epochs=5,
            shuffle=False,
            verbose=0,
            callbacks=[tfbm.BlockTraining(), clock],
        )
        if index == 0:  # the first two: compiled, tuned
            seconds, busy = (statistics.median(taken[2:]) / steps for taken in clock.taken)
            row = {"program": name, "seconds a step": seconds, "processor seconds": busy}
            print(json.dumps(row), flush=True)


def _clock(keras):
    class Clock(keras.callbacks.Callback):
        """Of each epoch: its time, and this worker's time on a core."""

        taken = ([], [])

        def on_epoch_begin(self, epoch, logs=None):
            self.began = time.perf_counter(), time.process_time()

        def on_epoch_end(self, epoch, logs=None):
            self.taken[0].append(time.perf_counter() - self.began[0])
            self.taken[1].append(time.process_time() - self.began[1])

    return Clock()


def run(workers, threads, programs):
    """One job; its rows."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("TF_NUM_", "OMP_NUM_"))}
    # What is set here is left as it is by the launcher; no number means all cores.
    told = {name: str(threads.get(name, 0)) for name in settings(1)["intra, inter=2"]}
    if not told["OMP_NUM_THREADS"].strip("0"):
        told["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "tf_blockmomentum.launch", "--workers", str(workers)]
    command += ["--output", "first", "--gpus-per-worker", "0", __file__, "--train", *programs]
    done = subprocess.run(command, env={**own, **told}, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument(
        "--settings", nargs="+", choices=list(settings(1)), default=list(settings(1))
    )
    parser.add_argument("--add", type=Path, help="file of all runs, which this adds to")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train)
        return
    kept = options.add.read_text().splitlines() if options.add and options.add.exists() else []
    rows = [json.loads(line) for line in kept]
    for _ in range(options.rounds):
        for workers in options.workers:
            each = max(1, len(os.sched_getaffinity(0)) // workers)
            for name in options.settings:
                for row in run(workers, settings(each)[name], options.programs):
                    rows.append({"workers": workers, "setting": name, **row})
                    if options.add:
                        with options.add.open("a") as file:
                            print(json.dumps(rows[-1]), file=file)
    tell(rows)


def tell(rows):
    """Medians and ranges by setting, over the median without any setting."""
    for workers in sorted({row["workers"] for row in rows}):
        for measure in ("seconds a step", "processor seconds"):
            print(f"\n{workers} workers, {measure}, as a multiple of those of: none")
            print(f"{'':15}" + "".join(f"{name:>20}" for name in settings(1)))
            for program in PROGRAMS:
                own = [r for r in rows if (r["workers"], r["program"]) == (workers, program)]
                taken = {
                    name: [r[measure] for r in own if r["setting"] == name] for name in settings(1)
                }
                if taken["none"]:
                    base = statistics.median(taken["none"])
                    cells = (_cell([t / base for t in those]) for those in taken.values())
                    print(f"{program:15}" + "".join(f"{cell:>20}" for cell in cells))


def _cell(ratios):
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
