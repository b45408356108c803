"""Outer optimizers of our own."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.boundary.exchange import share_of
from tf_blockmomentum.checks import check_number

A_MOMENTUM = "a number from 0 up to, but not including, 1"


@keras.saving.register_keras_serializable(package="tf_blockmomentum")
class SlowMo(keras.optimizers.Optimizer):
    r"""SlowMo's outer optimizer, for `BlockMomentum(outer_optimizer=...)`.

    Its buffer is in gradient units: with $\gamma$ the inner learning rate at the boundary,

    $$u \leftarrow \beta u - d / \gamma, \qquad anchor \leftarrow anchor - \alpha \gamma u$$

    At a constant $\gamma$ that is M-AVG with $\zeta = \alpha$. Where the inner learning rate
    falls, what SlowMo remembers of earlier blocks shrinks with it, and M-AVG's velocity
    does not.

    Args:
        learning_rate: alpha; 1 is the paper's.
        momentum: beta, in [0, 1); the paper has 0.4 to 0.8.
        name: optional name.
        **kwargs: as in `keras.optimizers.Optimizer`.

    Source: Wang et al., "SlowMo: Improving Communication-Efficient Distributed SGD with
    Slow Momentum" (arXiv 1910.00643), Algorithm 1.

    Raises:
        ValueError: a momentum outside [0, 1).
        RuntimeError: used other than as an outer optimizer.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1.0,
        momentum: float = 0.5,
        name: str = "slowmo",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        check_number("momentum", momentum, numbers.Real, A_MOMENTUM, 0, 1)
        self.momentum = float(momentum)
        self._inner_learning_rate: Callable[[], Any] | None = None

    def follow(self, inner_optimizer: keras.optimizers.Optimizer) -> None:
        """Takes gamma from an inner optimizer."""
        self._inner_learning_rate = lambda: inner_optimizer.learning_rate

    def build(self, variables: Sequence[Any]) -> None:
        """Makes u."""
        if not self.built:
            super().build(variables)
            self._buffers = self.add_optimizer_variables(variables, "slow_momentum")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The two equations."""
        if self._inner_learning_rate is None:
            raise RuntimeError(
                "SlowMo is an outer optimizer: it needs the inner one's learning rate. Use "
                "tfbm.BlockMomentum(inner_optimizer, outer_optimizer=tfbm.SlowMo())."
            )
        u = self._buffers[_keras.index_of(self, variable)]
        gamma = ops.cast(self._inner_learning_rate(), variable.dtype)
        # Where gamma is 0 no replica has moved.
        gradient = tf.math.divide_no_nan(ops.cast(gradient, variable.dtype), gamma)
        self.assign(u, self.momentum * u + gradient)
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * gamma * u)

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "momentum": self.momentum}


def momentum_step(
    optimizer: keras.optimizers.SGD,
    anchors: Sequence[Any],
    sums: Sequence[tf.Tensor],
    replicas: tf.Tensor,
) -> None:
    """What `optimizer.apply` does with the negative means of sums as gradients, in replica
    context: for each variable one operation of TensorFlow's, which passes over it twice and
    takes its part of the mean on the way. As fast as XLA makes of the same, and nothing to
    compile: that takes seconds for hundreds of variables.

    Args:
        optimizer: Keras's SGD, built with the anchors.
        anchors: variables.
        sums: of the replicas' deltas, a tensor for each anchor.
        replicas: how many are in them.
    """
    dtypes = {x.dtype for x in sums}
    rate = tf.convert_to_tensor(optimizer.learning_rate)
    rates = {dtype: -tf.cast(rate, dtype) * share_of(replicas, dtype) for dtype in dtypes}
    momenta = {dtype: tf.cast(optimizer.momentum, dtype) for dtype in dtypes}
    for anchor, x in zip(anchors, sums, strict=True):
        handle = _keras.replica_part(anchor).handle
        if optimizer.momentums:
            velocity = optimizer.momentums[_keras.index_of(optimizer, anchor)]
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=handle,
                accum=_keras.replica_part(velocity).handle,
                lr=rates[x.dtype],
                grad=x,
                momentum=momenta[x.dtype],
                use_nesterov=optimizer.nesterov,
            )
        else:
            tf.raw_ops.ResourceApplyGradientDescent(var=handle, alpha=rates[x.dtype], delta=x)
    optimizer.iterations.assign_add(1)
