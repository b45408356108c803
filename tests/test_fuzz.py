"""Random Keras programs (fuzz_programs.py) must be what they are without this library.

With one replica and `block_momentum=0` a block is nothing but its local steps. With two workers
that are given the same examples both take the same steps, and their mean is what each has.
"""

import keras
import numpy as np
import pytest
from fuzz_draw import draw
from fuzz_programs import run
from helpers import forget_keras_state

# What Keras says of programs that do what it thinks odd; the comparison is about results.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}:UserWarning")
    for text in (
        "Layer .* was passed an input with a mask",
        "Gradients do not exist for variables",
    )
]


def seeds(some, many):
    """Some in `make test`, the others in `make test-all`."""
    slow = pytest.mark.slow
    return [seed if seed in some else pytest.param(seed, marks=slow) for seed in range(many)]


@pytest.mark.parametrize("seed", seeds((1, 3), 200))
def test_one_device_is_plain_keras(seed):
    what = draw(seed)
    want = run(what, wrap=False)
    forget_keras_state()
    if diverges(what, want):
        with pytest.raises(FloatingPointError):
            run(what)
    else:
        compare(what, run(what), want, "test_one_device_is_plain_keras")


@pytest.mark.parametrize("seed", seeds((1, 2), 100))
def test_two_workers_with_equal_data_are_plain_keras(pair, seed):
    what = draw(seed, workers=2)
    want = run(what, wrap=False)
    if diverges(what, want):
        errors = pair.run(run_on_worker, what, limit=200, expect_error=True)
        assert [error.type for error in errors] == ["FloatingPointError"] * 2
        return
    for got in pair.run(run_on_worker, what, limit=200):
        compare(what, got, want, "test_two_workers_with_equal_data_are_plain_keras")


def run_on_worker(strategy, what):
    return run(what, strategy, copies=2)


def diverges(what, want):
    """Whether plain Keras's weights are no numbers in the end, which is an error in blocks."""
    weights = [w for name, value in want.items() if name.startswith("weights") for w in value]
    finite = all(np.isfinite(np.asarray(w, "float64")).all() for w in weights)
    return not finite and "TerminateOnNaN" not in what["callbacks"]


def tolerance(what):
    """A boundary takes `anchor + (w - anchor)` for `w`, which is its rounding error away from it.
    XLA adds up in an order of its own in each of the two programs."""
    if what["policy"].startswith("mixed"):  # 8 or 11 bits, and a rounding may go the other way
        return {"rtol": 0.02, "atol": 0.02}
    constrained = any("dense constraint" in names for names in what["layers"].values())
    if constrained and what["policy"] == "float64":
        # A boundary constrains the anchor too, and Keras's MaxNorm makes what is within the norm
        # already smaller each time, by its epsilon of 1e-7.
        return {"rtol": 1e-4, "atol": 1e-5}
    if what["policy"] == "float32":  # an optimizer divides by roots of small gradients
        return {"rtol": 1e-4, "atol": 1e-5}
    return {"rtol": 1e-9, "atol": 1e-9}


def compare(what, got, want, test):
    wrong = [f"only one has {name}" for name in sorted(set(got) ^ set(want))]
    for name in want:
        a, b = keras.tree.flatten(got.get(name, [])), keras.tree.flatten(want[name])
        if [np.shape(x) for x in a] != [np.shape(x) for x in b]:
            wrong.append(f"{name}: {got.get(name)!s:.300} in place of {want[name]!s:.300}")
            continue
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if not np.allclose(x, y, equal_nan=True, **tolerance(what)):
                far = np.max(np.abs(np.asarray(x, "float64") - y))
                wrong.append(f"{name}[{i}]: by {far:.2g}; {x!s:.200} in place of {y!s:.200}")
    if wrong:
        program = "\n".join(f"    {name} = {value!r}" for name, value in what.items())
        again = f'pytest -n 0 -m "slow or not slow" "tests/test_fuzz.py::{test}[{what["seed"]}]"'
        raise AssertionError("\n".join([*wrong[:12], "The program:", program, "Alone:", again]))
