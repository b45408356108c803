"""The data of the fuzz's programs: one set of arrays, in every form that fit takes."""

import math

import keras
import numpy as np
import tensorflow as tf
from fuzz_models import CLASSES, FEATURES, LENGTH, SIDE, WORDS

BATCH = 8


def data_of(what):
    """NumPy arrays by name, of a little more than `batches` batches."""
    rng = np.random.default_rng([what["seed"], 1])
    left = what["left_over"]
    count = what["batches"] * BATCH - (BATCH - left if left else 0)
    dtype = keras.config.floatx()
    arrays = {
        "features": rng.normal(1.0, 2.0, size=[count, FEATURES]).astype(dtype),
        "image": rng.normal(size=[count, SIDE, SIDE, 2]).astype(dtype),
        "tokens": rng.integers(WORDS, size=[count, LENGTH]),
        "a": rng.integers(CLASSES, size=[count]),
        "b": rng.normal(size=[count, 1]).astype(dtype),
        "weight": rng.uniform(0.5, 2.0, size=[count]).astype(dtype),
    }
    arrays["tokens"][:, 0] = 1  # no sequence that is masked altogether
    return arrays


def repeat_in_batches(array, copies):
    """Each batch `copies` times, one after the other."""
    parts = [array[i : i + BATCH] for i in range(0, len(array), BATCH)]
    return np.concatenate([part for part in parts for _ in range(copies)])


def elements(what, arrays, weighted):
    """(x, y) or (x, y, sample_weight) as the model takes them."""
    kinds = list(what["layers"])
    x = {kind: arrays[kind] for kind in kinds} if len(kinds) > 1 else arrays[kinds[0]]
    y = {"a": arrays["a"], "b": arrays["b"]} if what["outputs"] == 2 else arrays["a"]
    if not weighted:
        return x, y
    weight = arrays["weight"]
    return x, y, {"a": weight, "b": weight[::-1]} if what["outputs"] == 2 else weight


class Batches(keras.utils.PyDataset):
    def __init__(self, element, batch):
        super().__init__(workers=2)
        self.element, self.batch = element, batch
        self.count = len(keras.tree.flatten(element)[0])

    def __len__(self):
        return math.ceil(self.count / self.batch)

    def __getitem__(self, index):
        part = slice(index * self.batch, (index + 1) * self.batch)
        return keras.tree.map_structure(lambda array: array[part], self.element)


def training_data(what, strategy, wrap, arrays, copies):
    """Arguments of fit."""
    arrays = {name: repeat_in_batches(array, copies) for name, array in arrays.items()}
    element = elements(what, arrays, what["weights"] == "sample")
    batch = BATCH * copies
    if what["left_over"] and copies > 1:
        # A shorter last batch too has its two copies one after the other.
        assert len(arrays["a"]) % batch == what["left_over"] * copies
    kind = what["data"]
    settings = {"epochs": what["epochs"]}
    if what["weights"] == "class":
        settings["class_weight"] = {0: 0.5, 1: 1.0, 2: 2.0}
    if kind == "arrays":
        settings |= dict(zip(("x", "y", "sample_weight"), element, strict=False))
        return {**settings, "batch_size": batch, "shuffle": False}
    if kind == "pydataset":
        return {**settings, "x": Batches(element, batch), "shuffle": False}
    batches = Batches(element, batch)
    if kind == "generator":

        def generate():
            while True:
                yield from (batches[i] for i in range(len(batches)))

        return {**settings, "x": generate(), "steps_per_epoch": len(batches)}
    data = tf.data.Dataset.from_tensor_slices(element)
    if kind == "own" and strategy is not None:
        # Each worker's own copy, which nobody shares out.
        own = tf.data.Dataset.from_tensor_slices(element).batch(batch)
        return {**settings, "x": strategy.distribute_datasets_from_function(lambda _: own)}
    data = data.batch(batch)
    if kind == "unknown" and wrap:
        # Not for Keras alone: what of a step does not depend on its data (the optimizer's count,
        # a metric's) is done once more there when the data turns out to have ended.
        data = data.filter(lambda *_: True)
    if kind == "repeated":
        return {**settings, "x": data.repeat(), "steps_per_epoch": len(batches)}
    return {**settings, "x": data}


def validation_data(what, arrays, copies):
    """Other examples: the first three batches backwards."""
    if what["validation"] is None:
        return {}
    if what["validation"] == "split":
        return {"validation_split": 0.3}
    arrays = some_backwards(arrays, copies)
    element = elements(what, arrays, weighted=False)
    if what["validation"] == "dataset":
        data = tf.data.Dataset.from_tensor_slices(element).batch(BATCH * copies)
        return {"validation_data": data}
    return {"validation_data": element, "validation_batch_size": BATCH * copies}


def some_backwards(arrays, copies):
    return {
        name: repeat_in_batches(array[::-1][: 2 * BATCH + 3], copies)
        for name, array in arrays.items()
    }
