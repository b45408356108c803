"""Overlap: where the next block starts, and when the mean of the last one lands."""

import math

import keras
import numpy as np
import programs
import pytest
import reference
import tensorflow as tf
from helpers import replica_values, scope
from test_oracles import close, data, start, train
from test_workers import workers  # noqa: F401

import tf_blockmomentum as tfbm
from tf_blockmomentum.boundary import compiling

slow = pytest.mark.slow


def tau_of(overlap):
    return lambda period: math.ceil(overlap * period)


def test_the_general_form_at_1_is_the_recursion_of_a_whole_block():
    """Both oracles, whose loops are written apart."""
    batches, _ = data(28, 3)
    arguments = start(), batches * 2, reference.softmax_gradients, 0.2
    outer = reference.block_momentum(0.5, 0.7, nesterov=True)
    whole = reference.overlapped_m_avg(*arguments, 4, 0.5, 0.7, nesterov=True, epoch_steps=28)
    seen, lengths, _ = reference.overlapped(
        *arguments, reference.Constant(4), tau_of(1.0), outer, epoch_steps=28
    )
    assert lengths == [4] * 14
    for block, want in enumerate(whole):
        for j in range(3):
            close(seen[4 * block + 3][j], want[j], 1e-12)


def compare(strategy, replicas, overlap, steps_per_execution, jit, block, **oracle):
    """Two epochs of 26 steps, every replica after every step; what is in flight lands at the end
    of each. Returns the model and the lengths of the blocks."""
    batches, dataset = data(26, replicas)
    recorder, model = train(
        strategy, dataset, lambda: keras.optimizers.SGD(0.2), start(), epochs=2,
        steps_per_execution=steps_per_execution, jit=jit, overlap=overlap, **block,
    )  # fmt: skip
    seen, lengths, _ = reference.overlapped(
        start(), batches * 2, reference.softmax_gradients, 0.2, tau_of=tau_of(overlap),
        epoch_steps=26, **oracle,
    )  # fmt: skip
    assert model.optimizer.blocks == len(lengths)
    executions = math.ceil(26 / steps_per_execution)
    assert len(recorder.steps) == 2 * executions
    for i, replica_weights in enumerate(recorder.steps):
        epoch, n = divmod(i, executions)
        want = seen[26 * epoch + min((n + 1) * steps_per_execution, 26) - 1]
        for j in range(replicas):
            close(replica_weights[j], want[j], 3e-6)
    for j in range(replicas):
        close(recorder.steps[-1][j], recorder.steps[-1][0], 0)
    return model, lengths


@pytest.mark.parametrize(
    ("jit", "replicas", "overlap", "outer", "steps_per_execution"),
    [
        pytest.param(jit, *case, marks=[slow] * (jit != enough))
        for enough, *case in (
            (False, 1, 0.5, {"beta": 0.7}, 1),
            (True, 2, 0.25, {"beta": 0.6}, 3),
            (None, 2, 1.0, {"beta": 0.0}, 1),
            (None, 3, 0.5, {"beta": 0.5, "nesterov": True, "zeta": 0.7}, 1),
            (False, 3, 1.0, {"beta": 0.5, "nesterov": True, "zeta": 0.7}, 5),
        )
        for jit in (False, True)
    ],
)
def test_every_replica_at_every_step(
    strategy_of, replicas, overlap, outer, steps_per_execution, jit
):
    """K=4, and a shorter block at the end of each epoch."""
    names = {"beta": "block_momentum", "zeta": "block_learning_rate", "nesterov": "nesterov"}
    compare(
        strategy_of(replicas), replicas, overlap, steps_per_execution, jit,
        {"sync_period": 4, **{names[name]: value for name, value in outer.items()}},
        schedule=reference.Constant(4), outer=reference.block_momentum(**outer),
    )  # fmt: skip


def test_a_large_model_compiles_its_large_variables_only(strategy_of, monkeypatch):
    """The kernel is large here, and the bias is not."""
    kernel, bias = start()
    monkeypatch.setattr(compiling, "_LARGE", kernel.size)
    monkeypatch.setattr(compiling, "_LARGE_ALONE", bias.size + 1)
    compare(
        strategy_of(2), 2, 0.5, 1, False, {"sync_period": 4, "block_momentum": 0.6},
        schedule=reference.Constant(4), outer=reference.block_momentum(0.6),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "overlap", "jit", "outer"),
    [
        pytest.param(pool, *case, marks=[slow] * (pool != enough))
        for enough, *case in (
            (None, 0.25, False, {"block_momentum": 0.5}),
            (
                "triple", 0.5, True,
                {"block_momentum": 0.9, "nesterov": True, "block_learning_rate": 0.7},
            ),
            ("pair", 1.0, False, {"block_momentum": 0.5}),
        )
        for pool in ("pair", "triple")
    ],
    indirect=["workers"],
)  # fmt: skip
def test_every_worker_at_every_step(workers, overlap, jit, outer):  # noqa: F811
    """Real ones, K=4, in epochs of 7 steps."""
    count = workers.workers
    x, y = programs.oracle_data(count, 7, seed=3)
    saw = workers.run(programs.oracle, x, y, jit, {"sync_period": 4, "overlap": overlap, **outer})
    seen, lengths, _ = reference.overlapped(
        [saw[0]["start_kernel"], saw[0]["start_bias"]],
        [[(x[s, j], y[s, j]) for j in range(count)] for s in range(7)] * 2,
        reference.softmax_gradients, 0.1, reference.Constant(4), tau_of(overlap),
        reference.block_momentum(*(outer.get(name, default) for name, default in DEFAULTS)),
        epoch_steps=7,
    )  # fmt: skip
    for j, own in enumerate(saw):
        assert own["blocks"] == len(lengths) == 4
        for s in range(14):
            close([own["kernels"][s], own["biases"][s]], seen[s][j], 3e-6)
        np.testing.assert_array_equal(own["kernels"][6::7], saw[0]["kernels"][6::7])
        if j:
            assert not np.array_equal(own["kernels"][5], saw[0]["kernels"][5])


DEFAULTS = [("block_momentum", 0.5), ("block_learning_rate", 1.0), ("nesterov", False)]


def heavy_ball(anchor, delta, velocity):
    velocity = 0.6 * velocity + 0.8 * delta
    return anchor + velocity, velocity


@pytest.mark.parametrize(("overlap", "jit"), [(0.5, False), pytest.param(1.0, True, marks=slow)])
def test_with_an_outer_optimizer_a_replica_starts_from_where_it_is(strategy_of, overlap, jit):
    strategy = strategy_of(2)
    with scope(strategy):
        outer = keras.optimizers.SGD(0.8, momentum=0.6)
    compare(
        strategy, 2, overlap, 1, jit, {"sync_period": 4, "outer_optimizer": outer},
        schedule=reference.Constant(4), outer=heavy_ball, foreseen=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "overlap", "want"),
    [
        # The fourth block begins at step 11.
        (tfbm.schedules.PiecewisePeriod([10], [4, 7]), 0.5, [4, 4, 4, 7, 7, 7, 7, 7, 5]),
        (tfbm.schedules.DriftPeriod(target=0.15, initial=2, maximum=8), 0.5, None),
        pytest.param(
            *(tfbm.schedules.DriftPeriod(target=0.15, initial=2, maximum=8), 1.0, None), marks=slow
        ),
    ],
    ids=["piecewise", "drift", "drift, a whole block late"],
)
def test_a_schedule(strategy_of, schedule, overlap, want):
    model, lengths = compare(
        strategy_of(2), 2, overlap, 1, False, {"sync_period": schedule, "block_momentum": 0.5},
        schedule=schedule, outer=reference.block_momentum(0.5),
    )  # fmt: skip
    assert int(model.optimizer._global_step) == 52
    assert len(set(lengths)) > 2 if want is None else lengths == want


def test_a_synchronous_warm_start_is_synchronous(strategy_of):
    schedule = tfbm.schedules.PostLocal(6, 5)
    _, lengths = compare(
        strategy_of(2), 2, 0.5, 1, False, {"sync_period": schedule, "block_momentum": 0.5},
        schedule=schedule, outer=reference.block_momentum(0.5), synchronous_until=6,
    )  # fmt: skip
    assert lengths[:7] == [1] * 6 + [5]


class Powers:
    """A weight for each step of each replica, and one for all: step s of replica j moves its own
    by 2 (a power of two, so nothing is rounded), and the last one by s + 1 + 100 j."""

    def __init__(self, strategy, steps, **settings):
        self.replicas = strategy.num_replicas_in_sync
        with strategy.scope():
            self.w = keras.Variable(np.zeros([steps * self.replicas + 1], "float32"))
            self.optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(1.0), **settings)
            self.optimizer.build([self.w])
        size = steps * self.replicas + 1
        self.slopes = np.zeros([steps, self.replicas, size], "float32")
        for s in range(steps):
            for j in range(self.replicas):
                self.slopes[s, j, s * self.replicas + j] = -2
                self.slopes[s, j, -1] = -(s + 1 + 100 * j)
        data = tf.data.Dataset.from_tensor_slices(self.slopes.reshape(-1, size))
        data = data.batch(self.replicas)
        self.iterator = iter(strategy.experimental_distribute_dataset(data))
        self.loop = tfbm.BlockLoop(self.step, self.optimizer, strategy)

    def step(self, slope):
        self.optimizer.apply([slope[0]], [self.w])


@pytest.mark.parametrize(
    ("overlap", "compression"),
    [(0.125, None), (0.5, "float16"), pytest.param(1.0, None, marks=slow)],
)
def test_every_local_step_counts_exactly_once(strategy_of, monkeypatch, overlap, compression):
    """Movements that do not depend on the weights: with beta=0 the anchor ends at the mean of
    all that was ever moved, to the bit, wherever calls, blocks and flushes cut it."""
    strategy = strategy_of(2)
    monkeypatch.setattr(strategy, "compression", compression)
    task = Powers(strategy, 43, sync_period=8, block_momentum=0, overlap=overlap)
    done = 0
    for steps, flush in [(3, 0), (1, 0), (7, 0), (9, 1), (2, 1), (17, 0), (1, 0), (3, 1)]:
        task.loop.run(task.iterator, steps)
        done += steps
        if flush:
            task.loop.flush()
            want = -task.slopes[:done].mean(1).sum(0)
            for own in replica_values(task.w):
                np.testing.assert_array_equal(own, want)
    assert done == 43
    assert set(replica_values(task.w)[0][:-1]) == {1.0}


@pytest.mark.parametrize(
    ("overlap", "settings"),
    [
        pytest.param(0.125, {}, marks=slow),
        pytest.param(0.5, {"nesterov": True}, marks=slow),
        (1.0, {}),
    ],
)
def test_and_belongs_to_the_block_in_which_it_was_taken(strategy_of, overlap, settings):
    """With momentum the anchors are then those without overlap, whenever they land."""
    anchors = {}
    for given in (False, overlap):
        task = Powers(
            strategy_of(2), 24, sync_period=8, block_momentum=0.5, overlap=given, **settings
        )
        seen, blocks = [], 0
        for _ in range(24):
            task.loop.run(task.iterator, 1)
            if task.optimizer.blocks > blocks:
                blocks = task.optimizer.blocks
                seen.append(task.optimizer.anchors[0].numpy())
        task.loop.flush()
        seen += [task.optimizer.anchors[0].numpy()] * (given is not False)
        anchors[given] = seen
    assert len(anchors[overlap]) == 3
    np.testing.assert_array_equal(anchors[overlap], anchors[False])


@pytest.mark.parametrize("overlap", [0.25, pytest.param(1.0, marks=slow)])
def test_statistics_land_likewise(strategy_of, overlap):
    """Two replicas, K=4, a running mean s <- (s + x) / 2 of what each sees."""
    strategy, x = strategy_of(2), np.random.default_rng(0).integers(-8, 8, [18, 2]).astype("f4")
    with scope(strategy):
        w = keras.Variable([0.0])
        running = keras.Variable([0.0], trainable=False)
        optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(1.0), 4, overlap=overlap)
        optimizer.build([w])

    def step(x):
        optimizer.apply([x], [w])
        running.assign((running + x) / 2)

    loop = tfbm.BlockLoop(step, optimizer, strategy, averaged_variables=[running])
    dataset = tf.data.Dataset.from_tensor_slices(x.ravel()).batch(2)
    iterator = iter(strategy.experimental_distribute_dataset(dataset))
    own, sent, tau = np.zeros(2), None, math.ceil(overlap * 4)
    for n in range(18):
        loop.run(iterator, 1)
        own = (own + x[n]) / 2
        if sent is not None and n % 4 == tau - 1:
            own, sent = sent.mean() + (own - sent), None
        if n % 4 == 3:
            sent = own
        np.testing.assert_allclose(np.ravel(replica_values(running)), own, rtol=1e-6, atol=1e-6)
    loop.flush()
    np.testing.assert_allclose(np.ravel(replica_values(running)), [own.mean()] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        "block_momentum",
        pytest.param("block_learning_rate", marks=slow),
        pytest.param("nesterov", marks=slow),
    ],
)
def test_what_is_set_in_flight_is_for_the_outer_step_to_come(strategy_of, setting):
    """Where the replicas have begun stays where it was: no movement comes of it."""
    values = {"block_momentum": 0.25, "block_learning_rate": 0.5, "nesterov": True}
    anchors = []
    for overlap in (False, 0.5):
        task = Powers(strategy_of(2), 12, sync_period=4, block_momentum=0.5, overlap=overlap)
        # Before the outer step of the second block, which with overlap is under way.
        before = 9 if overlap else 7
        task.loop.run(task.iterator, before)
        setattr(task.optimizer, setting, values[setting])
        task.loop.run(task.iterator, 12 - before)
        task.loop.flush()
        anchors.append(task.w.numpy())
    np.testing.assert_array_equal(anchors[1], anchors[0])


def test_nothing_is_traced_anew_and_the_rest_of_a_block_has_nothing_under_way(strategy_of):
    task = Powers(strategy_of(2), 64, sync_period=8, overlap=0.25)
    task.loop.run(task.iterator, 24)
    steps, ending = task.loop._local_steps, task.loop.ending
    functions = [steps._from_iterator, steps._step, ending._land_within, ending._begin]
    traces = [f.experimental_get_tracing_count() for f in functions]
    under_way = []
    for _ in range(8):
        task.loop.run(task.iterator, 1)
        under_way.append(ending.flight.under_way)
    task.loop.run(task.iterator, 32)
    assert under_way == [True] + [False] * 6 + [True]
    assert traces == [f.experimental_get_tracing_count() for f in functions]
    assert traces[2] == 1
