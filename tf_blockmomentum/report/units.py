"""Quantities as people write them: "100MB", "50ms"."""

import re

_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_bytes(text: str) -> float:
    """The bytes of "100MB", "1.5 GB", "64MiB".

    Raises:
        ValueError: not a positive number and a unit.
    """
    return _parse(text, _BYTES, "a size is a number and B, kB, MB, GB, KiB, MiB or GiB", "100MB")


def parse_seconds(text: str) -> float:
    """The seconds of "50ms", "1.2 s", "300us".

    Raises:
        ValueError: not a positive number and a unit.
    """
    return _parse(text, _SECONDS, "a time is a number and us, ms or s", "50ms")


def _parse(text: str, units: dict[str, float], expected: str, example: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?([a-zµ]+)", text.strip().lower().replace("µ", "u"))
    value = float(match[1]) * units.get(match[2], 0.0) if match else 0.0
    if not value > 0:
        raise ValueError(f'{expected}, such as "{example}". Received: {text!r}.')
    return value
