"""BlockMomentum: the local update inside a replica, the block update at the boundary."""

import contextlib
import numbers

import keras
import tensorflow as tf
from keras import ops

from tf_blockmomentum import _keras
from tf_blockmomentum.strategy import BlockStrategy, sum_over_replicas

_NO_STRATEGY = tf.distribute.get_strategy()


@keras.saving.register_keras_serializable(package="tf_blockmomentum")
class BlockMomentum(_keras.LocalUpdate):
    r"""Wraps a Keras optimizer for local training in blocks with block momentum (M-AVG).

    Every replica $j$ of $P$ takes $K$ steps of its own `inner_optimizer` on its own
    data; then the replicas' weights are averaged and one momentum term is applied
    to the average:

    $$\begin{aligned}
    w_j &\leftarrow \text{anchor, then } K \text{ local steps}\\
    d &= \tfrac1P \sum_j w_j - \text{anchor}\\
    v &\leftarrow \beta v + \zeta d\\
    \text{anchor} &\leftarrow \text{anchor} + v, \qquad w_j \leftarrow \text{anchor}
    \end{aligned}$$

    with $K$ = `sync_period`, $\beta$ = `block_momentum` and $\zeta$ =
    `block_learning_rate`; `nesterov` replaces the last line's $v$ by $\beta v + \zeta d$
    of the new $v$. The outer step is `keras.optimizers.SGD(zeta, momentum=beta)` with
    the pseudo-gradient $-d$. Communication: one all-reduce of the model's size every
    $K$ steps.

    Special cases: `block_momentum=0` is K-AVG (local SGD, FedAvg). `sync_period=1,
    block_momentum=0` around plain SGD is synchronous SGD. One replica with
    `block_momentum=0` and a block learning rate is Lookahead. `nesterov=True` around
    AdamW is DiLoCo's form.

    $v$ is in weight units. SlowMo divides by the inner learning rate, so it differs
    when that changes over time; CNTK multiplies a sum by $1 - \eta$, so its block
    learning rate of 1 is not this one.

    Args:
        inner_optimizer: any Keras optimizer (or its name); each replica has its own
            state of it. Weight decay, clipping, EMA and the learning rate belong here.
        sync_period: K, local steps in a block, at least 1.
        block_momentum: beta, in [0, 1). More replicas and longer training bear more.
        nesterov: whether the outer step looks ahead.
        block_learning_rate: zeta, 0 or more; 1 is the paper's.
        name: optional name.

    Memory: two more copies of the trainable weights than the inner optimizer alone
    (anchor, velocity), one when `block_momentum` is 0.

    Not for: models that fit's synchronous training already keeps busy on its network
    (nothing is gained); blocks so long that replicas drift apart (shorten K); fewer
    than some dozens of blocks in all (the momentum has no time to act).

    Source: Cong and Liu, "Accelerate Distributed Stochastic Descent for Nonconvex
    Optimization with Momentum" (arXiv 2110.00625), Algorithm 1 (M-AVG).

    Raises:
        ValueError: an argument out of its range, an argument of the base class that
            belongs to the inner optimizer, or a strategy that is not a block strategy.
        TypeError: `inner_optimizer` is not a Keras optimizer.

    Example:

    >>> optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=8)
    >>> optimizer.learning_rate = 0.05
    >>> round(float(optimizer.inner_optimizer.learning_rate), 4)
    0.05
    """

    def __init__(
        self,
        inner_optimizer,
        sync_period=16,
        block_momentum=0.5,
        nesterov=False,
        block_learning_rate=1.0,
        name=None,
        **kwargs,
    ):
        for argument in kwargs:
            raise ValueError(
                f"BlockMomentum does not take `{argument}`. Received: {argument}="
                f"{kwargs[argument]!r}. Set it on the inner optimizer instead, as in "
                f"BlockMomentum(keras.optimizers.SGD(..., {argument}=...))."
            )
        if isinstance(inner_optimizer, str | dict):
            inner_optimizer = keras.optimizers.get(inner_optimizer)
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                f"BlockMomentum wraps a Keras optimizer, such as keras.optimizers.SGD(0.1). "
                f"Received: inner_optimizer={inner_optimizer!r}."
            )
        wrapped = getattr(inner_optimizer, "inner_optimizer", None)
        if isinstance(inner_optimizer, BlockMomentum) or isinstance(wrapped, BlockMomentum):
            raise ValueError(
                "BlockMomentum cannot wrap a BlockMomentum. Received: inner_optimizer="
                f"{inner_optimizer.name!r}. Wrap the optimizer inside it instead."
            )
        whole, number = numbers.Integral, numbers.Real
        check_number("sync_period", sync_period, whole, "a whole number of at least 1", 1)
        expected = "a number from 0 up to, but not including, 1"
        check_number("block_momentum", block_momentum, number, expected, 0, 1)
        expected = "a number of at least 0"
        check_number("block_learning_rate", block_learning_rate, number, expected, 0)
        # A callable keeps the base class from making a learning rate variable of its own.
        super().__init__(learning_rate=lambda: inner_optimizer.learning_rate, name=name)
        check_strategy(_keras.strategy_of(inner_optimizer))
        self.check_same_scope("inner optimizer", _keras.strategy_of(inner_optimizer))
        self.inner_optimizer = inner_optimizer
        self.sync_period = int(sync_period)
        self.block_momentum = float(block_momentum)
        self.nesterov = bool(nesterov)
        self.block_learning_rate = float(block_learning_rate)
        self.outer_optimizer = keras.optimizers.SGD(
            learning_rate=self.block_learning_rate,
            momentum=self.block_momentum,
            nesterov=self.nesterov,
            name="outer",
        )
        _keras.make_local(self.inner_optimizer)
        _keras.make_local(self.outer_optimizer)
        self._stepping = False

    # -- the algorithm ---------------------------------------------------------------------

    def apply(self, grads, trainable_variables=None):
        """One local step: the inner optimizer's update of this replica's variables.

        Keras and `tf.distribute` scale a replica's loss by 1/P, since gradients are
        usually summed over the P replicas; a local step takes that back.

        Raises:
            RuntimeError: not called from `BlockTraining` or `BlockLoop`, which end
                the blocks.
        """
        if not self._stepping:
            raise RuntimeError(
                "BlockMomentum.apply() was called outside a block, so replicas would train "
                "without ever being averaged. With model.fit, pass "
                "callbacks=[tfbm.BlockTraining()]; in a custom loop, run the step through "
                "tfbm.BlockLoop; train_on_batch has no blocks."
            )
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1:
            grads = [g if g is None else ops.multiply(g, replicas) for g in grads]
        self.inner_optimizer.apply(grads, trainable_variables)

    def end_block(self, mean, averaged_variables=()):
        """Ends a block in this replica: the outer step, and back to the anchor.

        Called by `BlockLoop` in replica context.

        Args:
            mean: a function from a list of tensors to their means over the replicas, and
                whether any replica took a step: without one this is no block.
            averaged_variables: variables to be replaced by their means (statistics).
        """
        weights, anchors = self.trained_variables, self._anchors
        deltas = [ops.subtract(w, anchor) for w, anchor in zip(weights, anchors, strict=True)]
        statistics = [ops.convert_to_tensor(v) for v in averaged_variables]
        means, any_steps = mean([*deltas, *statistics])
        d, statistics = means[: len(deltas)], means[len(deltas) :]

        def outer_step():
            self.outer_optimizer.apply([-x for x in d], anchors)  # v = beta v + d; anchor += v
            for w, anchor in zip(weights, anchors, strict=True):
                if w.constraint is not None:
                    anchor.assign(w.constraint(anchor))
                w.assign(anchor)
            for v, value in zip(averaged_variables, statistics, strict=True):
                v.assign(value)
            self._blocks.assign_add(1)

        tf.cond(any_steps, outer_step, lambda: None)

    def restart_block(self):
        """Takes the present weights for the anchor, on every replica of this worker: they
        may have been set or loaded since the last boundary."""
        for w, anchor in zip(self.trained_variables, self._anchors, strict=True):
            anchor.assign(w)
            w.assign(anchor)

    def discard_block(self):
        """Takes the anchor for the present weights: the reverse of `restart_block`."""
        for w, anchor in zip(self.trained_variables, self._anchors, strict=True):
            w.assign(anchor)

    def check_same_scope(self, what, strategy):
        """Raises ValueError unless `what`, of this strategy, has the same one as this."""
        own = _keras.strategy_of(self)
        if strategy is not own:
            raise ValueError(
                f"The {what} and BlockMomentum must be made in the same `strategy.scope()`. "
                f"Received: the {what} made under {type(strategy).__name__}, BlockMomentum under "
                f"{type(own).__name__}. Build and compile the model inside the scope, with both "
                f"optimizers made there."
            )

    @contextlib.contextmanager
    def local_step(self):
        """Inside, `apply` is allowed: the caller ends the blocks."""
        before, self._stepping = self._stepping, True
        try:
            yield
        finally:
            self._stepping = before

    # -- the Keras optimizer contract --------------------------------------------------------

    def build(self, variables):
        """Makes the anchor (a copy of `variables`), the velocity and the inner state."""
        if self.built:
            return
        if not tf.executing_eagerly():
            raise ValueError(
                "BlockMomentum must be built before its first step is traced, since the "
                "anchor starts as a copy of the weights. Call "
                "optimizer.build(model.trainable_variables) first."
            )
        if tf.distribute.has_strategy():
            self.check_same_scope("model", tf.distribute.get_strategy())
        with _keras.strategy_of(self).scope():
            super().build(variables)
            self._anchors = self.add_optimizer_variables(variables, "anchor")
            self.inner_optimizer.build(variables)
            self.outer_optimizer.build(self._anchors)
            self.restart_block()

    @property
    def variables(self):
        """Own state (block count, anchor), the inner optimizer's, the outer's."""
        return self._variables + self.inner_optimizer.variables + self.outer_optimizer.variables

    @property
    def learning_rate(self):
        """The inner optimizer's learning rate; setting it sets that."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        """Local steps done by this replica (the inner optimizer's count)."""
        return self.inner_optimizer.iterations

    @property
    def blocks(self):
        """Blocks ended so far, an int."""
        return int(self._blocks.numpy())

    @property
    def trained_variables(self):
        """The variables it was built with."""
        return _keras.trained_variables(self)

    @property
    def _blocks(self):
        return _keras.track_block_count(self)

    def scale_loss(self, loss):
        """Loss scaling is the inner optimizer's."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        """At the end of fit: with `use_ema` inside, weights and anchor become the mean over
        the replicas of their moving averages (one more all-reduce, on every worker)."""
        inner = self.inner_optimizer
        if not getattr(inner, "inner_optimizer", inner).use_ema:
            return
        strategy = _keras.strategy_of(self)

        def replica():
            inner.finalize_variable_values(var_list)
            sums = sum_over_replicas([ops.convert_to_tensor(w) for w in var_list])
            for w, total in zip(var_list, sums, strict=True):
                w.assign(total / strategy.num_replicas_in_sync)
            self.restart_block()

        tf.function(lambda: strategy.run(replica))()

    def get_config(self):
        """The arguments, the inner optimizer nested."""
        return {
            "inner_optimizer": _keras.serialize_optimizer(self.inner_optimizer),
            "sync_period": self.sync_period,
            "block_momentum": self.block_momentum,
            "nesterov": self.nesterov,
            "block_learning_rate": self.block_learning_rate,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The reverse of `get_config`."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)


def find(optimizer):
    """The BlockMomentum of a model's optimizer, or None; mixed_float16 wraps it once more."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer if isinstance(optimizer, BlockMomentum) else None


def check_strategy(strategy):
    """Raises ValueError unless replicas can train alone under `strategy`."""
    if strategy is _NO_STRATEGY or isinstance(strategy, BlockStrategy):
        return
    remedy = (
        "tfbm.MultiWorkerBlockStrategy()"
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        else "tfbm.MultiDeviceBlockStrategy(devices)"
    )
    raise ValueError(
        f"Block training needs per-replica variables, which {type(strategy).__name__} does not "
        f"have. Received: a {type(strategy).__name__}. Use {remedy} in its place, or no strategy "
        f"for a single replica."
    )


def check_number(name, value, kind, expected, least, below=float("inf")):
    """Raises ValueError unless `value` is of `kind` and `least <= value < below`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < below:
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")
