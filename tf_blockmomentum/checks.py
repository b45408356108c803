"""Checks of arguments that several rooms have."""

from typing import Any


def check_number(
    name: str,
    value: Any,
    kind: type[Any],
    expected: str,
    least: float,
    below: float = float("inf"),
) -> None:
    """Raises ValueError unless `value` is of `kind` and `least <= value < below`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < below:
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")


def check_on_nonfinite(on_nonfinite: str) -> str:
    """Returns `on_nonfinite` if it is one of the two."""
    if on_nonfinite in ("raise", "skip"):
        return on_nonfinite
    raise ValueError(
        f'`on_nonfinite` must be "raise" or "skip". Received: on_nonfinite={on_nonfinite!r}.'
    )
