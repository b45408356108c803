"""The examples, run as a user runs them: real workers, a real TFDS data set, no network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(tmp_path, *command, limit=270):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.timeout(300)
def test_digits_three_ways(tmp_path):
    printed = run(
        tmp_path, EXAMPLES / "digits_three_ways.py", "--epochs", 3, "--learning-rate", 0.1,
        "--target-loss", 1.5,
    )  # fmt: skip
    assert "epoch   3 of 3" in printed
    for title in ("test accuracy", "final training loss", "samples to loss 1.5", "seconds",
                  "boundaries", "MB sent per worker"):  # fmt: skip
        assert title in printed
    results = json.loads((tmp_path / "runs" / "digits_three_ways.json").read_text())
    sync, k_avg, m_avg = results
    # 1437 training images, 2 workers with batches of 16: 44 steps an epoch.
    assert [r["boundaries"] for r in results] == [132, 18, 18]
    assert sync["bytes"] == pytest.approx(132 / 18 * m_avg["bytes"])
    assert sync["samples"] == k_avg["samples"] == m_avg["samples"] == [1408, 2816, 4224]
    for r in results:
        assert f"{r['accuracy'][-1]:.4f}" in printed
        assert r["loss"][-1] < r["loss"][0]
    assert m_avg["samples to target"] is not None
    assert (tmp_path / "runs" / "digits_three_ways.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(150)
def test_custom_loop(tmp_path):
    printed = run(
        tmp_path, "-m", "tf_blockmomentum.launch", "--workers", 2, EXAMPLES / "custom_loop.py",
        "--steps", 116, limit=140,
    )  # fmt: skip
    losses = [float(v) for v in re.findall(r"loss on this worker (\S+)", printed)]
    assert len(losses) == 6  # after 50, 100 and 116 steps, on two workers
    assert max(losses[-2:]) < 0.1
    ends = re.findall(r"\[worker (\d)\] 15 blocks; kernel (.*)", printed)  # 14 of 8, one of 4
    assert sorted(worker for worker, _ in ends) == ["0", "1"]
    assert ends[0][1] == ends[1][1]
    kernel = [float(v) for v in re.findall(r"-?\d+\.\d*", ends[0][1])]
    np.testing.assert_allclose(kernel, np.linspace(-1, 1, 10)[:3], atol=0.1)


def test_the_digits_are_shared_out_without_overlap(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import digits
    import tensorflow as tf
    from sklearn.datasets import load_digits

    builder = digits.prepare(data_dir=str(tmp_path))
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == {
        "train": 1437,
        "test": 360,
    }
    seen = []
    for pipeline in range(3):
        context = tf.distribute.InputContext(3, pipeline, 3)
        part = [image.numpy() for image, _ in digits.share(builder, "train", context)]
        assert len(part) == 479
        seen += part
    got = np.sort((np.stack(seen) * 255 / 15.9375).round().reshape(1437, -1), axis=0)
    images = load_digits().images.reshape(1797, -1)
    np.testing.assert_array_equal(got, np.sort(images[np.arange(1797) % 5 != 0], axis=0))
