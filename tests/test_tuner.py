"""The search for K and beta with the real KerasTuner: one process, and two real workers."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import keras_tuner as kt
import numpy as np
import pool
import pytest
import tensorflow as tf
import tuner_job
from helpers import crossentropy, dataset, examples

import tf_blockmomentum as tfbm
from tf_blockmomentum.cost import CostModel, parse_bandwidth
from tf_blockmomentum.tuner.workers import Workers

pytestmark = [
    # KerasTuner 1.4.8 itself, tensorboard (which it imports), and Keras under a dataset.
    pytest.mark.filterwarnings("ignore:currentThread:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:getName:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
]

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "tune_digits.py"
FORTH = {
    kt.RandomSearch: {"max_trials": 2},
    kt.BayesianOptimization: {"max_trials": 2, "num_initial_points": 1},
    kt.Hyperband: {"max_epochs": 2, "factor": 2},
    kt.GridSearch: {"max_trials": 2},
}


def build(hp):
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(hp.Choice("lr", [0.1, 0.2])), crossentropy())
    return model


def space(hypermodel):
    """Builds once; returns the model and the hyperparameters by name."""
    hp = kt.HyperParameters()
    model = hypermodel.build(hp)
    return model, {h.name: h for h in hp.space}


def searched(cls, hypermodel, directory, *, objective="loss", fit=None, **arguments):
    """A tuner that has searched, on two examples a batch so that a trial is short."""
    x, y = examples()
    tuner = cls(hypermodel, objective=objective, directory=str(directory), seed=1, **arguments)
    tuner.search(dataset(x, y), verbose=0, **{"epochs": 1, **(fit or {})})
    return tuner


def trials_of(tuner):
    return [tuner.oracle.trials[i] for i in tuner.oracle.start_order]


# -- the search space --------------------------------------------------------------------------


def test_k_is_searched_on_a_log2_grid_and_beta_in_the_effective_step():
    model, found = space(
        tfbm.tuner.BlockMomentumHyperModel(build, (3, 50), (0.0, 0.95), (0.01, 1.0))
    )
    assert found["sync_period"].values == [3, 6, 12, 24, 48]
    beta = np.array(found["block_momentum"].values)
    assert (beta[0], beta[-1], len(beta)) == (0.0, 0.95, 10)
    ratios = (1 - beta[:-1]) / (1 - beta[1:])  # of one effective step to the one before
    np.testing.assert_allclose(ratios, 20 ** (1 / 9), rtol=0.02)
    assert found["inner_learning_rate"].sampling == "log"
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)  # the lower bound
    assert [h for h in found if h != "lr"] == [
        "inner_learning_rate",
        "sync_period",
        "block_momentum",
    ]


def test_equal_bounds_fix_a_value():
    model, found = space(tfbm.tuner.BlockMomentumHyperModel(build, (8, 8), (0.5, 0.5)))
    assert found["sync_period"].values == [8]
    assert found["block_momentum"].values == [0.5]
    assert (model.optimizer.sync_period, model.optimizer.block_momentum) == (8, 0.5)


def test_everything_the_model_was_compiled_with_stays():
    def loss(y, prediction):  # a local function: get_compile_config could not bring it back
        return keras.ops.mean((y - prediction) ** 2, axis=-1)

    class Wrapped(kt.HyperModel):
        def build(self, hp):
            model = keras.Sequential([keras.Input([6]), keras.layers.Dense(1)])
            model.compile(
                keras.optimizers.Adam(0.25),
                loss,
                metrics=["mae"],
                weighted_metrics=["mse"],
                steps_per_execution=3,
                run_eagerly=True,
            )
            return model

        def declare_hyperparameters(self, hp):
            hp.Fixed("declared", 1)

    hypermodel = tfbm.tuner.BlockMomentumHyperModel(Wrapped(name="mine"))
    model, _ = space(hypermodel)
    assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.Adam)
    assert float(model.optimizer.learning_rate) == 0.25
    assert (model.steps_per_execution, model.run_eagerly) == (3, True)
    x = np.ones([4, 6], "float32")
    assert set(model.evaluate(x, x[:, :1], verbose=0, return_dict=True)) == {"loss", "mae", "mse"}
    hp = kt.HyperParameters()
    hypermodel.declare_hyperparameters(hp)
    assert "declared" in hp
    assert hypermodel.name == "mine"


def test_mixed_precision_is_wrapped_once():
    keras.config.set_dtype_policy("mixed_float16")
    model, _ = space(tfbm.tuner.BlockMomentumHyperModel(build))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(model.optimizer.inner_optimizer, tfbm.BlockMomentum)
    assert isinstance(model.optimizer.inner_optimizer.inner_optimizer, keras.optimizers.SGD)


# -- one process -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls",
    [
        # The others search on two workers, below.
        pytest.param(cls, marks=[pytest.mark.slow] * (cls is not kt.GridSearch))
        for cls in FORTH
    ],
    ids=lambda cls: cls.__name__,
)
def test_each_tuner_searches_in_one_process(cls, tmp_path, capsys):
    hypermodel = tfbm.tuner.BlockMomentumHyperModel(build, (1, 4))
    tuner = searched(cls, hypermodel, tmp_path, **FORTH[cls])
    trials = trials_of(tuner)
    assert len(trials) == (5 if cls is kt.Hyperband else 2)
    assert {trial.status for trial in trials} == {"COMPLETED"}
    assert all(trial.metrics.get_last_value("measured_seconds") > 0 for trial in trials)
    best = tuner.get_best_hyperparameters()[0].values
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Skipping variable loading")
        model = tuner.get_best_models()[0]
    optimizer = model.optimizer
    assert (optimizer.sync_period, optimizer.block_momentum) == (
        best["sync_period"],
        best["block_momentum"],
    )
    assert int(optimizer.iterations) >= 6  # the optimizer's state came with the weights
    tuner.results_summary(1)
    printed = capsys.readouterr().out
    assert f"sync_period: {best['sync_period']}" in printed

    again = cls(  # a search is resumed from its directory
        tfbm.tuner.BlockMomentumHyperModel(build, (1, 4)),
        objective="loss",
        directory=str(tmp_path),
        **FORTH[cls],
    )
    assert again.get_best_hyperparameters()[0].values == best


def test_a_warm_start_restores_the_optimizer_too(tmp_path):
    """Of a model that is not built either; one that is: on two workers, below."""
    began = []

    def build(hp):
        model = keras.Sequential([keras.layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), crossentropy())
        return model

    class Noting(kt.Hyperband):
        def on_epoch_begin(self, trial, model, epoch, logs=None):
            optimizer = model.optimizer
            steps = int(optimizer.iterations) if optimizer.built else 0
            velocity = [v for v in optimizer.outer_optimizer.variables if v.ndim == 2]
            moving = any(np.any(v.numpy()) for v in velocity)
            began.append(
                (trial.hyperparameters.values["tuner/initial_epoch"], epoch, steps, moving)
            )

    hypermodel = tfbm.tuner.BlockMomentumHyperModel(build, (2, 2), (0.5, 0.8))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Skipping variable loading")
        searched(Noting, hypermodel, tmp_path, max_epochs=2, factor=2)
    assert (0, 0, 0, False) in began
    warm = [b for b in began if b[0] == 1]
    assert warm == [(1, 1, 6, True)]  # six batches before; its velocity is there


def test_divergence_fails_the_trial_early(tmp_path):
    batches = []

    class Counting(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            batches.append(batch)

    def diverging(hp):
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e30), lambda y, output: keras.ops.mean(output**2))
        return model

    tuner = searched(
        kt.RandomSearch,
        tfbm.tuner.BlockMomentumHyperModel(diverging),
        tmp_path,
        fit={"callbacks": [Counting()]},
        max_trials=1,
    )
    (trial,) = trials_of(tuner)
    assert trial.status == "FAILED"
    assert "The trial diverged. " in trial.message
    assert "A smaller sync_period, block_momentum or learning rate is more stable" in trial.message
    assert len(batches) < 6


def test_a_block_training_among_the_callbacks_says_how_to_compile(tmp_path):
    seen = []

    class Wrapped(kt.HyperModel):
        def build(self, hp):
            return build(hp)

        def fit(self, hp, model, *args, **kwargs):
            seen.extend(c.jit_compile for c in kwargs["callbacks"] if hasattr(c, "jit_compile"))
            return 1.5  # an objective without training

    tuner = searched(
        kt.RandomSearch,
        tfbm.tuner.BlockMomentumHyperModel(Wrapped()),
        tmp_path,
        objective=None,
        fit={"callbacks": [tfbm.BlockTraining(jit_compile=True)]},
        max_trials=1,
    )
    assert seen == [True]
    assert tuner.oracle.get_best_trials(1)[0].score == 1.5


# -- the objective -----------------------------------------------------------------------------


def test_time_to_target_orders_trials():
    goal = tfbm.tuner.time_to_target("val_accuracy", 0.9, give_up=100)

    def value(accuracy, seconds):
        return goal.get_value({"val_accuracy": accuracy, "measured_seconds": seconds})

    assert goal.direction == "min"
    assert value(0.95, 7.0) == 7.0
    # Not reached: beyond every time that counts, and the nearer the better.
    assert 100 < value(0.85, 1.0) < value(0.5, 1.0) < value(0.0, 0.1) <= 200
    assert value(float("nan"), 1.0) == 200
    loss = tfbm.tuner.time_to_target("val_loss", 0.5)
    assert loss.get_value({"val_loss": 0.4, "measured_seconds": 3.0}) == 3.0
    assert not loss.has_value({"val_loss": 0.4})


@pytest.mark.parametrize("overlap", [False, True])
def test_predicted_seconds_are_the_cost_models(tmp_path, monkeypatch, strategy_of, overlap):
    """K=4, two replicas, 12 batches of an epoch: 12 steps and 3 boundaries an epoch."""
    if overlap:
        monkeypatch.setattr(strategy_of(2), "compression", "float16")
    hypermodel = tfbm.tuner.BlockMomentumHyperModel(build, (4, 4), (0.0, 0.0), overlap=overlap)
    goal = tfbm.tuner.time_to_target("loss", 1e-9, bandwidth="1kbit", step_seconds=2.0)
    x, y = examples(192)
    tuner = kt.RandomSearch(
        hypermodel,
        objective=goal,
        max_trials=1,
        distribution_strategy=strategy_of(2),
        directory=str(tmp_path),
    )
    tuner.search(dataset(x, y), epochs=2, verbose=0)
    (trial,) = trials_of(tuner)
    # 21 float32 weights; a ring of two sends each worker's 84 bytes once, at 125 bytes/s.
    boundary = 84 / 125
    seconds = [o.value[0] for o in trial.metrics.get_history("predicted_seconds")]
    if overlap:  # half of it, under 4 s of steps
        boundary = 0.0
    assert seconds == [pytest.approx(24 * 2.0 + 6 * boundary)]  # at the best epoch, the last
    assert trial.score > goal.give_up


def test_training_stops_at_the_target_and_when_it_has_taken_too_long(tmp_path):
    epochs = []

    class Noting(kt.RandomSearch):
        def on_epoch_end(self, trial, model, epoch, logs=None):
            epochs.append(epoch)

    hypermodel = tfbm.tuner.BlockMomentumHyperModel(build, (2, 2), (0.5, 0.5))
    for goal in (
        tfbm.tuner.time_to_target("loss", 100.0),
        tfbm.tuner.time_to_target("loss", 0.0, give_up=1e-6),
    ):
        directory = tmp_path / str(len(epochs))
        searched(Noting, hypermodel, directory, objective=goal, fit={"epochs": 9}, max_trials=1)
    assert epochs == [0, 0]


def test_cost_model_by_hand():
    cost = CostModel(0.01, 25e6, parse_bandwidth("1gbit"), latency=0.001, boundary_seconds=0.1)
    # A ring of 4: 6 messages and 6/4 of the bytes. 0.1 + 37.5e6 / 125e6 + 0.006
    assert cost.boundary(4) == pytest.approx(0.406)
    assert cost.step(8, 4) == pytest.approx(0.01 + 0.406 / 8)
    assert cost.throughput(32, 8, 4) == pytest.approx(32 * 4 / cost.step(8, 4))
    assert cost.boundary(1) == 0.1  # nobody to talk to
    # With overlap, what the 8 or 64 steps leave of the 0.306 s of messages.
    assert cost.block(8, 4, overlap=1.0) == pytest.approx(0.1 + 0.306)
    assert cost.block(64, 4, overlap=1.0) == pytest.approx(0.1 + 0.64)
    # Of half of the next block, and then the other half; of 16 of 64 steps.
    assert cost.block(8, 4, overlap=True) == pytest.approx(0.1 + 0.306 + 0.04)
    assert cost.block(64, 4, overlap=0.5) == pytest.approx(0.1 + 0.64)
    assert cost.block(64, 4, overlap=0.25) == pytest.approx(0.1 + 0.306 + 0.48)
    assert parse_bandwidth("100mbit") == parse_bandwidth("100 Mbit/s") == 12.5e6
    assert parse_bandwidth("0.5kbps".replace("bps", "bit")) == 62.5


@pytest.mark.parametrize("text", ["fast", "-1gbit", "0gbit", "1.2.3mbit", "10gb", None])
def test_a_bandwidth_that_is_none(text):
    with pytest.raises(ValueError, match=r'A bandwidth is a number and bit.*Write it as "1gbit"'):
        parse_bandwidth(text)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sync_period": (64, 1)}, r"`sync_period` must be a pair.*\(64, 1\).*lower bound first"),
        ({"sync_period": (0, 8)}, r"whole numbers of at least 1\. Received: sync_period=\(0, 8\)"),
        ({"sync_period": 8}, r"must be a pair \(lowest, highest\).*sync_period=8\. "),
        ({"sync_period": (1.0, 8.0)}, r"Received: sync_period=\(1\.0, 8\.0\)"),
        (
            {"block_momentum": (0.0, 1)},
            r"numbers in \[0, 1\)\. Received: block_momentum=\(0\.0, 1",
        ),
        ({"block_momentum": (0.9, 0.1)}, r"block_momentum=\(0\.9, 0\.1\).*lower bound first"),
        ({"inner_learning_rate": (0.0, 1.0)}, r"numbers above 0\. Received: inner_learning_rate"),
    ],
)
def test_bad_bounds(arguments, text):
    with pytest.raises(ValueError, match=text):
        tfbm.tuner.BlockMomentumHyperModel(build, **arguments)


def test_a_hypermodel_that_is_none():
    with pytest.raises(TypeError, match=r"wraps a keras_tuner\.HyperModel or.*Received: 3\."):
        tfbm.tuner.BlockMomentumHyperModel(3)


def test_models_that_cannot_be_tuned():
    def uncompiled(hp):
        return keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])

    def wrapped(hp):
        model = uncompiled(hp)
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1)), "mse")
        return model

    for bad, text in (
        (uncompiled, r"must return a compiled keras\.Model.*Received: <Seq.*Call model\.compile"),
        (lambda hp: None, r"must return a compiled keras\.Model\. Received: None"),
        (wrapped, r"Received: a model compiled with a BlockMomentum\. Compile it with the inner"),
    ):
        with pytest.raises(ValueError, match=text):
            kt.RandomSearch(tfbm.tuner.BlockMomentumHyperModel(bad), objective="loss")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("val_nonsense", 1.0),
            r"does not know whether.*time_to_target\('val_nonsense'.*direction",
        ),
        ((3, 1.0), r"Received: time_to_target\(3, direction=None\)"),
        (("val_loss", "low"), r"`target` must be a finite number\. Received: target='low'"),
        (("val_loss", math.nan), r"Received: target=nan"),
        (("val_loss", 1.0, "min", "fast"), r"A bandwidth is a number.*Received: 'fast'"),
        (("val_loss", 1.0, "min", None, 0), r"`step_seconds` must be a positive finite number"),
        (("val_loss", 1.0, "min", None, None, -1), r"`give_up`.*Received: give_up=-1"),
    ],
)
def test_bad_targets(arguments, text):
    with pytest.raises(ValueError, match=text):
        tfbm.tuner.time_to_target(*arguments)


def test_an_objective_that_no_epoch_has(tmp_path):
    with pytest.raises(
        ValueError, match=r'not among the metrics of an epoch\. Received: Objective\(name="val_los'
    ) as error:
        searched(
            kt.RandomSearch,
            tfbm.tuner.BlockMomentumHyperModel(build),
            tmp_path,
            objective="val_loss",
            max_trials=1,
        )
    assert "an epoch has loss, measured_seconds. Use one of these" in str(error.value)
    assert "give search() validation_data" in str(error.value)


def test_what_distribute_refuses(tmp_path, monkeypatch):
    tuner = kt.RandomSearch(build, objective="loss", directory=str(tmp_path))
    with pytest.raises(TypeError, match=r"takes a tuner class\. Received: <keras_tuner.*Write"):
        tfbm.tuner.distribute(tuner)
    distributed = tfbm.tuner.distribute(kt.RandomSearch)
    with pytest.raises(TypeError, match=r"needs a BlockMomentumHyperModel.*Wrap it: tfbm\.tuner"):
        distributed(build, objective="loss", directory=str(tmp_path))
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(
        ValueError, match=r"TF_CONFIG names 2 workers.*Pass distribution_strategy="
    ):
        distributed(tfbm.tuner.BlockMomentumHyperModel(build), objective="loss")


def test_several_workers_need_distribute(monkeypatch):
    hypermodel = tfbm.tuner.BlockMomentumHyperModel(build)
    model, _ = space(hypermodel)
    monkeypatch.setattr("tf_blockmomentum.tuner.search.process_count", lambda strategy: 2)
    with pytest.raises(
        ValueError, match=r"every worker search on its own.*tfbm\.tuner\.distribute"
    ):
        hypermodel.fit(kt.HyperParameters(), model)


def test_a_worker_that_has_gone_ends_the_search():
    def gone(vector):
        raise tf.errors.UnavailableError(None, None, "no route")

    workers = Workers(None)
    workers.count, workers._gather = 2, gone
    with pytest.raises(kt.errors.FatalError, match="run the same command again to go on") as lost:
        workers.exchange("anything")
    with pytest.raises(kt.errors.FatalError):  # nor is it sent to anybody
        workers.agree(lost.value)


def test_without_keras_tuner(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("tf_blockmomentum.tuner")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    monkeypatch.delattr(tfbm, "tuner", raising=False)
    with pytest.raises(ImportError, match=r"Run: pip install tf-blockmomentum\[tuner\]"):
        tfbm.tuner  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'tunr'"):
        tfbm.tunr  # type: ignore[attr-defined]  # noqa: B018


# -- what it prints and draws --------------------------------------------------------------------


def test_table_and_heat_map(tmp_path):
    class Scored(kt.HyperModel):
        def build(self, hp):
            model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            return model

        def fit(self, hp, model, *args, **kwargs):
            if hp["block_momentum"] == 0.8 and hp["sync_period"] == 2:
                raise kt.errors.FailedTrialError("a failure")
            return {"score": hp["sync_period"] + hp["block_momentum"], "other": 2.0}

    tuner = kt.GridSearch(
        tfbm.tuner.BlockMomentumHyperModel(Scored(), (1, 2), (0.6, 0.8)),
        objective=kt.Objective("score", "max"),
        directory=str(tmp_path),
    )
    with pytest.raises(ValueError, match="a search with 0 trials of which none was completed"):
        tfbm.tuner.heat_map(tuner, tmp_path / "none.png", replicas=4)
    tuner.search(verbose=0)
    lines = tfbm.tuner.results_table(tuner).splitlines()
    names = ["trial", "status", "sync_period", "block_momentum", "score", "other"]
    assert lines[0].split() == names
    # K of 1 and 2, beta of .6, .717, .8, an octave in 1/(1 - beta) from .6; the best first.
    assert len(lines) == 1 + 2 * 3
    assert lines[1].split()[1:] == ["COMPLETED", "2", "0.717", "2.717", "2"]
    assert lines[-1].split()[1:3] == ["FAILED", "2"]
    tfbm.tuner.heat_map(tuner, tmp_path / "map.png", replicas=4)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_rules():
    from tf_blockmomentum.published import published_rules

    assert published_rules(8) == {"BMUF, 1 - 1/P": 0.875, "SlowMo's table": 0.5}
    assert published_rules(2) == {"BMUF, 1 - 1/P": 0.5, "SlowMo's table (for P=4)": 0.2}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere.py:build"], r"no script to search for\. Received: 'nowhere\.py'.*SCRIPT:BUILD"),
        ([f"{EXAMPLE}:build", "--bandwidth", "1gbit"], r"Add --target, as in --metric"),
    ],
)
def test_bad_commands(arguments, text, capsys):
    from tf_blockmomentum.tuner.__main__ import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(text, " ".join(capsys.readouterr().err.split()))


# -- two real workers ----------------------------------------------------------------------------


def run(command, limit):
    """Runs a command to its end; returns its exit status and what it printed."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment.pop("TF_CONFIG", None)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # the launcher then ends its workers
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
    return process.returncode, printed


def told(printed):
    """The lines of JSON that a worker printed."""
    return [json.loads(line) for line in re.findall(r"^(\{\".*)$", printed, re.M)]


def test_two_workers_search_in_step(pair, tmp_path):
    pair.run(tuner_job.classes, tmp_path, limit=200)
    check_they_are_in_step(tmp_path, *map(told, pair.output))


def test_two_workers_fail_together(pair, tmp_path):
    pair.run(tuner_job.failures, tmp_path, limit=200)
    check_failures([told(printed) for printed in pair.output])


def check_they_are_in_step(directory, first, second):
    assert first == second  # trials, values, epochs, scores, the best, its loss: to the bit
    names = ["BayesianOptimization", "Hyperband"]  # and RandomSearch and GridSearch below
    assert [line["tuner"] for line in first if "tuner" in line] == names
    runs = [line["values"] for line in first if "run" in line]
    assert len(runs) == 2 + 5
    warm = [v for v in runs if "tuner/trial_id" in v]
    assert [v["tuner/initial_epoch"] for v in warm] == [1]
    # Six batches were trained before the warm start, so the optimizer came from worker 0.
    assert next(line["iterations"] for line in first if line.get("epoch") == 1) == 6
    assert {line["status"] for line in first if "end" in line} == {"COMPLETED"}
    # Worker 1's directory cannot be made, and nothing of its own is in worker 0's.
    names = {path.name for path in directory.rglob("*")}
    assert not any(name.startswith("workertemp") for name in names)
    assert {"oracle.json", "tuner0.json"} <= names


def check_failures(both):
    for lines in both:
        ends = {line["end"]: line for line in lines if "end" in line}
        assert {i: line["status"] for i, line in ends.items()} == {
            "0": "FAILED",
            "1": "FAILED",
            "2": "FAILED",
            "3": "FAILED",
            "4": "COMPLETED",
            "5": "FAILED",
        }
        for i, error in {
            "0": "a build's error",
            "1": "a callback's error",
            "2": "a dataset's error",
            "5": "an error after validation",
        }.items():
            message = ends[i]["message"]
            assert "The trial fails on all workers, since worker 1 raised:" in message
            assert error in message
            assert "worker 0 raised" not in message
        assert "The trial diverged" in ends["3"]["message"]
        epochs = {}
        for line in lines:
            if "run" in line:
                epochs[line["run"]] = []
                current = epochs[line["run"]]
            elif "epoch" in line:
                current.append(line["epoch"])
        # Trial 0 ends before it trains, 4 is stopped by one worker.
        assert epochs == {"0": [], "1": [0], "2": [0], "3": [0], "4": [0], "5": [0]}
    for name, kind in (("values", "run"), ("score", "end")):
        seen, other = ([line[name] for line in lines if kind in line] for lines in both)
        assert seen == other


def test_a_killed_search_goes_on_with_the_trial_that_was_cut_short(pair, tmp_path):
    with pytest.raises(pool.WorkerError, match=r"Worker 1 of 2: the process has ended: SIGKILL"):
        pair.run(tuner_job.killed, tmp_path)
    first = told(pair.output[0])
    assert (tmp_path / "killed").exists()
    assert [line["run"] for line in first if "run" in line] == ["0", "1"]
    before = [line["score"] for line in first if "end" in line]
    assert len(before) == 1

    pair.run(tuner_job.killed, tmp_path)  # by other processes
    first, second = map(told, pair.output)
    assert first == second
    assert first[0]["tuner"] == ["0", "1"]  # known on both workers
    assert [line["run"] for line in first if "run" in line] == ["1", "2"]
    last = first[-1]
    assert len(last["scores"]) == 3
    assert before[0] in last["scores"]

    # A fresh process (this one) reads the best from the directory.
    again = kt.GridSearch(
        tfbm.tuner.BlockMomentumHyperModel(build, (1, 8)),
        objective="loss",
        directory=str(tmp_path),
        project_name="GridSearch_loss",
        max_trials=3,
    )
    assert again.get_best_hyperparameters()[0].values == last["best"]
    x, y = examples()
    model = again.get_best_models()[0]
    assert model.evaluate(x, y, verbose=0) == pytest.approx(last["loss"], rel=1e-4)
    assert model.optimizer.blocks == last["blocks"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_digits_are_tuned(tmp_path):
    status, printed = run([EXAMPLE, "--trials", 1, "--seeds", 1, "--directory", tmp_path], 280)
    assert status == 0, printed[-5000:]
    found = re.search(r"^ +1 +(\d+) \((0\.9\d+)\) +(\d+) \((0\.9\d+)\) +(0\.\d+)$", printed, re.M)
    assert found, printed[-3000:]  # both reached the target; a beta above 0 with fewer samples
    assert int(found[3]) < int(found[1])
    assert (tmp_path / "heat_map.png").exists()


SCRIPT = """
import keras
from helpers import crossentropy, dataset, examples

def build(hp):
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), crossentropy())
    return model

def arguments():
    return {"x": dataset(*examples()), "epochs": 2, "shuffle": False}
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_on_two_workers(tmp_path):
    (tmp_path / "script.py").write_text(f"import sys; sys.path.append({str(HERE)!r})\n" + SCRIPT)
    command = [
        "-m", "tf_blockmomentum.tuner", f"{tmp_path}/script:build", "--data", "arguments",
        "--workers", 2, "--trials", 1, "--tuner", "random", "--metric", "loss", "--target", 0.9,
        "--bandwidth", "1gbit", "--sync-period", 4, 8, "--epochs", 1, "--directory", tmp_path,
    ]  # fmt: skip
    status, printed = run(command, 240)
    assert status == 0, printed[-5000:]
    line = r"\[worker 0\] trial 1: sync_period=[48], block_momentum=\S+; seconds_to_loss \d"
    assert re.search(line, printed)
    table = re.search(r"\[worker 0\] +trial +status +sync_period.*", printed)[0]
    assert {"measured_seconds", "predicted_seconds", "seconds_to_loss"} <= set(table.split())
    assert re.search(r"\[worker 0\] chosen: sync_period=[48], block_momentum=", printed)
    assert "BMUF, 1 - 1/P at P=2: block_momentum=0.5" in printed
    assert "[worker 1] trial" not in printed
    assert (tmp_path / "random_build" / "heat_map.png").read_bytes().startswith(b"\x89PNG")
