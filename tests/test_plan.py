"""tfbm-plan: what it predicts, and what it says of bad input."""

import re

import pytest
from helpers import run_python

from tf_blockmomentum.cost import CostModel
from tf_blockmomentum.report.planning import FORMS, PERIODS, main, shares, smallest_period
from tf_blockmomentum.report.units import parse_bytes, parse_seconds

GIVEN = ["--weights", "100MB", "--step", "50ms", "--link", "1gbit", "--workers", "2"]


def test_what_it_predicts():
    """By hand: 100 MB over 125 MB/s take .8 s among two workers, as long as 16 steps."""
    cost = CostModel(step_seconds=0.05, model_bytes=100e6, bandwidth=125e6)
    found = shares(cost, 2)
    assert found["plain"][PERIODS.index(16)] == pytest.approx(0.5)
    assert found["plain"][0] == pytest.approx(0.05 / 0.85)
    assert found["float16"][PERIODS.index(8)] == pytest.approx(0.5)
    eight, four = 0.8 * (8 + 1 / 16) / 32, 0.8 * (4 + 1 / 16) / 32
    assert found["int8"][PERIODS.index(8)] == pytest.approx(0.4 / (0.4 + eight))
    assert found["int4"][PERIODS.index(8)] == pytest.approx(0.4 / (0.4 + four))
    # .9 wants nine times as long a block as its messages: 144 steps.
    assert smallest_period(cost, 2, False, None) == 144
    for name, overlap, compression in FORMS:
        assert all(a <= b for a, b in zip(found[name], found[name][1:], strict=False)), name
        least = smallest_period(cost, 2, overlap, compression)
        coded = cost.compressed(compression)
        assert coded.share(least, 2, overlap) >= 0.9 > coded.share(least - 1, 2, overlap), name
    assert smallest_period(cost, 200, False, None) == 0  # not up to 256


def test_the_command(tmp_path, capsys):
    target = tmp_path / "plan.png"
    assert main([*GIVEN, "8", "--plot", str(target)]) == 0
    text = capsys.readouterr().out
    assert "predicted share" in text
    assert "These are predictions" in text
    plain = re.findall(r"^plain +(.*)$", text, flags=re.M)
    assert plain[0].split() == [
        "0.06",
        "0.11",
        "0.20",
        "0.33",
        "0.50",
        "0.67",
        "0.80",
        "0.89",
        "0.94",
        "144",
    ]
    assert len(plain) == 2
    assert target.read_bytes()[:4] == b"\x89PNG"


def test_it_starts_without_tensorflow():
    code = (
        "import sys; sys.argv[0] = 'tfbm-plan'; import tf_blockmomentum.plan, "
        "tf_blockmomentum.report.drawing; print({'tensorflow', 'keras'} & set(sys.modules))"
    )
    assert run_python("-c", code, limit=60).strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--weights", "100"], "a size is a number and B, kB, MB, GB, KiB, MiB or GiB"),
        (["--weights", "-1MB"], "--weights: expected one argument"),
        (["--weights", "0MB"], "Received: '0MB'"),
        (["--step", "50"], "a time is a number and us, ms or s, such as"),
        (["--link", "1gb"], "A bandwidth is a number and bit, kbit"),
        (["--workers", "1"], "a number of workers is a whole number of at least 2. Received: '1'"),
        (["--latency", "x"], "argument --latency: a time is"),
        (["--boundary", "x"], "argument --boundary: a time is"),
        (["--measure", "x.py"], "--measure finds --weights and --step out. Leave them out"),
        (["--plot", "plan.odd"], "A picture cannot be written to 'plan.odd'"),
    ],
)
def test_bad_input(capsys, arguments, text):
    with pytest.raises(SystemExit) as error:
        main([*GIVEN, *arguments])
    assert error.value.code == 2
    assert text in capsys.readouterr().err


def test_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        main(GIVEN[2:])
    assert "--weights and --step are missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*GIVEN[4:], "--measure", "nowhere.py"])
    assert "Received: 'nowhere.py': no file" in capsys.readouterr().err


def test_units():
    assert parse_bytes("1.5 GB") == 1.5e9
    assert parse_bytes("2MiB") == 2**21
    assert parse_seconds("300us") == pytest.approx(3e-4)
    assert parse_seconds("1.2 s") == 1.2


SCRIPT = """
import sys, time
import keras, numpy as np
import tf_blockmomentum as tfbm
strategy = tfbm.MultiWorkerBlockStrategy(compression="float16")
with strategy.scope():
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(500)])
    model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=2), "mse")
def batches():
    while True:
        time.sleep(0.03)
        yield np.ones([2, 4], "float32"), np.ones([2, 500], "float32")
assert sys.argv[1:] == ["--fast"]
model.fit(batches(), steps_per_epoch=100000, verbose=0, callbacks=[tfbm.BlockTraining()])
"""


@pytest.mark.timeout(120)
def test_a_script_is_measured(tmp_path, capsys):
    """2500 weights of float32, and a wait of 30 ms for every batch."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = ["--link", "1gbit", "--workers", "2", "--measure"]
    assert main([*arguments, f"{script} --fast"]) == 0
    said = re.search(r"takes ([0-9.]+) ms.* averages ([0-9.]+) MB", capsys.readouterr().out)
    step, size = said.groups()
    assert float(step) == pytest.approx(30, rel=0.5)
    assert float(size) == pytest.approx(0.01, rel=0.01)


def test_a_script_that_cannot_be_measured(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text("import nowhere")
    with pytest.raises(SystemExit):
        main(["--link", "1gbit", "--workers", "2", "--measure", str(script)])
    said = capsys.readouterr().err
    assert "ended with status 1 before it had trained three blocks" in said
    assert "No module named 'nowhere'" in said
