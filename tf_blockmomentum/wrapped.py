"""What a BlockMomentum can be made of: the optimizers inside it, checked."""

import numbers
from typing import Any

import keras

from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.algorithm import Blocks
from tf_blockmomentum.checks import check_number
from tf_blockmomentum.outer import A_MOMENTUM
from tf_blockmomentum.settings import A_RATE


def as_optimizer(optimizer: Any, what: str) -> keras.optimizers.Optimizer:
    """Returns a Keras optimizer, from its name or config too."""
    if isinstance(optimizer, str | dict):
        optimizer = keras.optimizers.get(optimizer)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"BlockMomentum wraps a Keras optimizer, such as keras.optimizers.SGD(0.1). "
            f"Received: {what}={optimizer!r}."
        )
    wrapped = getattr(optimizer, "inner_optimizer", None)
    if isinstance(optimizer, Blocks) or isinstance(wrapped, Blocks):
        raise ValueError(
            f"BlockMomentum cannot wrap a BlockMomentum. Received: {what}="
            f"{optimizer.name!r}. Wrap the optimizer inside it instead."
        )
    return optimizer


def make_outer_optimizer(
    block_momentum: float | None, nesterov: bool | None, block_learning_rate: float | None
) -> tuple[keras.optimizers.Optimizer, dict[str, Any]]:
    """The outer optimizer that is block momentum, and its settings by name; None: the defaults.
    Raises ValueError for numbers out of range."""
    beta = 0.5 if block_momentum is None else block_momentum
    zeta = 1.0 if block_learning_rate is None else block_learning_rate
    check_number("block_momentum", beta, numbers.Real, A_MOMENTUM, 0, 1)
    check_number("block_learning_rate", zeta, numbers.Real, A_RATE, 0)
    settings: dict[str, Any] = {
        "momentum": float(beta),
        "zeta": float(zeta),
        "nesterov": bool(nesterov),
    }
    optimizer = keras.optimizers.SGD(
        learning_rate=float(zeta), momentum=float(beta), nesterov=bool(nesterov), name="outer"
    )
    return optimizer, settings


def check_outer_optimizer(
    outer_optimizer: Any, inner_optimizer: Any, momentum: dict[str, Any]
) -> keras.optimizers.Optimizer:
    """Returns an outer optimizer of the user's, if it can be one. `momentum`: by name, what was
    given that it replaces. Raises ValueError or TypeError."""
    outer_optimizer = as_optimizer(outer_optimizer, "outer_optimizer")
    given = [f"{name}={value!r}" for name, value in momentum.items() if value is not None]
    if given:
        raise ValueError(
            "With an outer_optimizer, BlockMomentum takes no block_momentum, nesterov or "
            f"block_learning_rate. Received: outer_optimizer={outer_optimizer.name!r} and "
            f"{', '.join(given)}. Give them to the outer optimizer, as in "
            "outer_optimizer=keras.optimizers.SGD(block_learning_rate, "
            "momentum=block_momentum, nesterov=...), or leave it out."
        )
    if outer_optimizer is inner_optimizer or outer_optimizer.built:
        raise ValueError(
            "The outer optimizer must be one of its own, not yet built. Received: "
            f"outer_optimizer={outer_optimizer.name!r}, "
            + ("the inner optimizer." if not outer_optimizer.built else "built already.")
        )
    loss_scaling = isinstance(outer_optimizer, keras.optimizers.LossScaleOptimizer)
    if loss_scaling or outer_optimizer.use_ema:
        what = "loss scaling" if loss_scaling else "use_ema=True"
        raise ValueError(
            f"An outer optimizer cannot use {what}. Received: outer_optimizer="
            f"{outer_optimizer.name!r}. It belongs to the inner optimizer."
        )
    return outer_optimizer


def check_schedule_free(
    inner_optimizer: keras.optimizers.Optimizer, inner_state: str, settings: dict[str, Any]
) -> None:
    """Raises ValueError for ScheduleFreeAdamW inside in any other way than the one that is right:
    one of its slots is no memory of gradients but a point beside the weights, from which it
    recovers the average that it keeps, so both have to move alike."""
    kind = getattr(keras.optimizers, "ScheduleFreeAdamW", ())  # since Keras 3.13
    alike = inner_state == "average" and (settings["momentum"], settings["zeta"]) == (0, 1)
    if any(isinstance(part, kind) for part in _keras.parts_of(inner_optimizer)) and not alike:
        raise ValueError(
            "ScheduleFreeAdamW keeps a second point beside the weights, which an outer step would "
            'leave behind. Received: it as inner optimizer, with inner_state="'
            f'{inner_state}", block_momentum={settings["momentum"]} and block_learning_rate='
            f'{settings["zeta"]}. Use inner_state="average", block_momentum=0, which averages '
            "both, or AdamW inside."
        )
