"""When the mean of a block lands in the next one."""

import math
import numbers
from typing import TypeVar

import numpy as np

_Steps = TypeVar("_Steps", int, float)  # a float where K is a mean


def check_overlap(overlap: float | bool) -> float | bool:
    """Returns what `overlap` may be: False, or a fraction as a float (0.5 for True)."""
    if isinstance(overlap, bool | np.bool_):
        return 0.5 if overlap else False
    expected = (
        "`overlap` must be False, True (half of the next block), or the fraction of the next "
        f"block, above 0 and up to 1, during which deltas may travel. Received: {overlap!r}. "
    )
    if not isinstance(overlap, numbers.Real):
        raise TypeError(f"{expected}Give it as a number, such as overlap=0.5.")
    fraction = float(overlap)
    if not 0 < fraction <= 1:
        raise ValueError(f"{expected}For no overlap give overlap=False.")
    return fraction


def landing_step(overlap: float | bool, period: _Steps) -> _Steps:
    """After how many local steps of a block of `period` the mean of the block before lands;
    0 without overlap."""
    # What a product's rounding adds is no step: 0.1 * 30 is a little more than 3.
    return min(math.ceil(overlap * period - 1e-9), period)
