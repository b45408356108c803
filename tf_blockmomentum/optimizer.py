"""BlockMomentum: the local update inside a replica, the block update at the boundary."""

from collections.abc import Sequence
from typing import Any, Self

import keras
import tensorflow as tf

from tf_blockmomentum import schedules
from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.landing import check_overlap
from tf_blockmomentum.local import Local, NotBuilt
from tf_blockmomentum.outer import SlowMo
from tf_blockmomentum.strategy import check_strategy
from tf_blockmomentum.wrapped import (
    as_optimizer,
    check_outer_optimizer,
    check_schedule_free,
    make_outer_optimizer,
)


@keras.saving.register_keras_serializable(package="tf_blockmomentum")
class BlockMomentum(Local, _keras.LocalUpdate):
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
    AdamW is DiLoCo's form. Any other Keras optimizer can take the outer step instead:
    docs/methods.md has a line for each published method.

    $v$ is in weight units. SlowMo divides by the inner learning rate, so it differs
    when that changes over time (`SlowMo` is that outer optimizer); CNTK multiplies a
    sum by $1 - \eta$, so its block learning rate of 1 is not this one.

    Args:
        inner_optimizer: any Keras optimizer (or its name); each replica has its own
            state of it. Weight decay, clipping, EMA and the learning rate belong here.
        sync_period: K, local steps in a block, at least 1; or a schedule of it, from
            `tfbm.schedules` or any callable of the global step.
        block_momentum: beta, in [0, 1); default 0.5. More replicas and longer training
            bear more.
        nesterov: whether the outer step looks ahead; default False.
        block_learning_rate: zeta, 0 or more; default 1, the paper's.
        outer_optimizer: a Keras optimizer that takes the outer step in place of these
            three: it is given the anchor as variables and $-d$ as gradients.
        inner_state: what becomes of the inner optimizer's slots (momenta, second
            moments) at a boundary. "keep": each replica keeps its own. "reset": they
            go back to their initial values, which lets momentum SGD and Adam bear a
            large beta (Adam's bias correction goes on by the step). "average": they are
            averaged as the weights are, which makes the all-reduce that much larger.
        overlap: the fraction of the next block, above 0 and up to 1, during which a
            block's deltas may travel while it computes (below); True is 0.5, and False, the
            default, lets everybody wait. Not with `inner_state="average"`.
        name: optional name.

    With `overlap` the deltas leave at the end of a block, and the next one begins at a
    start $s_j$ of the replica's own. After $\tau = \lceil overlap \cdot K \rceil$ of its
    local steps the mean $d$ lands: the same steps on every worker, whatever the timing; one
    that has no mean by then waits for it.

    $$\begin{aligned}
    \text{end of a block:}\quad \delta_j &\leftarrow w_j - \text{anchor}, \qquad
    w_j \leftarrow s_j = \text{anchor} + \beta v + \zeta \delta_j\\
    \text{after } \tau \text{ steps:}\quad v &\leftarrow \beta v + \zeta d, \qquad
    \text{anchor} \leftarrow \text{anchor} + v, \qquad
    w_j \leftarrow \text{anchor} + (w_j - s_j)
    \end{aligned}$$

    $s_j$ is the outer step that is still to come with the replica's own delta for the mean:
    where the anchor would be if all had moved alike. It is off by $\zeta (\delta_j - d)$,
    which the last line takes back: $w_j - s_j$, what the replica has moved meanwhile, is put
    onto the anchor as soon as that is known, and the next $\delta_j$ is all that it moves in
    its block, before the landing and after. So every local step counts exactly once, and were
    gradients the same everywhere, the anchors would be those without overlap. What it costs
    is $\tau$ steps with gradients from beside the anchor: little for like shards, and for
    unlike ones less the smaller $\tau$ is. At 1.0 the mean lands where the next block ends,
    the outer step comes a whole block late, and the transfer has all of it to hide behind.
    Take the smallest fraction that hides the transfer.

    With `nesterov`, $s_j = \text{anchor} + \beta(\beta v + \zeta\delta_j) +
    \zeta\delta_j$. What an `outer_optimizer` will do is not foretold: $s_j =
    \text{anchor} + \delta_j$, the replica starts from where it is. Statistics land in the
    same way: their mean, and what the replica's own have changed by since they were sent.
    With a schedule, K of a block is decided when it begins: the steps of the block in flight
    are counted in, its drift is not known yet. A synchronous warm start does not overlap.
    A shorter block, a flush and the end of an epoch land what is in flight. Delayed
    averaging from the stale anchor, as in CO2, diverges with block momentum.

    Memory: two more copies of the trainable weights than the inner optimizer alone
    (anchor, velocity), one when `block_momentum` is 0; with an `outer_optimizer` the
    anchor and its slots; with `overlap` one more (the delta in flight). While deltas
    travel, packed copies of them come on top (docs/speed.md, Memory).

    Not for: models that fit's synchronous training already keeps busy on its network
    (nothing is gained); blocks so long that replicas drift apart (shorten K); fewer
    than some ten blocks in all (the momentum has no time to act).

    Source: Cong and Liu, "Accelerate Distributed Stochastic Descent for Nonconvex
    Optimization with Momentum" (arXiv 2110.00625), Algorithm 1 (M-AVG).

    Raises:
        ValueError: an argument out of its range, an argument of the base class that
            belongs to the inner optimizer, both an `outer_optimizer` and what it
            replaces, or a strategy that is not a block strategy.
        TypeError: `inner_optimizer` or `outer_optimizer` is not a Keras optimizer.

    Example:

    >>> optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=8)
    >>> optimizer.learning_rate = 0.05
    >>> round(float(optimizer.inner_optimizer.learning_rate), 4)
    0.05
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str | dict[str, Any],
        sync_period: schedules.Period = 16,
        block_momentum: float | None = None,
        nesterov: bool | None = None,
        block_learning_rate: float | None = None,
        outer_optimizer: keras.optimizers.Optimizer | str | dict[str, Any] | None = None,
        inner_state: str = "keep",
        overlap: float | bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for argument in kwargs:
            raise ValueError(
                f"BlockMomentum does not take `{argument}`. Received: {argument}="
                f"{kwargs[argument]!r}. Set it on the inner optimizer instead, as in "
                f"BlockMomentum(keras.optimizers.SGD(..., {argument}=...))."
            )
        inner_optimizer = as_optimizer(inner_optimizer, "inner_optimizer")
        if inner_state not in ("keep", "reset", "average"):
            raise ValueError(
                '`inner_state` must be "keep", "reset" or "average". Received: '
                f"inner_state={inner_state!r}."
            )
        # A callable keeps the base class from making a learning rate variable of its own.
        super().__init__(learning_rate=lambda: inner_optimizer.learning_rate, name=name)
        check_strategy(_keras.strategy_of(inner_optimizer))
        self.check_same_scope("inner optimizer", _keras.strategy_of(inner_optimizer))
        self.inner_optimizer = inner_optimizer
        self.sync_period = schedules.check_schedule(sync_period)
        self.inner_state = inner_state
        self.overlap = check_overlap(overlap)
        if self.overlap and inner_state == "average":
            raise ValueError(
                'With `overlap`, `inner_state` must be "keep" or "reset": the mean of a second '
                "moment that lands late, and what a replica's own has changed by meanwhile, can "
                f"come to less than 0. Received: overlap={overlap!r}, inner_state={inner_state!r}."
            )
        momentum: dict[str, Any] = {
            "block_momentum": block_momentum,
            "nesterov": nesterov,
            "block_learning_rate": block_learning_rate,
        }
        if outer_optimizer is None:
            outer_optimizer, self._settings = make_outer_optimizer(**momentum)
        else:
            outer_optimizer = check_outer_optimizer(outer_optimizer, inner_optimizer, momentum)
            self.check_same_scope("outer optimizer", _keras.strategy_of(outer_optimizer))
            self._settings = {"momentum": None, "zeta": None, "nesterov": None}
            if isinstance(outer_optimizer, SlowMo):
                outer_optimizer.follow(inner_optimizer)
        self.outer_optimizer = outer_optimizer
        check_schedule_free(inner_optimizer, inner_state, self._settings)
        _keras.make_local(self.inner_optimizer)
        _keras.make_local(self.outer_optimizer)
        self._stepping = False
        self.updating = False
        self.version = 0  # of what is compiled with its settings
        self._updated, self._overwritten = set(), set()

    def check_same_scope(self, what: str, strategy: tf.distribute.Strategy) -> None:
        """Raises ValueError unless `what`, of this strategy, has the same one as this."""
        own = _keras.strategy_of(self)
        if strategy is not own:
            raise ValueError(
                f"The {what} and BlockMomentum must be made in the same `strategy.scope()`. "
                f"Received: the {what} made under {type(strategy).__name__}, BlockMomentum under "
                f"{type(own).__name__}. Build and compile the model inside the scope, with both "
                f"optimizers made there."
            )

    # -- the Keras optimizer contract --------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the anchor (a copy of `variables`), the velocity and the inner state."""
        if self.built:
            return
        if self._stepping:
            raise NotBuilt(self, variables)  # an optimizer around it builds itself in the step
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
            _keras.make_local(self.inner_optimizer)  # a MultiOptimizer has found its parts
            self.outer_optimizer.build([a for a in self._anchors if a is not None])
            if self.overlap:
                self._sent = self.add_optimizer_variables(variables, "sent")
                self._in_flight = self.add_variable(
                    shape=(), initializer="zeros", dtype="bool", name="in_flight"
                )
                # What of the velocity, and of its delta in flight, a replica begins ahead of the
                # anchor by.
                self._ahead = self.add_variable(
                    shape=(2,), initializer="zeros", dtype="float64", name="ahead"
                )
            if self.scheduled:
                self._global_step = self._counter("global_step", 0)
                self._adapted = self._counter(
                    "sync_period", getattr(self.sync_period, "initial", 1)
                )
            if self.inner_state == "reset":
                slots = _keras.slots(self.inner_optimizer)
                self._initial_slots = [(slot, _initial_value(slot)) for slot in slots]
            self.restart_block()

    def _counter(self, name: str, value: int) -> keras.Variable:
        return self.add_variable(
            shape=(), initializer=keras.initializers.Constant(value), dtype="int64", name=name
        )

    @property
    def variables(self) -> list[Any]:
        """Own state (block count, anchor), the inner optimizer's, the outer's."""
        return self._variables + self.inner_optimizer.variables + self.outer_optimizer.variables

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate; setting it sets that."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """Local steps done by this replica (the inner optimizer's count)."""
        return self.inner_optimizer.iterations

    @property
    def blocks(self) -> int:
        """Blocks ended so far, an int."""
        return int(self._blocks.numpy())

    @property
    def _blocks(self) -> Any:
        return _keras.track_block_count(self)

    def scale_loss(self, loss: Any) -> Any:
        """Loss scaling is the inner optimizer's."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """At the end of fit: with `use_ema` inside, weights and anchor become their moving
        averages, of which the last flush took the mean over the replicas."""
        averages = _keras.moving_averages(self.inner_optimizer)
        for average, variable in averages:
            if any(variable is v for v in var_list):
                variable.assign(average)
        if averages:
            self.restart_block()

    def get_config(self) -> dict[str, Any]:
        """The arguments, the optimizers nested."""
        return {
            "inner_optimizer": _keras.serialize_optimizer(self.inner_optimizer),
            "sync_period": keras.saving.serialize_keras_object(self.sync_period),
            "block_momentum": self.block_momentum,
            "nesterov": self.nesterov,
            "block_learning_rate": self.block_learning_rate,
            "outer_optimizer": (
                _keras.serialize_optimizer(self.outer_optimizer)
                if self.block_momentum is None
                else None
            ),
            "inner_state": self.inner_state,
            "overlap": self.overlap,
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """The reverse of `get_config`."""
        config = dict(config)
        for name in ("inner_optimizer", "outer_optimizer", "sync_period"):
            if name in config:
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        return cls(**config)


def _initial_value(slot: Any) -> float:
    """What a new slot is filled with."""
    value = slot.numpy()
    return float(value.flat[0]) if value.size else 0.0


def find(optimizer: Any) -> BlockMomentum | None:
    """The BlockMomentum of a model's optimizer, or None; mixed_float16 wraps it once more."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer if isinstance(optimizer, BlockMomentum) else None
