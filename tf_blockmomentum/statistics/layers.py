"""Layers with moving statistics."""

import contextlib
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def with_statistics(layers: Iterable[Any]) -> list[Any]:
    """Of some layers, those that keep moving statistics as BatchNormalization does."""

    def keeps(layer: Any) -> bool:
        variables = [getattr(layer, name, None) for name in ("moving_mean", "moving_variance")]
        return all(isinstance(v, keras.Variable) for v in variables) and isinstance(
            getattr(layer, "momentum", None), numbers.Real
        )

    return list({id(layer): layer for layer in layers if keeps(layer)}.values())


class Statistics:
    """A layer with moving statistics, and the sums that its new ones are made of."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.mean, self.variance = layer.moving_mean, layer.moving_variance
        self.size = int(np.prod(self.mean.shape))
        # Examples; and over them, sums of means, of their squares, and of variances. In float64:
        # the mean's square is taken away from what may be little more.
        self.sums = tf.Variable(np.zeros(1 + 3 * self.size), trainable=False, name="statistics")

    @property
    def variables(self) -> list[Any]:
        stddev = getattr(self._layer, "moving_stddev", None)  # with renormalization
        return [self.mean, self.variance, *([] if stddev is None else [stddev])]

    @contextlib.contextmanager
    def of_a_batch(self) -> Iterator[None]:
        """Inside, what the layer assigns to its statistics is a batch's alone."""
        before, self._layer.momentum = self._layer.momentum, 0.0
        try:
            yield
        finally:
            self._layer.momentum = before

    def add(self, variable: Any, value: Any, examples: tf.Tensor) -> None:
        """Adds what the layer makes of a batch to the sums, in replica context."""
        value = tf.cast(tf.reshape(value, [-1]), tf.float64)
        zeros = tf.zeros_like(value)
        if variable is self.mean:
            parts = [tf.ones([1], tf.float64), value, value**2, zeros]
        else:
            parts = [tf.zeros([1], tf.float64), zeros, zeros, value]
        self.sums.assign_add(examples * tf.concat(parts, axis=0))

    def values(self, mean: np.ndarray, variance: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
        """Its variables with their new values."""
        new = [mean, variance, np.sqrt(variance + getattr(self._layer, "epsilon", 0))]
        yield from zip(self.variables, new, strict=False)
