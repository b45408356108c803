"""BlockReport: its numbers, advice and timeline."""

import dataclasses
import json
import math
import re
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_blockmomentum as tfbm
from tf_blockmomentum.report import timeline
from tf_blockmomentum.report.__main__ import main as draw
from tf_blockmomentum.report.advice import Measured, advise
from tf_blockmomentum.report.recorder import Span
from tf_blockmomentum.strategy import worker_of

# -- advice from made-up numbers ------------------------------------------------------------------

# Two workers, K=8: 80 ms of steps and 2 ms of a boundary.
WELL = Measured(
    sync_period=8,
    boundaries=100,
    seconds_a_step=0.01,
    step_seconds=[0.01, 0.01],
    boundary_share=0.025,
    waiting_share=0.002,
    waiting_shares=[0.002, 0.002],
    passes=0.001,
    transfer=0.001,
    bytes=125e3,
    beta=0.5,
    drift=0.02,
    delta=1.0,
    velocity=1.2,
    cosine=0.3,
)
# The messages take as long as the steps.
SLOW_LINK = {"boundary_share": 0.5, "transfer": 0.08, "bytes": 10e6}


def advice(**changes):
    return advise(dataclasses.replace(WELL, **changes))


def test_nothing_is_said_where_all_is_well():
    assert advice() == []
    assert advice(boundaries=3, **SLOW_LINK) == []  # too few to tell
    # Workers that wait for each other by turns, and one that is slow and waited for by nobody.
    assert advice(waiting_share=0.1, boundary_share=0.12, waiting_shares=[0.1, 0.09]) == []
    assert advice(step_seconds=[0.01, 0.015], waiting_shares=[0.01, 0.0]) == []
    # Not known, on one worker.
    nan = math.nan
    assert advice(step_seconds=[0.01], waiting_shares=[nan], drift=nan, boundary_share=0.3) == []


def gains(sentence):
    found = re.findall(r"([^ :,]+(?: with int8)?) would be ([0-9.]+) times as fast", sentence)
    return {name: float(gain) for name, gain in found}


def test_a_slow_link():
    (sentence,) = advice(**SLOW_LINK)
    assert sentence.startswith("Boundaries take 50 % of the time: ")
    found = gains(sentence)
    # By hand: a block is 80 + 1 + 80 ms, so a step 20.1; with K=128 10.6, with a quarter of the
    # bytes 12.6.
    assert found["K=128"] == pytest.approx(20.1 / (10 + 81 / 128), abs=0.02)
    assert found['compression="int8"'] == pytest.approx(161 / (81 + 80 * 0.252), abs=0.02)
    assert 1.2 < found["overlap=True"] < 2

    (sentence,) = advice(**SLOW_LINK, compression="int8", overlap=True)
    assert set(gains(sentence)) <= {"K=16", "K=32", "K=64", "K=128"}
    _, drift = advice(**SLOW_LINK | {"drift": 0.004})
    assert drift == "The drift is 0.004, which says that K may grow at this learning rate."
    # Of an epoch of 80 steps 16 is the largest K that leaves it some blocks.
    (sentence,) = advice(**SLOW_LINK, epoch_steps=80)
    assert "K=16 would" in sentence
    (sentence,) = advice(**SLOW_LINK | {"drift": 0.004}, epoch_steps=50)
    assert "K=" not in sentence
    for sentence in advice(**SLOW_LINK | {"drift": 0.2}):
        assert "K=128" not in sentence  # they drift apart already
    # Waiting for a slow worker is not the network's.
    slow = {"boundary_share": 0.5, "waiting_share": 0.48, "waiting_shares": [0.48, 0.0]}
    (sentence,) = advice(step_seconds=[0.01, 0.016], **slow)
    assert sentence.startswith("Worker 1 is 60 % slower than the others.")


def test_a_boundary_that_nothing_makes_faster():
    changes = {
        "boundary_share": 0.5,
        "passes": 0.08,
        "transfer": 0.0,
        "sync_period": 256,
        "drift": 0.05,
    }
    (sentence,) = advice(**changes)
    assert "neither K, overlap nor compression" in sentence
    assert "Larger batches" in sentence


def test_a_slow_worker():
    changes = {"waiting_share": 0.15, "waiting_shares": [0.15, 0.15, 0.0], "boundary_share": 0.18}
    (sentence,) = advice(step_seconds=[0.01, 0.01, 0.0118], **changes)
    assert sentence.startswith(
        "Worker 2 is 18 % slower than the others. The other workers wait for worker 2 in 15 % of"
    )
    (sentence,) = advice(step_seconds=[0.01, 0.01, 0.01], **changes)
    assert "not for its local steps" in sentence


def test_drift_and_momentum():
    (sentence,) = advice(drift=0.3)
    assert sentence.startswith("The drift is 0.3: ")
    assert "Try K=4" in sentence
    (sentence,) = advice(cosine=-0.5, delta=1.0, velocity=1.2)
    assert sentence.startswith("The velocity points against the mean delta (cosine -0.50)")
    assert "beta is too large" in sentence
    assert "block_momentum=0.25" in sentence
    assert advice(cosine=-0.5, beta=None) == []
    assert advice(cosine=-0.15) == []  # less than what 1 - beta takes


# -- real runs ------------------------------------------------------------------------------------


def trained(strategy, *callbacks, beta=0.5, rate=0.1, k=4, epochs=3, sleep=0.0, **settings):
    """Fits a line, in batches of four for each worker, of which worker 1's may be slow."""
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[192, 6]).astype("float32")
    y = x @ rng.normal(size=[6, 1]).astype("float32") + rng.normal(size=[192, 1])
    worker, workers = worker_of(strategy) if strategy else (0, 1)
    data = tf.data.Dataset.from_tensor_slices((x, y.astype("float32")))
    data = data.batch(4 * workers, drop_remainder=True)

    def slow(x, y):
        def wait(x):
            time.sleep(sleep if worker == 1 else 0.0)
            return x

        x = tf.numpy_function(wait, [x], tf.float32)
        return tf.ensure_shape(x, [None, 6]), y

    data = data.map(slow) if sleep else data
    with strategy.scope() if strategy else tf.distribute.get_strategy().scope():
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(1)])
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.SGD(rate), sync_period=k, block_momentum=beta, **settings
        )
        model.compile(optimizer, "mse")
    history = model.fit(data, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model, history


def with_a_slow_worker(strategy, sleep):
    report = tfbm.BlockReport(history=True)
    _, history = trained(strategy, report, tfbm.BlockTraining(), sleep=sleep)
    return report.advice, history.history, len(report.epochs), report.epochs[-1].stepping


def test_a_worker_that_is_slow(pair):
    results = pair.run(with_a_slow_worker, 0.02)
    sentence = ""
    for advice, _, epochs, stepping in reversed(results):  # the chief's last
        assert epochs == 3
        (sentence,) = [s for s in advice if s.startswith("Worker")]
        assert re.match(r"Worker 1 is [0-9.]+ times as slow as the others\.", sentence)
        assert stepping[1] - stepping[0] == pytest.approx(0.02, rel=0.5)
    lines = pair.output[0].splitlines()
    line = (
        r"6 boundaries, \d+ B sent, \d+ % of the time in boundaries "
        r"\(\d+ % waiting for worker 1\), drift 0.\d+$"
    )
    assert all(re.match(line, x) for x in lines[:3]), pair.output[0]
    assert lines[3].split() == [
        "epoch",
        "blocks",
        "K",
        "step,",
        "ms",
        "boundaries",
        "waiting",
        "sent",
        "drift",
        "cosine",
    ]
    assert [x.split()[:3] for x in lines[4:7]] == [[str(i), "6", "4"] for i in (1, 2, 3)]
    assert sentence in lines[7:]
    assert "boundaries" not in pair.output[1]  # the chief alone
    logs = results[0][1]
    assert logs["block_boundaries"] == [6, 6, 6]
    assert logs["block_sync_period"] == [4, 4, 4]
    # Worker 0 waits for 80 ms of every 80 and some; worker 1 for nobody.
    assert min(logs["block_waiting_share"]) > 0.5
    assert max(results[1][1]["block_waiting_share"]) < 0.5


def with_much_momentum(strategy, beta):
    report = tfbm.BlockReport()
    trained(strategy, tfbm.BlockTraining(), report, beta=beta, epochs=3, k=2, rate=0.2)
    return report.advice, report.epochs[-1].cosine


def test_momentum_that_is_too_large(pair):
    for advice, cosine in pair.run(with_much_momentum, 0.97):
        assert any("beta is too large" in sentence for sentence in advice), (advice, cosine)
    for advice, cosine in pair.run(with_much_momentum, 0.1):
        assert not any("beta" in sentence for sentence in advice), (advice, cosine)


def weights_with(strategy, reports, overlap):
    callbacks = [tfbm.BlockTraining(), *([tfbm.BlockReport()] if reports else [])]
    model, _ = trained(strategy, *callbacks, overlap=overlap, epochs=1)
    return [*model.get_weights(), *(v.numpy() for v in model.optimizer.shared_state)]


@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_report_changes_nothing(pair, overlap):
    with_it, without = (
        pair.run(weights_with, True, overlap),
        pair.run(weights_with, False, overlap),
    )
    for one, other in zip(with_it[0], without[0], strict=True):
        np.testing.assert_array_equal(one, other)


class Anchors(keras.callbacks.Callback):
    """The anchor after every step."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        anchors = [a.numpy().ravel() for a in self.model.optimizer.anchors]
        self.seen.append(np.concatenate(anchors))


def test_norms_and_their_cosine(tmp_path):
    """Against NumPy: with K=1 the anchor's steps are the velocities."""
    anchors, log_dir = Anchors(), tmp_path / "logs"
    report = tfbm.BlockReport(log_dir=log_dir, history=True)
    _, history = trained(None, anchors, tfbm.BlockTraining(), report, k=1, beta=0.5, epochs=2)
    velocities = np.diff(anchors.seen, axis=0)
    deltas = velocities[1:] - 0.5 * velocities[:-1]
    found = read_scalars(log_dir)
    norm = np.linalg.norm
    for name, values in (
        ("delta_norm", norm(deltas, axis=1)),
        ("velocity_norm", norm(velocities[:-1], axis=1)),
        (
            "velocity_cosine",
            (deltas * velocities[:-1]).sum(1)
            / norm(deltas, axis=1)
            / norm(velocities[:-1], axis=1),
        ),
    ):
        np.testing.assert_allclose(found[f"block/{name}"][2:], values, rtol=2e-3, atol=1e-4)
    assert len(found["block/K"]) == 96
    assert found["block/boundary_seconds"] == pytest.approx(
        np.add(found["block/boundary_seconds/passes"], found["block/boundary_seconds/transfer"])
        + found["block/boundary_seconds/waiting"]
    )
    cosines = np.reshape(found["block/velocity_cosine"], [2, 48])[1]
    assert history.history["block_velocity_cosine"][1] == pytest.approx(cosines.mean(), rel=1e-3)


def read_scalars(folder):
    """By tag, in the order of steps."""
    found = {}
    for path in sorted(map(str, folder.iterdir())):
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert all([s for s, _ in rows] == sorted(s for s, _ in rows) for rows in found.values())
    return {tag: [value for _, value in rows] for tag, rows in found.items()}


def drifts(strategy):
    """As the report has it, and as a schedule that follows it is told."""
    training, report = tfbm.BlockTraining(), tfbm.BlockReport(history=True)
    seen = []

    class Follow(tfbm.schedules.SyncPeriodSchedule):
        measures_drift = True

        def __call__(self, step, adapted):
            return 4

        def adapt(self, adapted, period, drift):
            seen.append(drift)
            return adapted

    _, history = trained(strategy, training, report, k=Follow(), epochs=1)
    return history.history["block_drift"], seen, training.drift


def test_the_drift(pair):
    for (drift,), seen, last in pair.run(drifts):
        assert last > 0
        assert len(seen) == 6
        assert drift == pytest.approx(np.mean(seen), rel=1e-4)


# -- the timeline ---------------------------------------------------------------------------------


def with_a_timeline(strategy, path, overlap):
    report = tfbm.BlockReport(timeline=path)
    trained(strategy, report, tfbm.BlockTraining(), overlap=overlap, epochs=2)


def test_a_timeline_of_all_workers(pair, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("plain.json", "overlap.json")]
    for path, overlap in zip(paths, (False, True), strict=True):
        pair.run(with_a_timeline, path, overlap)
        with open(path, encoding="utf-8") as file:
            events = json.load(file)
        names = {(e["pid"], e["name"]) for e in events if e["ph"] == "X"}
        kinds = {"local steps", "leave", "under way", "land", "wait"}
        assert {(w, kind) for w in (0, 1) for kind in kinds} <= names
        flights = [e for e in events if e["name"] == "under way"]
        ends = {w: {e["args"]["block"]: e["ts"] + e["dur"] for e in flights if e["pid"] == w}
                for w in (0, 1)}  # fmt: skip
        assert set(ends[0]) == set(ends[1]) == set(range(1, 13))
        apart = [abs(ends[0][b] - ends[1][b]) for b in ends[0]]
        assert np.median(apart) < 20e3  # us: the clocks are aligned there
    target = str(tmp_path / "both.png")
    assert draw([*paths, "--title", "a", "--title", "b", "--output", target]) == 0
    with open(target, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert target in capsys.readouterr().out
    assert draw([paths[0]]) == 0
    assert (tmp_path / "plain.png").exists()


def test_clocks_are_aligned_by_the_boundaries(tmp_path):
    """Worker 1's clock is 1000 s ahead; a run that failed in between can be read."""
    workers = [
        timeline.encode(
            [Span("steps", ahead + b, ahead + b + 0.5, b) for b in range(3)],
            [(b, ahead + b + 0.6 + 0.001 * worker * (b == 1)) for b in range(3)],
        )
        for worker, ahead in enumerate((5.0, 1005.0))
    ]
    path = tmp_path / "trace.json"
    trace = timeline.Trace(str(path))
    trace.add(workers)
    for complete in (False, True):
        found = timeline.read(str(path))
        assert [(e["pid"], e["ts"], e["dur"]) for e in found] == [
            (worker, 1e6 * b, 0.5e6) for worker in (0, 1) for b in range(3)
        ]
        if not complete:
            trace.close()
    json.loads(path.read_text())


# -- what is wrong is said ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"log_dir": 3}, TypeError, "`log_dir` must be a folder's path, or None. Received: log_d"),
        ({"timeline": ""}, TypeError, "`timeline` must be a file's path, or None. Received: tim"),
        ({"timeline": "/"}, ValueError, "and a folder has this name"),
        ({"timeline": "nowhere/t.json"}, ValueError, "and there is no folder 'nowhere'"),
        ({"history": 1}, TypeError, "`history` must be True or False. Received: history=1"),
    ],
)
def test_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        tfbm.BlockReport(**arguments)


def test_without_blocks_there_is_nothing_to_report():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    x, y = np.ones([8, 2]), np.ones([8, 1])
    for optimizer in ("sgd", tfbm.BlockMomentum(keras.optimizers.SGD(0.1))):
        model.compile(optimizer, "mse")
        with pytest.raises(RuntimeError, match=r"Received: a fit without it. Give both: fit\("):
            model.fit(x, y, verbose=0, callbacks=[tfbm.BlockReport()])
    with pytest.raises(ValueError, match=r"Received: ChiefOnly\(BlockReport\(...\)\)"):
        tfbm.ChiefOnly(tfbm.BlockReport())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{folder}/none.json"], "No such file or directory: "),
        (["{folder}/other.json"], "This is no timeline, or an empty one. Received: "),
        (["{folder}/other.json", "--title", "a", "--title", "b"], "Received: 2 for 1 traces"),
        (["{folder}/good.json", "--seconds", "0"], "--seconds must be above 0. Received: 0"),
        (["{folder}/good.json", "--begin", "-1"], "--begin must be at least 0. Received: -1"),
        (["{folder}/good.json", "--begin", "9"], "Its last event ends at 0.5 s"),
        (["{folder}/good.json", "--output", "{folder}/x.odd"], "A picture cannot be written to"),
    ],
)
def test_the_command_that_draws(tmp_path, capsys, arguments, text):
    (tmp_path / "other.json").write_text('{"a": [1]}')
    trace = timeline.Trace(str(tmp_path / "good.json"))
    trace.add([timeline.encode([Span("steps", 1.0, 1.5, 1)], [(1, 2.0)])])
    trace.close()
    with pytest.raises(SystemExit) as error:
        draw([argument.format(folder=tmp_path) for argument in arguments])
    assert error.value.code == 2
    assert text in capsys.readouterr().err
