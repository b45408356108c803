"""CIFAR-10 and ResNet-18 in blocks: augmentation, a learning-rate schedule, checkpoints.

    python -m tf_blockmomentum.launch --workers 4 examples/cifar10_resnet.py
    python -m tf_blockmomentum.launch --workers 2 examples/cifar10_resnet.py --smoke

The first command downloads CIFAR-10 (160 MB) and is for GPUs. `--smoke` needs neither: a narrow
net, and images of the same shape made here. Every `--directory` is one run: started again, it
goes on from its last backup.
"""

import argparse
from pathlib import Path

import digits
import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import tf_blockmomentum as tfbm

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's channels


class SmokeCifar10(tfds.core.GeneratorBasedBuilder):
    """Images shaped as CIFAR-10's: each class is a colour under noise."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(640), "test": self._generate_examples(160)}

    def _generate_examples(self, count):
        colours = np.random.default_rng(0).uniform(0, 255, [10, 3])
        rng = np.random.default_rng(count)
        for i in range(count):
            image = rng.normal(colours[i % 10], 50, [32, 32, 3])
            yield i, {"image": image.clip(0, 255).astype("uint8"), "label": i % 10}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small, without a network")
    parser.add_argument("--directory", type=Path, default="runs/cifar10_resnet")
    parser.add_argument("--dataset", default="cifar10", help="a TFDS name (default: cifar10)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128, help="examples per replica and step")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--pre-activation", action="store_true", help="ResNet v2's blocks")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="after the warm-up")
    # Keras's decay does not pass through the momentum: this is the literature's 5e-4 with 0.9.
    parser.add_argument("--weight-decay", type=float, default=5e-3)
    parser.add_argument("--sync-period", type=int, default=8, help="K")
    parser.add_argument("--block-momentum", type=float, default=0.5, help="beta")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(
            directory="runs/cifar10_smoke",
            dataset="smoke_cifar10",
            epochs=5,
            batch=16,
            width=8,
            learning_rate=0.02,
        )
    return parser.parse_args()


def main():
    options = parse()
    strategy = tfbm.MultiWorkerBlockStrategy()
    chief = strategy.extended.should_checkpoint
    keras.utils.set_random_seed(1)
    options.directory.mkdir(parents=True, exist_ok=True)
    builder = digits.prepare(options.dataset)
    replicas = strategy.num_replicas_in_sync
    train, validation = "train[:90%]", "train[90%:]"
    steps = builder.info.splits[train].num_examples // (options.batch * replicas)

    def training_data(context):
        data = digits.share(builder, train, context).shuffle(50_000, seed=1)
        # Seeds of the augmentation: new ones in every epoch, and the same in a resumed run.
        seeds = tf.data.Dataset.random(seed=1, rerandomize_each_iteration=True).batch(4)
        data = tf.data.Dataset.zip(data, seeds).map(augmented, tf.data.AUTOTUNE)
        batches = steps * replicas // context.num_input_pipelines
        return data.batch(options.batch, drop_remainder=True).take(batches).prefetch(2)

    def held_out(split):
        def make(context):
            data = digits.share(builder, split, context)
            return data.map(lambda image, label: (normalised(image), label)).batch(256)

        return strategy.distribute_datasets_from_function(make)

    warm_up = max(1, options.epochs * steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        options.epochs * steps - warm_up,
        warmup_target=options.learning_rate,
        warmup_steps=warm_up,
    )
    with strategy.scope():
        model = resnet18(options.width, options.pre_activation)
        inner = keras.optimizers.SGD(
            schedule, momentum=0.9, nesterov=True, weight_decay=options.weight_decay
        )
        optimizer = tfbm.BlockMomentum(
            inner, sync_period=options.sync_period, block_momentum=options.block_momentum
        )
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=options.sync_period,
        )
    best = keras.callbacks.ModelCheckpoint(
        options.directory / "best.keras", monitor="val_accuracy", save_best_only=True
    )
    log = keras.callbacks.CSVLogger(options.directory / "log.csv", append=True)
    model.fit(
        strategy.distribute_datasets_from_function(training_data),
        epochs=options.epochs,
        validation_data=held_out(validation),
        shuffle=False,  # the dataset does
        verbose=2 if chief else 0,
        callbacks=[
            tfbm.BlockTraining(),
            tfbm.ChiefOnly(best),
            tfbm.ChiefOnly(log),
            tfbm.BlockBackup(options.directory / "backup", callbacks=[best]),
        ],
    )
    _, accuracy = model.evaluate(held_out("test"), verbose=0)  # on every worker: it adds up
    if chief:
        print(f"test accuracy {accuracy:.4f} after {optimizer.blocks} blocks", flush=True)


def normalised(image):
    return (image - MEAN) / DEVIATION


def augmented(example, seed):
    """A random crop of the image with a border of 4 pixels, and its mirror image half the time."""
    image, label = example
    image = tf.pad(normalised(image), [[4, 4], [4, 4], [0, 0]])
    image = tf.image.stateless_random_crop(image, [32, 32, 3], seed[:2])
    return tf.image.stateless_random_flip_left_right(image, seed[2:]), label


def resnet18(width, pre_activation):
    """For 32 x 32 pixels: a stem of 3 x 3, no pooling, four stages of two blocks."""
    block = pre_activation_block if pre_activation else residual_block
    inputs = keras.Input([32, 32, 3])
    x = convolution(inputs, width)
    if not pre_activation:
        x = normalise_relu(x)
    for stage in range(4):
        for stride in (1 if stage == 0 else 2, 1):
            x = block(x, width * 2**stage, stride)
    if pre_activation:
        x = normalise_relu(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def residual_block(x, channels, stride):
    """He et al., arXiv 1512.03385."""
    y = normalise_relu(convolution(x, channels, stride=stride))
    y = normalise(convolution(y, channels))
    if x.shape[-1] != channels:
        x = normalise(convolution(x, channels, size=1, stride=stride))
    return keras.layers.ReLU()(keras.layers.Add()([x, y]))


def pre_activation_block(x, channels, stride):
    """He et al., arXiv 1603.05027."""
    y = normalise_relu(x)
    if x.shape[-1] != channels:
        x = convolution(y, channels, size=1, stride=stride)
    y = normalise_relu(convolution(y, channels, stride=stride))
    return keras.layers.Add()([x, convolution(y, channels)])


def convolution(x, channels, size=3, stride=1):
    return keras.layers.Conv2D(
        channels, size, stride, "same", use_bias=False, kernel_initializer="he_normal"
    )(x)


def normalise(x):
    return keras.layers.BatchNormalization(momentum=0.9)(x)


def normalise_relu(x):
    return keras.layers.ReLU()(normalise(x))


if __name__ == "__main__":
    main()
