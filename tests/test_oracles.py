"""The ladder: trajectories against independent references, other data on every replica."""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from helpers import replica_values, scope

import tf_blockmomentum as tfbm

FEATURES, CLASSES, BATCH = 5, 3, 4
both = pytest.mark.parametrize("jit", [False, True], ids=["eager_ops", "xla"])


def data(steps, replicas, seed=0):
    """`batches[step][replica] = (x, y)` and the same as one dataset of global batches."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[steps * replicas * BATCH, FEATURES]).astype("float32")
    y = rng.integers(CLASSES, size=len(x))
    share = iter(range(0, len(x), BATCH))
    batches = [
        [(x[i : i + BATCH], y[i : i + BATCH]) for i in (next(share) for _ in range(replicas))]
        for _ in range(steps)
    ]
    return batches, tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH * replicas)


class Recorder(keras.callbacks.Callback):
    """Keeps every replica's weights after each step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        local = [replica_values(w) for w in self.model.trainable_variables]
        self.steps.append([list(replica) for replica in zip(*local, strict=True)])


def train(strategy, dataset, inner, weights, epochs=1, steps_per_execution=1, jit=False, **block):
    """Trains a linear classifier by fit; returns the recorder and the model."""
    with scope(strategy):
        model = keras.Sequential([keras.Input([FEATURES]), keras.layers.Dense(CLASSES)])
        model.compile(
            tfbm.BlockMomentum(inner(), **block),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=steps_per_execution,
        )
    model.set_weights(weights)
    recorder = Recorder()
    model.fit(
        dataset,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[tfbm.BlockTraining(jit_compile=jit), recorder],
    )
    return recorder, model


def start(seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=[FEATURES, CLASSES]).astype("float32"), np.zeros(CLASSES, "float32")]


def close(got, want, tolerance=1e-6):
    """The model's weights as one vector: the largest error relative to the largest weight."""
    got, want = (np.concatenate([np.ravel(w) for w in ws]) for ws in (got, want))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), (got, want)


@both
def test_integer_trajectory_worked_by_hand(strategy_of, jit):
    """Two replicas, K=2, beta=1/2, one weight w, loss (constant slope) -> integers.

    Replica 0 has slope -2 (w grows by 2 a step), replica 1 slope -6, learning rate 1.
      anchor 0: locals after 2 steps: 4, 12; d = 8;  v = 8;            anchor = 8
      anchor 8: locals: 12, 20;              d = 8;  v = 4 + 8 = 12;   anchor = 20
      anchor 20: one step, then flush: 22, 26; d = 4; v = 6 + 4 = 10;  anchor = 30
    """
    strategy = strategy_of(2)
    with strategy.scope():
        w = keras.Variable([0.0])
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.SGD(1.0), sync_period=2, block_momentum=0.5
        )
        optimizer.build([w])

    def step(slope):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(slope * w) / strategy.num_replicas_in_sync
        optimizer.apply([tape.gradient(loss, w.value)], [w])

    loop = tfbm.BlockLoop(step, optimizer, strategy, jit_compile=jit)
    slopes = tf.data.Dataset.from_tensor_slices([-2.0, -6.0] * 5).batch(2)
    iterator = iter(strategy.experimental_distribute_dataset(slopes))
    seen = []
    for steps in (1, 1, 1, 1, 1):
        loop.run(iterator, steps)
        seen.append([float(v[0]) for v in replica_values(w)])
    loop.flush()
    seen.append([float(v[0]) for v in replica_values(w)])
    assert seen == [[2, 6], [8, 8], [10, 14], [20, 20], [22, 26], [30, 30]]
    loop.flush()  # nothing has begun: nothing moves
    assert [float(v[0]) for v in replica_values(w)] == [30, 30]


@pytest.mark.parametrize(
    ("inner", "jit"),
    [
        (keras.optimizers.SGD, False),
        (keras.optimizers.Adam, True),
        pytest.param(keras.optimizers.SGD, True, marks=pytest.mark.slow),
        pytest.param(keras.optimizers.Adam, False, marks=pytest.mark.slow),
    ],
)
def test_one_replica_without_momentum_is_the_inner_optimizer(inner, jit):
    _, dataset = data(12, 1)
    _, model = train(
        None, dataset, lambda: inner(0.05), start(), sync_period=4, block_momentum=0, jit=jit
    )
    plain = keras.Sequential([keras.Input([FEATURES]), keras.layers.Dense(CLASSES)])
    plain.compile(inner(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    plain.set_weights(start())
    plain.fit(dataset, verbose=0)
    close(model.get_weights(), plain.get_weights(), 2e-6)


@pytest.mark.parametrize(
    ("momentum", "jit"),
    [
        (0.0, False),
        (0.9, True),
        pytest.param(0.0, True, marks=pytest.mark.slow),
        pytest.param(0.9, False, marks=pytest.mark.slow),
    ],
)
def test_period_one_is_synchronous_sgd(strategy_of, momentum, jit):
    """K=1: block momentum m around plain SGD is heavy-ball SGD on the global batch."""
    _, dataset = data(12, 3)
    _, model = train(
        strategy_of(3),
        dataset,
        lambda: keras.optimizers.SGD(0.1),
        start(),
        sync_period=1,
        block_momentum=momentum,
        jit=jit,
    )
    plain = keras.Sequential([keras.Input([FEATURES]), keras.layers.Dense(CLASSES)])
    plain.compile(
        keras.optimizers.SGD(0.1, momentum=momentum),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    plain.set_weights(start())
    plain.fit(dataset, verbose=0)
    close(model.get_weights(), plain.get_weights(), 2e-6)


def test_one_replica_with_a_block_learning_rate_is_lookahead():
    """Zhang et al. 2019, Algorithm 1: slow weights move by alpha towards the fast ones."""
    batches, dataset = data(12, 1)
    recorder, _ = train(
        None,
        dataset,
        lambda: keras.optimizers.SGD(0.3),
        start(),
        sync_period=4,
        block_momentum=0,
        block_learning_rate=0.5,
    )
    slow = [w.astype("float64") for w in start()]
    for inner_loop in range(3):
        fast = [w.copy() for w in slow]
        for ((x, y),) in batches[4 * inner_loop : 4 * inner_loop + 4]:
            _, grads = reference.softmax_gradients(fast, x, y)
            fast = [w - 0.3 * g for w, g in zip(fast, grads, strict=True)]
        slow = [s + 0.5 * (f - s) for s, f in zip(slow, fast, strict=True)]
        close(recorder.steps[4 * inner_loop + 3][0], slow)


def test_block_learning_rate_zero_freezes_the_anchor(strategy_of):
    _, dataset = data(8, 2)
    recorder, model = train(
        strategy_of(2),
        dataset,
        lambda: keras.optimizers.SGD(0.1),
        start(),
        sync_period=4,
        block_learning_rate=0.0,
    )
    for got, want in zip(model.get_weights(), start(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not np.array_equal(recorder.steps[2][0][0], start()[0])


@pytest.mark.parametrize(
    ("case", "jit"),
    [
        pytest.param(case, jit, marks=[pytest.mark.slow] * ((case, jit) != (0, True)))
        for case in range(6)
        for jit in (False, True)
    ],
)
def test_fuzz_against_numpy_m_avg(strategy_of, case, jit):
    """Random settings; weights compared at every boundary, replicas before and after it."""
    rng = np.random.default_rng(case)
    replicas = int(rng.integers(1, 5))
    steps, epochs = int(rng.integers(5, 14)), int(rng.integers(1, 3))
    settings = {
        "sync_period": int(rng.integers(1, 8)),
        "block_momentum": float(rng.choice([0.0, 0.5, 0.9])),
        "block_learning_rate": float(rng.choice([1.0, 0.7])),
        "nesterov": bool(rng.integers(2)),
    }
    inner_momentum = float(rng.choice([0.0, 0.9]))
    batches, dataset = data(steps, replicas, seed=case)
    boundaries, before = reference.m_avg(
        start(),
        batches * epochs,
        reference.softmax_gradients,
        learning_rate=0.1,
        inner_momentum=inner_momentum,
        epoch_steps=steps,
        **settings,
    )
    # In steps of one, so that the recorder sees every boundary; the last one alone otherwise.
    spe = int(rng.choice([1, 3]))
    recorder, model = train(
        strategy_of(replicas),
        dataset,
        lambda: keras.optimizers.SGD(0.1, momentum=inner_momentum),
        start(),
        epochs=epochs,
        steps_per_execution=spe,
        jit=jit,
        **settings,
    )
    assert model.optimizer.blocks == len(boundaries)
    close(model.get_weights(), boundaries[-1])
    if spe > 1:
        return
    ends, position = [], 0
    for step in range(1, steps * epochs + 1):
        position += 1
        if position == settings["sync_period"] or step % steps == 0:
            ends.append(step)
            position = 0
    for end, want, want_before in zip(ends, boundaries, before, strict=True):
        at_boundary = recorder.steps[end - 1]
        for replica in at_boundary:
            close(replica, want)
            for a, b in zip(replica, at_boundary[0], strict=True):
                np.testing.assert_array_equal(a, b)
        if end - 1 not in ends and end > 1:
            earlier = recorder.steps[end - 2]
            assert len(want_before) == len(earlier) == replicas
            for j in range(1, replicas):
                assert not np.array_equal(earlier[0][0], earlier[j][0])


def test_batch_norm_statistics_are_averaged_and_dropout_masks_differ(strategy_of):
    strategy = strategy_of(2)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([FEATURES]),
                keras.layers.BatchNormalization(momentum=0.5),
                keras.layers.Dropout(0.5, seed=3),
                keras.layers.Dense(CLASSES),
            ]
        )
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=2), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=[6 * 8, FEATURES]).astype("float32")
    x[::8] += 5  # the first replica's share has another mean
    y = rng.normal(size=[len(x), CLASSES]).astype("float32")
    seen = []

    class Statistics(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(replica_values(self.model.layers[0].moving_mean))

    model.fit(
        x,
        y,
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[tfbm.BlockTraining(), Statistics()],
    )
    want = np.zeros([2, FEATURES])
    for step in range(6):
        for j in range(2):
            share = x[8 * step + 4 * j : 8 * step + 4 * j + 4]
            want[j] = 0.5 * want[j] + 0.5 * share.mean(0)
        if step % 2:
            want[:] = want.mean(0)
        np.testing.assert_allclose(seen[step], want, rtol=1e-5, atol=1e-6)
        assert np.array_equal(*seen[step]) == bool(step % 2)

    dropout = model.layers[1]
    ones = tf.ones([1, 200])
    masks = strategy.run(lambda: dropout(ones, training=True)).values
    assert not np.array_equal(masks[0], masks[1])
    seeds = [int(v[0]) for v in replica_values(dropout.seed_generator.state)]
    assert seeds[0] == 3
    # A second fit leaves the seeds; weights that were loaded bring one state for all.
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[tfbm.BlockTraining()])
    assert seeds == [int(v[0]) for v in replica_values(dropout.seed_generator.state)]
    dropout.seed_generator.state.assign([7, 0])
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[tfbm.BlockTraining()])
    seeds = [int(v[0]) for v in replica_values(dropout.seed_generator.state)]
    assert seeds[0] == 7
    assert seeds[1] != 7


@pytest.mark.parametrize(
    ("overlap", "jit"),
    [
        (False, False),
        (1.0, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(1.0, False, marks=pytest.mark.slow),
    ],
)
def test_float16_on_the_wire(strategy_of, monkeypatch, overlap, jit):
    """Slopes of whole numbers, so that all but the float16 is exact: to the bit."""
    strategy, steps = strategy_of(2), 24
    monkeypatch.setattr(strategy, "compression", "float16")
    slopes = np.random.default_rng(0).integers(-3000, 3000, size=[steps, 2, 5]).astype("float32")
    with strategy.scope():
        w = keras.Variable(np.zeros(5, "float32"))
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.SGD(1.0), sync_period=3, block_momentum=0.5, overlap=overlap
        )
        optimizer.build([w])

    def step(slope):
        optimizer.apply([slope[0] / strategy.num_replicas_in_sync], [w])

    loop = tfbm.BlockLoop(step, optimizer, strategy, jit_compile=jit)
    data = tf.data.Dataset.from_tensor_slices(slopes.reshape(-1, 5)).batch(2)
    iterator = iter(strategy.experimental_distribute_dataset(data))
    method = reference.overlapped_m_avg if overlap else reference.m_avg
    batches = [[([slope], None) for slope in shares] for shares in slopes]

    def run(send):
        want = method([np.zeros(5)], batches, lambda w, x, y: (0, x), 1.0, 3, 0.5, send=send)
        return want if overlap else [[w] * 2 for w in want[0]]

    want, plain = run(reference.Float16()), run(reference.uncompressed)
    for block in want[:-1]:
        loop.run(iterator, 3)
        for j in range(2):
            np.testing.assert_array_equal(replica_values(w)[j], block[j][0])
    loop.run(iterator, 3)
    loop.flush()
    np.testing.assert_array_equal(replica_values(w)[0], want[-1][0][0])
    assert not np.array_equal(want[-1][0][0], plain[-1][0][0])


def test_float16_loses_nothing_over_time(strategy_of, monkeypatch):
    """Deltas of 2^-26, which float16 rounds to 0, are sent when they have come to 2^-24."""
    strategy = strategy_of(2)
    monkeypatch.setattr(strategy, "compression", "float16")
    with strategy.scope():
        w = keras.Variable([0.0])
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.SGD(2.0**-26), sync_period=1, block_momentum=0
        )
        optimizer.build([w])
    loop = tfbm.BlockLoop(
        lambda slope: optimizer.apply([slope / strategy.num_replicas_in_sync], [w]),
        optimizer,
        strategy,
    )
    slopes = tf.data.Dataset.from_tensors([-1.0, -1.0]).repeat(16).unbatch().batch(2)
    iterator = iter(strategy.experimental_distribute_dataset(slopes))
    seen = []
    for _ in range(16):
        loop.run(iterator, 1)
        seen.append(float(replica_values(w)[0][0]) * 2**24)
    assert seen[0] == 0
    assert seen[-1] == 4
    # What is too large for the sum is an error, and leaves the anchor as it was.
    w.assign([0.0])
    optimizer.restart_block()
    huge = tf.data.Dataset.from_tensors([-(2.0**43), 0.0]).unbatch().batch(2)
    with pytest.raises(FloatingPointError, match="or too large for float16"):
        loop.run(iter(strategy.experimental_distribute_dataset(huge)), 1)
    assert float(replica_values(w)[0][0]) == 0


@pytest.mark.parametrize(
    ("overlap", "compression"),
    [
        (False, None),
        pytest.param(False, "float16", marks=pytest.mark.slow),
        pytest.param(1.0, None, marks=pytest.mark.slow),
        (1.0, "float16"),
    ],
)
def test_large_weights_travel_in_pieces(strategy_of, monkeypatch, overlap, compression):
    """Large tensors are cut and small ones put together; XLA compiles; to the bit."""
    strategy = strategy_of(2)
    monkeypatch.setattr(strategy, "compression", compression)
    monkeypatch.setattr("tf_blockmomentum.boundary.packing._PACK_BYTES", 1 << 18)
    shapes = [(3,), (137, 1723), (5, 7), (70_001,), ()]
    values = [np.arange(np.prod(s)).reshape(s) % 8 - 3.0 for s in shapes]
    with strategy.scope():
        weights = [keras.Variable(v, dtype="float32") for v in values]
        mean = keras.Variable(np.zeros(3), dtype="float32", trainable=False)
        optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(1.0), sync_period=2, overlap=overlap)
        optimizer.build(weights)

    def step(factor):
        own = factor[0] / strategy.num_replicas_in_sync
        optimizer.apply([own * tf.constant(v, "float32") for v in values], weights)
        mean.assign_add(factor[0] * tf.ones(3))

    loop = tfbm.BlockLoop(step, optimizer, strategy, averaged_variables=[mean])
    factors = np.random.default_rng(0).integers(-4, 5, size=[8, 2])
    data = tf.data.Dataset.from_tensor_slices(factors.ravel().astype("float32")).batch(2)
    iterator = iter(strategy.experimental_distribute_dataset(data))
    loop.run(iterator, 8)
    loop.flush()
    method = reference.overlapped_m_avg if overlap else reference.m_avg
    batches = [[([f * v for v in values], None) for f in shares] for shares in factors]
    want = method(values, batches, lambda w, x, y: (0, x), 1.0, 2, 0.5)
    want = want[-1][0] if overlap else want[0][-1]
    for w, value in zip(weights, want, strict=True):
        for own in replica_values(w):
            np.testing.assert_array_equal(own, value)
    for own in replica_values(mean):
        np.testing.assert_array_equal(own, np.full(3, factors.mean(1).sum()))
