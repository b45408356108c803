"""Checks of arguments that several rooms have."""


def check_number(name, value, kind, expected, least, below=float("inf")):
    """Raises ValueError unless `value` is of `kind` and `least <= value < below`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < below:
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")
