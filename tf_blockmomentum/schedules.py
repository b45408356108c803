"""How many local steps the next block has, and after which a mean that is under way lands."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras

from tf_blockmomentum.checks import check_number

__all__ = [
    "DriftPeriod",
    "GrowingPeriod",
    "Period",
    "PiecewisePeriod",
    "PostLocal",
    "QuadraticPeriod",
    "SyncPeriodSchedule",
]

_LONGEST = 2**31 - 1  # steps of a block that the end of an epoch will end

# What `sync_period` may be: K, a schedule of it, or a function of the global step.
Period = int | Callable[..., int]

_register = keras.saving.register_keras_serializable(package="tf_blockmomentum")


class SyncPeriodSchedule:
    """Base of the schedules for `BlockMomentum(sync_period=...)`.

    Called on every worker when a block begins, with numbers that are the same everywhere, and
    has to give the same on all of them. Any callable of the global step will do in its place
    (to be saved with a model it has to be registered with Keras).
    """

    # Steps at the beginning in which every block is a step long and the outer step is rest:
    # the anchor becomes the mean, and the velocity does not move.
    warm_up = 0
    measures_drift = False
    # Whether it is called with the inner learning rate too, once at the beginning of each block.
    reads_rate = False
    initial = 1

    def __call__(self, step: int, adapted: int) -> int:
        """K of the block that begins.

        Args:
            step: local steps of a replica so far, over all epochs.
            adapted: what `adapt` returned last; `initial` before.
        """
        raise NotImplementedError

    def adapt(self, step: int, period: int, drift: float) -> int:
        """Told of a block of `period` steps that began at `step`, and of its drift, if the class
        sets `measures_drift`; returns the next `adapted`."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The reverse of `get_config`."""
        return cls(**config)


@_register
class PiecewisePeriod(SyncPeriodSchedule):
    """One K up to a step, another from there on.

    Args:
        boundaries: increasing steps at which K changes.
        values: the K before, between and after them; one more than `boundaries`.

    Example:

    >>> period = tfbm.schedules.PiecewisePeriod([1000, 5000], [4, 8, 16])
    >>> period(0), period(1000), period(9000)
    (4, 8, 16)
    """

    def __init__(self, boundaries: Sequence[int], values: Sequence[int]) -> None:
        self.boundaries, self.values = list(boundaries), list(values)
        for k in self.values:
            check_period(k, "values")
        steps = [check_period(step, "boundaries") for step in self.boundaries]
        if steps != sorted(set(steps)) or len(self.values) != len(steps) + 1:
            raise ValueError(
                "PiecewisePeriod needs increasing boundaries and one value more than there are "
                f"boundaries. Received: boundaries={boundaries!r}, values={values!r}."
            )

    def __call__(self, step: int, adapted: int | None = None) -> int:
        return self.values[sum(step >= boundary for boundary in self.boundaries)]

    def get_config(self) -> dict[str, Any]:
        return {"boundaries": self.boundaries, "values": self.values}


@_register
class GrowingPeriod(SyncPeriodSchedule):
    r"""K grows as training settles: $\min(K_{max}, K_0\, factor^{\lfloor step / every \rfloor})$.

    Replicas part fastest at the beginning, when gradients and learning rate are large.

    Args:
        initial: $K_0$.
        every: steps between two growths.
        maximum: $K_{max}$.
        factor: at least 1; a K that is not whole is rounded down.

    Example:

    >>> period = tfbm.schedules.GrowingPeriod(initial=4, every=1000, maximum=32)
    >>> period(999), period(1000), period(10**6)
    (4, 8, 32)
    """

    def __init__(self, initial: int, every: int, maximum: int, factor: float = 2) -> None:
        self.initial = check_period(initial, "initial")
        self.every = check_period(every, "every")
        self.maximum = check_period(maximum, "maximum")
        if not isinstance(factor, int | float) or factor < 1:
            raise ValueError(f"`factor` must be at least 1. Received: factor={factor!r}.")
        self.factor = factor

    def __call__(self, step: int, adapted: int | None = None) -> int:
        period: float = self.initial
        for _ in range(step // self.every):  # not by a power: that may overflow
            if period >= self.maximum or self.factor == 1:
                break
            period *= self.factor
        return min(int(period), self.maximum)

    def get_config(self) -> dict[str, Any]:
        return {
            "initial": self.initial,
            "every": self.every,
            "maximum": self.maximum,
            "factor": self.factor,
        }


@_register
class DriftPeriod(SyncPeriodSchedule):
    r"""K follows the replicas' drift: doubled while they agree, halved when they part.

    At a boundary the drift is $\sqrt{\frac1P\sum_j \|w_j - \bar w\|^2} / \|anchor\|$. Below half
    of `target` the next block is twice as long; above `target` half as long. Drift grows about
    in proportion to K at most, so that a doubled block should stay below the target. A block
    that was cut short (at the end of an epoch) can only shorten.

    Cost: three numbers on the wire, and a pass over deltas and weights at each boundary.

    Args:
        target: the drift to stay below, such as 0.02. It scales with the learning rate: look
            at a few (`BlockTraining.drift`) before choosing.
        initial: the first block's K.
        minimum: the shortest.
        maximum: the longest.

    Not for: comparing methods at equal communication, since K is then an outcome.
    """

    measures_drift = True

    def __init__(
        self, target: float, initial: int = 8, minimum: int = 1, maximum: int = 128
    ) -> None:
        if not isinstance(target, int | float) or not target > 0:
            raise ValueError(f"`target` must be positive. Received: target={target!r}.")
        self.target = float(target)
        self.initial = check_period(initial, "initial")
        self.minimum = check_period(minimum, "minimum")
        self.maximum = check_period(maximum, "maximum")
        if not minimum <= initial <= maximum:
            raise ValueError(
                "DriftPeriod needs minimum <= initial <= maximum. Received: "
                f"minimum={minimum}, initial={initial}, maximum={maximum}."
            )

    def __call__(self, step: int, adapted: int) -> int:
        return adapted

    def adapt(self, step: int, period: int, drift: float) -> int:
        if drift > self.target:
            return max(period // 2, self.minimum)
        return min(2 * period, self.maximum) if drift < self.target / 2 else period

    def get_config(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "initial": self.initial,
            "minimum": self.minimum,
            "maximum": self.maximum,
        }


@_register
class QuadraticPeriod(SyncPeriodSchedule):
    r"""K follows the inner learning rate: $\max(minimum, \lfloor(\alpha / \eta)^2\rfloor)$.

    The quadratic synchronisation rule: under a rate that decays, blocks that grow as its inverse
    square communicate less and less, and generalise better than a constant K. $\eta$ is the inner
    optimizer's learning rate when a block begins, whoever has set it: a schedule of Keras's, a
    callback (on all workers alike), or an assignment; of several in a MultiOptimizer the largest.
    K stays what it was then for the whole block.

    Where the rate first rises (a warm-up), its low values would make for long blocks at the worst
    time. The paper keeps K at its value for the peak rate until then; so do `warmup_steps` with
    `peak_rate`, and without it K is `minimum`, which is never longer. With a rate of 0 a block
    lasts until the epoch ends.

    Args:
        minimum: the shortest block, the paper's $H_{base}$.
        alpha: in units of the learning rate; the paper's are from .001 (Adam inside) to .3 (SGD
            inside, peak rate .8). K grows beyond `minimum` from a rate of
            $\alpha / \sqrt{minimum + 1}$ on.
        warmup_steps: local steps at the beginning in which K does not follow the rate.
        peak_rate: the learning rate at their end, if K is to be that for it; else `minimum`.

    Not for: a constant rate, with which K is constant.

    Source: Gu et al., "A Quadratic Synchronization Rule for Distributed Deep Learning"
    (arXiv 2310.14423), section 3.

    Example:

    >>> period = tfbm.schedules.QuadraticPeriod(minimum=4, alpha=0.2)
    >>> period(0, rate=0.1), period(1000, rate=0.05), period(2000, rate=0.01)
    (4, 16, 400)
    """

    reads_rate = True
    initial = 0  # not yet read

    def __init__(
        self, minimum: int, alpha: float, warmup_steps: int = 0, peak_rate: float | None = None
    ) -> None:
        self.minimum = check_period(minimum, "minimum")
        self.alpha = _positive(alpha, "alpha")
        check_number(
            "warmup_steps", warmup_steps, numbers.Integral, "a whole number of at least 0", 0
        )
        self.warmup_steps = int(warmup_steps)
        self.peak_rate = None if peak_rate is None else _positive(peak_rate, "peak_rate")
        if self.peak_rate and not self.warmup_steps:
            raise ValueError(
                "`peak_rate` is about the warm-up. Received: peak_rate="
                f"{peak_rate!r}, warmup_steps=0. Say how many steps that takes, or leave it out."
            )

    def __call__(self, step: int, adapted: int | None = None, rate: float | None = None) -> int:
        if step < self.warmup_steps:
            rate = self.peak_rate
            if rate is None:
                return self.minimum
        if rate is None:
            raise TypeError(
                "QuadraticPeriod needs the inner learning rate: period(step, rate=...)."
            )
        if not rate > 0:  # NaN too
            return _LONGEST if rate == 0 else self.minimum
        # A rate is a float32: .1 is a little more, which must not take a whole step off.
        longest = min((self.alpha / rate) ** 2 * (1 + 1e-6), _LONGEST)
        return max(self.minimum, int(longest))

    def get_config(self) -> dict[str, Any]:
        return {
            "minimum": self.minimum,
            "alpha": self.alpha,
            "warmup_steps": self.warmup_steps,
            "peak_rate": self.peak_rate,
        }


@_register
class PostLocal(SyncPeriodSchedule):
    """A synchronous warm start: K=1 and no block momentum until a step, then blocks.

    Until then, around SGD with or without momentum, training equals synchronous SGD. Helps
    where the first steps are the wild ones (a large learning rate, its warm-up).

    Args:
        steps: how many steps are synchronous.
        sync_period: K from there on, or another schedule of it.

    Source: Lin et al., "Don't Use Large Mini-Batches, Use Local SGD" (arXiv 1808.07217),
    section 3: post-local SGD.

    Example:

    >>> period = tfbm.schedules.PostLocal(steps=500, sync_period=16)
    >>> period(499), period(500)
    (1, 16)
    """

    def __init__(self, steps: int, sync_period: Period) -> None:
        self.steps = self.warm_up = check_period(steps, "steps")
        self.sync_period = check_schedule(sync_period)
        if getattr(sync_period, "warm_up", 0):
            raise ValueError(
                "PostLocal cannot hold another PostLocal. Received: sync_period="
                f"{sync_period!r}. Give the later of the two numbers of steps to one."
            )
        self.measures_drift = getattr(sync_period, "measures_drift", False)
        self.reads_rate = getattr(sync_period, "reads_rate", False)
        self.initial = getattr(sync_period, "initial", 1)

    def __call__(self, step: int, adapted: int | None = None, rate: float | None = None) -> int:
        return 1 if step < self.steps else period_of(self.sync_period, step, adapted, rate)

    def adapt(self, step: int, period: int, drift: float) -> int:
        if step < self.steps:
            return self.initial
        schedule: Any = self.sync_period
        return schedule.adapt(step, period, drift)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {"steps": self.steps, "sync_period": serialize(self.sync_period)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        deserialize = keras.saving.deserialize_keras_object
        return cls(config["steps"], deserialize(config["sync_period"]))


def period_of(sync_period: Period, step: int, adapted: Any, rate: float | None = None) -> int:
    """K at a step, of a whole number, a schedule, or another callable."""
    if isinstance(sync_period, int):
        return sync_period
    if getattr(sync_period, "reads_rate", False):
        return sync_period(step, adapted, rate)
    if isinstance(sync_period, SyncPeriodSchedule):
        return sync_period(step, adapted)
    return check_period(sync_period(step), f"sync_period({step})")


def check_schedule(sync_period: Period) -> Period:
    """Returns what `sync_period` may be."""
    return sync_period if callable(sync_period) else check_period(sync_period, "sync_period")


def check_period(value: Any, name: str) -> int:
    """Returns a whole number of at least 1 as an int; ValueError for anything else."""
    check_number(name, value, numbers.Integral, "a whole number of at least 1", 1)
    return int(value)


def _positive(value: Any, name: str) -> float:
    # By hand, since `check_number` takes its lower bound in.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}.")
    return float(value)
