"""The examples, run as a user runs them: real workers, a real TFDS data set, no network."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import run_python

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(tmp_path, *command, limit=270):
    return run_python(*command, cwd=tmp_path, limit=limit)


@pytest.mark.timeout(300)
def test_digits_three_ways(tmp_path):
    printed = run(
        tmp_path, EXAMPLES / "digits_three_ways.py", "--epochs", 2, "--learning-rate", 0.1,
        "--target-loss", 1.5,
    )  # fmt: skip
    assert "epoch   2 of 2" in printed
    for title in ("test accuracy", "final training loss", "samples to loss 1.5", "seconds",
                  "boundaries", "MB sent per worker"):  # fmt: skip
        assert title in printed
    results = json.loads((tmp_path / "runs" / "digits_three_ways.json").read_text())
    sync, k_avg, m_avg = results
    # 1437 training images, 2 workers with batches of 16: 44 steps an epoch.
    assert [r["boundaries"] for r in results] == [88, 12, 12]
    assert sync["bytes"] == pytest.approx(88 / 12 * m_avg["bytes"])
    assert sync["samples"] == k_avg["samples"] == m_avg["samples"] == [1408, 2816]
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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cifar10_resnet(tmp_path):
    """Images made by the example; TFDS, augmentation, schedule, checkpoints as for CIFAR-10."""
    printed = run(
        tmp_path, "-m", "tf_blockmomentum.launch", "--workers", 2, EXAMPLES / "cifar10_resnet.py",
        "--smoke", "--directory", "out",
    )  # fmt: skip
    assert re.findall(r"\[worker (\d)\] Epoch (\d)/5", printed) == [("0", e) for e in "12345"]
    # 576 training images, 2 workers with batches of 16: 18 steps an epoch, K=8.
    (accuracy,) = re.findall(r"test accuracy (\S+) after 15 blocks", printed)
    assert float(accuracy) > 0.3  # of chance 0.1
    log = np.genfromtxt(tmp_path / "out" / "log.csv", delimiter=",", names=True)
    assert log["loss"][-1] < 0.6 * log["loss"][0]
    assert len(list((tmp_path / "out" / "backup").glob("epoch-000005-*/worker-?-of-2.npz"))) == 2
    model = saved(tmp_path / "out" / "best.keras")
    assert model.optimizer.blocks == 3 * (1 + np.argmax(log["val_accuracy"]))
    assert model(np.zeros([2, 32, 32, 3])).shape == (2, 10)


def test_cifar10_resnet_is_the_published_one(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import cifar10_resnet

    def parameters(*arguments):
        weights = cifar10_resnet.resnet18(*arguments).trainable_weights
        return sum(int(np.prod(w.shape)) for w in weights)

    assert parameters(64, False) == 11_173_962
    # Normalised otherwise: neither stem nor shortcuts, but before each block and at the end.
    fewer = 64 + (128 + 256 + 512) + (64 + 128 + 256) - 512
    assert parameters(64, True) == 11_173_962 - 2 * fewer


def test_augmentation_crops_and_mirrors(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import cifar10_resnet

    image = np.random.default_rng(0).random([32, 32, 3]).astype("float32")
    wide = np.pad(cifar10_resnet.normalised(image), [[4, 4], [4, 4], [0, 0]])
    seen = set()
    for seed in range(12):
        got, label = cifar10_resnet.augmented((image, 7), np.arange(4) + 10 * seed)
        assert label == 7
        seen |= {
            (top, left, way)
            for top in range(9)
            for left in range(9)
            for way in (1, -1)
            if np.allclose(got, wide[top : top + 32, left : left + 32][:, ::way], atol=1e-5)
        }
    assert len(seen) > 8  # hardly any twice, and each of the 12 is one of them
    assert {way for *_, way in seen} == {1, -1}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_text_transformer_goes_on_from_its_backup(tmp_path, monkeypatch):
    """Five modules of the standard library; the second run has one epoch more to do."""
    printed = [
        run(
            tmp_path, "-m", "tf_blockmomentum.launch", "--workers", 2,
            EXAMPLES / "text_transformer.py", "--smoke", "--directory", "out", "--epochs", epochs,
            "--modules", 5, "--layers", 1, "--width", 32, limit=140,
        )
        for epochs in (2, 3)
    ]  # fmt: skip
    epochs = [re.findall(r"\[worker (\d)\] Epoch (\d/\d)", text) for text in printed]
    assert epochs == [[("0", "1/2"), ("0", "2/2")], [("0", "3/3")]]
    log = np.genfromtxt(tmp_path / "out" / "log.csv", delimiter=",", names=True)
    assert log["epoch"].tolist() == [0, 1, 2]
    assert log["loss"][1] < 0.9 * log["loss"][0]
    assert log["loss"][2] < 0.9 * log["loss"][0]

    monkeypatch.syspath_prepend(EXAMPLES)
    import tensorflow as tf
    import text_transformer

    training, held_out = text_transformer.read(5)
    per_epoch = -(-((len(training) - 1) // 64 // 64) // 5)  # blocks, with K=5
    for text, done in zip(printed, (2, 3), strict=True):
        bits, blocks = re.search(r"validation: (\S+) bits per byte; (\d+) blocks", text).groups()
        assert float(bits) == pytest.approx(log["val_loss"][:done].min() / np.log(2), abs=1e-3)
        assert int(blocks) == done * per_epoch
        assert "[worker 0] def " in text

    # The saved model is the one with that loss: on held-out text, of which no worker had all.
    x, y = text_transformer.texts(held_out, 64, tf.distribute.InputContext(1, 0, 1))
    model = saved(tmp_path / "out" / "best.keras")
    assert model.evaluate(x, y, verbose=0) == pytest.approx(log["val_loss"].min(), rel=1e-4)
    x = x[:1].astype("int32")
    changed = np.where(np.arange(64) < 40, x, 0)
    same = np.isclose(model(x), model(changed), atol=1e-5).all(axis=(0, 2))
    assert same[:40].all()  # causal: a byte does not see those after it
    assert not same[40:].any()


def saved(path):
    """A saved model as a new program loads it."""
    import keras

    import tf_blockmomentum as tfbm

    model = keras.models.load_model(path)
    assert isinstance(model.optimizer, tfbm.BlockMomentum)
    return model


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
