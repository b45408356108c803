"""A small language model of Python's own source, trained as DiLoCo does.

    python -m tf_blockmomentum.launch --workers 2 examples/text_transformer.py
    python -m tf_blockmomentum.launch --workers 2 examples/text_transformer.py --smoke

A causal transformer over bytes; the text is the standard library's, every tenth module held out.
AdamW inside; outside Nesterov momentum 0.9 and a block learning rate of 0.7 (arXiv 2311.08105).
The first command is for GPUs, `--smoke` for seconds on a CPU. Every `--directory` is one run:
started again, it goes on from its last backup.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tf_blockmomentum as tfbm


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few modules and a tiny model")
    parser.add_argument("--directory", type=Path, default="runs/text_transformer")
    parser.add_argument("--modules", type=int, help="how many to read (default: all)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="texts per replica and step")
    parser.add_argument("--length", type=int, default=256, help="bytes of a text")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="after the warm-up")
    parser.add_argument("--sync-period", type=int, default=50, help="K")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(
            directory="runs/text_smoke",
            modules=10,
            epochs=3,
            length=64,
            layers=2,
            width=64,
            sync_period=5,
        )
    return parser.parse_args()


def main():
    options = parse()
    strategy = tfbm.MultiWorkerBlockStrategy()
    chief = strategy.extended.should_checkpoint
    keras.utils.set_random_seed(1)
    options.directory.mkdir(parents=True, exist_ok=True)
    training, held_out = read(options.modules)
    replicas = strategy.num_replicas_in_sync
    steps = (len(training) - 1) // options.length // (options.batch * replicas)

    def training_data(context):
        x, y = texts(training, options.length, context)
        data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1)
        batches = steps * replicas // context.num_input_pipelines
        return data.batch(options.batch, drop_remainder=True).take(batches).prefetch(2)

    def validation_data(context):
        data = texts(held_out, options.length, context)
        return tf.data.Dataset.from_tensor_slices(data).batch(options.batch)

    warm_up = max(1, options.epochs * steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        options.epochs * steps - warm_up,
        alpha=0.1,
        warmup_target=options.learning_rate,
        warmup_steps=warm_up,
    )
    with strategy.scope():
        model = transformer(options.length, options.layers, options.width)
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.AdamW(schedule, weight_decay=0.1, global_clipnorm=1.0),
            sync_period=options.sync_period,
            block_momentum=0.9,
            nesterov=True,
            block_learning_rate=0.7,
        )
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=5,
        )
    best = keras.callbacks.ModelCheckpoint(options.directory / "best.keras", save_best_only=True)
    log = keras.callbacks.CSVLogger(options.directory / "log.csv", append=True)
    model.fit(
        strategy.distribute_datasets_from_function(training_data),
        epochs=options.epochs,
        validation_data=strategy.distribute_datasets_from_function(validation_data),
        shuffle=False,  # the dataset does
        verbose=2 if chief else 0,
        callbacks=[
            tfbm.BlockTraining(),
            tfbm.ChiefOnly(best),
            tfbm.ChiefOnly(log),
            tfbm.BlockBackup(options.directory / "backup", callbacks=[best]),
        ],
    )
    if chief:
        bits = best.best / math.log(2)  # the loss is in nats
        print(f"best validation: {bits:.3f} bits per byte; {optimizer.blocks} blocks", flush=True)
        model = keras.models.load_model(options.directory / "best.keras")
        print(continued(model, b"def ", 200), flush=True)


def read(modules=None):
    """The bytes of the standard library's modules: of those to train on, of those held out."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:modules]
    sources = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    training = [source for i, source in enumerate(sources) if i % 10]
    return np.concatenate(training), np.concatenate(sources[::10])


def texts(source, length, context):
    """This worker's share of a source cut into texts: bytes, and the bytes that follow each."""
    count = (len(source) - 1) // length
    cut = source[: count * length].reshape(count, length)
    following = source[1 : count * length + 1].reshape(count, length)
    share = slice(context.input_pipeline_id, None, context.num_input_pipelines)
    return cut[share], following[share]


def transformer(length, layers, width, dropout=0.1):
    """Pre-norm decoder: logits of the byte that follows each of `length` bytes."""
    inputs = keras.Input([length], dtype="int32")
    positions = keras.ops.cumsum(keras.ops.ones_like(inputs), axis=1) - 1
    x = keras.layers.Embedding(256, width)(inputs)
    x = keras.layers.Add()([x, keras.layers.Embedding(length, width)(positions)])
    for _ in range(layers):
        y = keras.layers.LayerNormalization()(x)
        attention = keras.layers.MultiHeadAttention(width // 32, 32, dropout=dropout)
        y = attention(y, y, use_causal_mask=True)
        x = keras.layers.Add()([x, keras.layers.Dropout(dropout)(y)])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * width, activation="gelu")(y)
        y = keras.layers.Dense(width)(y)
        x = keras.layers.Add()([x, keras.layers.Dropout(dropout)(y)])
    return keras.Model(inputs, keras.layers.Dense(256)(keras.layers.LayerNormalization()(x)))


def continued(model, text, count, temperature=0.7):
    """A text and `count` bytes more, drawn from a model."""
    length = model.input_shape[1]
    logits_of = tf.function(lambda window: model(window, training=False))
    rng = np.random.default_rng(1)
    for _ in range(count):
        known = np.frombuffer(text, np.uint8)[-length:]
        window = np.zeros([1, length], "int32")  # what follows the known does not matter
        window[0, : len(known)] = known
        logits = logits_of(tf.constant(window))[0, len(known) - 1].numpy() / temperature
        odds = np.exp(logits.astype("float64") - logits.max())
        text += bytes([rng.choice(256, p=odds / odds.sum())])
    return text.decode(errors="replace")


if __name__ == "__main__":
    main()
