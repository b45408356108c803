"""The tasks of the evidence: what is learnt, by which model, and how far."""

import contextlib
import functools
import io
import sys
from pathlib import Path

import numpy as np

LENGTH = 128  # bytes of a text
SCHEDULE_END = 0.01  # all rates fall along a cosine to this fraction


class Task:
    """What one learns from examples: arrays of inputs and of classes.

    Attributes:
        name: of the task.
        batch: examples of a local step of each of four replicas.
        samples: how many are trained on in all.
        unit: what one nat of loss is in the unit that is reported.
        warm_up: of the steps, the part in which the rate rises.
        training, validation, test: (x, y) each.
        network: makes the model; `other` makes another one for the same data.
    """

    def __init__(self, name, batch, samples, data, network, unit=1.0, warm_up=0.0, other=None):
        self.name, self.batch, self.samples = name, batch, samples
        self.network, self.other, self.unit, self.warm_up = network, other, unit, warm_up
        self.training, self.validation, self.test = data


def task(name, quick=False):
    """The task of that name; `quick`: a sixteenth of the samples, and a smaller transformer."""
    tasks = {"language": language, "larger": larger, "images": images, "digits": digits}
    made = tasks[name](quick)
    if quick:
        made.samples //= 16
        made.validation, made.test = (
            tuple(a[:256] for a in part) for part in (made.validation, made.test)
        )
    return made


def language(quick):
    """The bytes of Python's standard library, examples/text_transformer.py's model of them."""
    sys.path.append(str(Path(__file__).parent.parent / "examples"))
    from text_transformer import read, transformer

    def cut(source):
        count = (len(source) - 1) // LENGTH
        x = source[: count * LENGTH].reshape(count, LENGTH)
        return x, source[1 : count * LENGTH + 1].reshape(count, LENGTH).astype("int32")

    training, held_out = read()
    x, y = cut(held_out)
    order = np.random.default_rng(0).permutation(len(x))
    parts = (order[:256], order[256:1280])
    data = (cut(training), *((x[part], y[part]) for part in parts))
    # 576 steps of four replicas: 589,824 bytes.
    network = functools.partial(transformer, LENGTH, *((1, 32) if quick else (2, 96)), dropout=0.0)
    return Task("language", 2, 4608, data, network, unit=1 / np.log(2), warm_up=0.05)


def larger(quick):
    """The same with nearly twice the weights, 0.52 million."""
    made = language(quick)
    if not quick:
        made.network = functools.partial(made.network.func, LENGTH, 3, 112, dropout=0.0)
    return made


def images(quick):
    """MNIST-1D (arXiv 2011.14439) as published, with 10,000 new examples to test on."""
    x, y = mnist1d(2000 if quick else 14000)
    parts = np.split(np.arange(len(x)), [1000, 1500] if quick else [4000, 9000])
    data = tuple((x[part][..., None], y[part]) for part in parts)
    network = functools.partial(residual_network, (16,) if quick else (16, 32, 64))
    return Task("images", 16, 32768, data, network)  # 8 epochs


def digits(quick):
    """scikit-learn's 8 x 8 digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = (found.images / 16).astype("float32").reshape(-1, 64), found.target.astype("int32")
    test = np.arange(len(x)) % 5 == 0
    data = ((x[~test], y[~test]), (x[test], y[test]), (x[test], y[test]))
    mlp = functools.partial(perceptron, [64, 64, 10])
    return Task("digits", 16, 40960, data, mlp, other=convolutional_network)


@functools.cache
def mnist1d(count):
    """Its first `count` examples: signals of 40 values, and their classes."""
    import mnist1d.data

    options = mnist1d.data.get_dataset_args()
    options.num_samples, options.train_split = count, 1.0
    state = np.random.get_state()
    with contextlib.redirect_stdout(io.StringIO()):
        made = mnist1d.data.make_dataset(options)
    np.random.set_state(state)
    return made["x"].astype("float32"), made["y"].astype("int32")


def residual_network(widths):
    """A ResNet with BatchNormalization over signals of 40 values; 28,826 weights."""
    import keras
    from keras import layers

    def activated(x):
        return layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(x))

    def conv(width, size, stride=1):
        return layers.Conv1D(width, size, stride, padding="same", use_bias=False)

    signal = keras.Input([40, 1])
    x = conv(16, 5)(signal)
    for width in widths:
        stride = 1 if width == 16 else 2
        x = activated(x)
        y = conv(width, 3)(activated(conv(width, 3, stride)(x)))
        if stride > 1:
            x = conv(width, 1, stride)(x)
        x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling1D()(activated(x))
    return keras.Model(signal, layers.Dense(10)(x))


def convolutional_network():
    """Two convolutions over 8 x 8 digits; 11,514 weights."""
    import keras
    from keras import layers

    return keras.Sequential([
        keras.Input([64]), layers.Reshape([8, 8, 1]),
        layers.Conv2D(16, 3, padding="same", activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(32, 3, padding="same", activation="relu"), layers.Flatten(),
        layers.Dense(12, activation="relu"), layers.Dense(10),
    ])  # fmt: skip


def perceptron(widths):
    """Dense layers with ReLU between them."""
    import keras
    from keras import layers

    hidden = [layers.Dense(width, activation="relu") for width in widths[1:-1]]
    return keras.Sequential([keras.Input([widths[0]]), *hidden, layers.Dense(widths[-1])])


def schedule(steps, warm_up=0.0):
    """What a rate is multiplied by in each of so many steps: a linear rise, then a cosine from 1
    to SCHEDULE_END."""
    rising = int(steps * warm_up)
    up = np.arange(1, rising + 1) / max(rising, 1)
    x = np.arange(steps - rising) / (steps - rising)
    return np.concatenate([up, SCHEDULE_END + (1 - SCHEDULE_END) * (1 + np.cos(np.pi * x)) / 2])


def shuffled(indices, count, rng):
    """The first `count` of the indices in a new random order each time over."""
    times = -(-count // len(indices))
    return np.concatenate([rng.permutation(indices) for _ in range(times)])[:count]
