"""scikit-learn's handwritten digits as a TFDS data set, and how a worker reads its share.

1797 grey images of 8 x 8 pixels in 10 classes. They ship inside scikit-learn, so preparing
the data set needs no network.
"""

import fcntl
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """Every fifth image is in the test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="The handwritten digits of scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(lambda i: i % 5 != 0),
            "test": self._generate_examples(lambda i: i % 5 == 0),
        }

    def _generate_examples(self, chosen):
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if chosen(i):
                image = (image * 15.9375).astype("uint8")[..., None]  # 0 to 16 becomes 0 to 255
                yield i, {"image": image, "label": int(label)}


def prepare(name="digits", data_dir="runs/data"):
    """Writes the data set to disk, once: this machine's other processes wait for the first."""
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(data_dir, f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare()
    return builder


def share(builder, split, context):
    """One worker's share of a split: other examples on every worker, none twice.

    Args:
        builder: a prepared TFDS builder of images and labels.
        split: "train" or "test".
        context: the `tf.distribute.InputContext` that `distribute_datasets_from_function`
            passes.

    Returns:
        A tf.data dataset of (image in [0, 1], label), not yet batched.
    """
    shares = tfds.even_splits(split, n=context.num_input_pipelines)
    data = builder.as_dataset(
        split=shares[context.input_pipeline_id], as_supervised=True, shuffle_files=False
    )
    return data.map(lambda image, label: (tf.cast(image, tf.float32) / 255, label)).cache()
