"""What can be set on a BlockMomentum while it trains."""

import numbers
from typing import Any

from tf_blockmomentum import schedules
from tf_blockmomentum.checks import check_number
from tf_blockmomentum.outer import A_MOMENTUM

A_RATE = "a number of at least 0"


class Settings:
    """The part of `BlockMomentum` that a callback may set, on every worker alike: what is compiled
    with it is then made anew."""

    # Made by BlockMomentum.
    outer_optimizer: Any
    built: bool
    version: int
    _settings: dict[str, Any]
    _period: Any

    @property
    def block_momentum(self) -> float | None:
        """beta; None with an `outer_optimizer`. Can be set, on all workers alike."""
        return self._settings["momentum"]

    @block_momentum.setter
    def block_momentum(self, beta: float) -> None:
        self._check_own_outer_step("block_momentum", beta)
        check_number("block_momentum", beta, numbers.Real, A_MOMENTUM, 0, 1)
        if beta and self.outer_optimizer.built and not self.outer_optimizer.momentums:
            raise ValueError(
                "This BlockMomentum was built with block_momentum=0 and keeps no velocity. "
                f"Received: block_momentum={beta!r}. To raise it later, begin with a small one, "
                "such as block_momentum=1e-6."
            )
        # Keras's SGD leaves the velocity alone at 0; it should forget instead.
        forgets = not beta and self.outer_optimizer.momentums if self.built else False
        self.outer_optimizer.momentum = 1e-30 if forgets else float(beta)
        self._set("momentum", float(beta))

    @property
    def block_learning_rate(self) -> float | None:
        """zeta; None with an `outer_optimizer`. Can be set, on all workers alike."""
        return self._settings["zeta"]

    @block_learning_rate.setter
    def block_learning_rate(self, zeta: float) -> None:
        self._check_own_outer_step("block_learning_rate", zeta)
        check_number("block_learning_rate", zeta, numbers.Real, A_RATE, 0)
        self.outer_optimizer.learning_rate = float(zeta)
        self._set("zeta", float(zeta))

    @property
    def nesterov(self) -> bool | None:
        """Whether the outer step looks ahead; None with an `outer_optimizer`. Can be set."""
        return self._settings["nesterov"]

    @nesterov.setter
    def nesterov(self, nesterov: bool) -> None:
        self._check_own_outer_step("nesterov", nesterov)
        self.outer_optimizer.nesterov = bool(nesterov)
        self._set("nesterov", bool(nesterov))

    @property
    def sync_period(self) -> schedules.Period:
        """K, or its schedule. A number can be set to another, on all workers alike."""
        return self._period

    @sync_period.setter
    def sync_period(self, sync_period: schedules.Period) -> None:
        sync_period = schedules.check_schedule(sync_period)
        before = getattr(self, "_period", sync_period)
        if (
            not (isinstance(before, int) and isinstance(sync_period, int))
            and before != sync_period
        ):
            raise ValueError(
                "A schedule of `sync_period` cannot be set later, nor one replaced. Received: "
                f"sync_period={sync_period!r} in place of {before!r}. Give it to BlockMomentum."
            )
        self._period = sync_period

    def _check_own_outer_step(self, name: str, value: Any) -> None:
        if self._settings["momentum"] is None:
            raise ValueError(
                f"With an outer_optimizer, BlockMomentum has no `{name}`. Received: {name}="
                f"{value!r}. Set it on optimizer.outer_optimizer instead."
            )

    def _set(self, name: str, value: float | bool) -> None:
        self._settings = {**self._settings, name: value}
        self.version += 1
