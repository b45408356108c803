"""The family: each published recursion in NumPy, and the wrapper's one line for it."""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from helpers import replica_values, scope
from test_oracles import CLASSES, FEATURES, close, data, start

import tf_blockmomentum as tfbm

SGD = keras.optimizers.SGD
RATE, STEPS = 0.3, 20


class Boundaries(keras.callbacks.Callback):
    """Keeps the weights after every boundary, and the block's length and drift."""

    def __init__(self, blocks):
        super().__init__()
        self.training = blocks
        self.weights, self.lengths, self.drifts, self.ended, self.position = [], [], [], 0, 0

    def on_train_batch_end(self, batch, logs=None):
        self.position += 1
        if self.model.optimizer.blocks > self.ended:
            self.ended = self.model.optimizer.blocks
            parts = [replica_values(w) for w in self.model.trainable_variables]
            for values in parts:
                for value in values:
                    np.testing.assert_array_equal(value, values[0])
            self.weights.append([values[0] for values in parts])
            self.lengths.append(self.position)
            self.drifts.append(self.training.drift)
            self.position = 0


def fit(strategy, make_optimizer, dataset, jit=False, kind=keras.Sequential):
    with scope(strategy):
        model = kind([keras.Input([FEATURES]), keras.layers.Dense(CLASSES)])
        model.compile(
            make_optimizer(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
    model.set_weights(start())
    training = tfbm.BlockTraining(jit_compile=jit)
    seen = Boundaries(training)
    model.fit(dataset, shuffle=False, verbose=0, callbacks=[training, seen])
    return model, seen


def sgd(weights, grads, state, step):
    return [w - RATE * g for w, g in zip(weights, grads, strict=True)], state


def decayed_rate(step):
    return RATE * 0.8 ** (step // 4)


def decayed_sgd(weights, grads, state, step):
    return [w - decayed_rate(step) * g for w, g in zip(weights, grads, strict=True)], state


def adamw(weights, grads, state, step):
    """Loshchilov and Hutter, Algorithm 2, with Keras's place for epsilon."""
    rate, decay, b1, b2, epsilon = 0.05, 0.1, 0.9, 0.999, 1e-7
    m, v = state or ([0.0] * len(grads), [0.0] * len(grads))
    t = step + 1
    m = [b1 * a + (1 - b1) * g for a, g in zip(m, grads, strict=True)]
    v = [b2 * a + (1 - b2) * g**2 for a, g in zip(v, grads, strict=True)]
    alpha = rate * np.sqrt(1 - b2**t) / (1 - b1**t)
    weights = [
        w * (1 - rate * decay) - alpha * a / (np.sqrt(b) + epsilon)
        for w, a, b in zip(weights, m, v, strict=True)
    ]
    return weights, (m, v)


def stock(make):
    """A Keras optimizer as it stands, outside any wrapper, as inner recursion."""

    def inner(weights, grads, state, step):
        if state is None:
            variables = [keras.Variable(w, dtype="float32") for w in weights]
            state = make(), variables
            state[0].build(variables)
        optimizer, variables = state
        for v, w in zip(variables, weights, strict=True):
            v.assign(w)
        optimizer.apply([tf.constant(g, tf.float32) for g in grads], variables)
        return [v.numpy().astype("float64") for v in variables], state

    return inner


def muon():
    return keras.optimizers.Muon(0.05)


def bmuf_nbm(start, gain, state, step):
    """Chen and Huo (2016), eq. 4 to 8: W is the global model, a block starts from W + eta D."""
    eta, zeta = 0.6, 0.9
    model, before = state or (start, [0.0] * len(start))
    moved = [eta * b + zeta * g for b, g in zip(before, gain, strict=True)]
    model = [w + m for w, m in zip(model, moved, strict=True)]
    return [w + eta * m for w, m in zip(model, moved, strict=True)], (model, moved)


def slowmo(rate):
    def outer(anchor, delta, state, step):
        """Wang et al. (2020), Algorithm 1, lines 7 and 8."""
        alpha, beta, gamma = 0.9, 0.6, rate(step + 1)
        u = [beta * b - d / gamma for b, d in zip(state or [0.0] * 9, delta, strict=False)]
        return [a - alpha * gamma * b for a, b in zip(anchor, u, strict=True)], u

    return outer


def diloco(anchor, delta, state, step):
    """Douillard et al. (2023), Algorithm 1, with PyTorch's Nesterov momentum."""
    rate, mu = 0.7, 0.9
    buffer = [mu * b - d for b, d in zip(state or [0.0] * 9, delta, strict=False)]
    step_by = [-d + mu * b for b, d in zip(buffer, delta, strict=True)]
    return [a - rate * s for a, s in zip(anchor, step_by, strict=True)], buffer


def fedadam(anchor, delta, state, step):
    """Reddi et al. (2021), Algorithm 2, with Keras's bias correction."""
    eta, b1, b2, tau = 0.1, 0.9, 0.99, 1e-3
    m, v, t = state or ([0.0] * 9, [0.0] * 9, 0)
    m = [b1 * a + (1 - b1) * d for a, d in zip(m, delta, strict=False)]
    v = [b2 * a + (1 - b2) * d**2 for a, d in zip(v, delta, strict=False)]
    t += 1
    eta *= np.sqrt(1 - b2**t) / (1 - b1**t)
    return [a + eta * x / (np.sqrt(y) + tau) for a, x, y in zip(anchor, m, v, strict=True)], (
        m,
        v,
        t,
    )


def lookahead(slow, delta, state, step):
    """Zhang et al. (2019), Algorithm 1: phi + alpha (theta - phi)."""
    return [s + 0.5 * d for s, d in zip(slow, delta, strict=True)], state


def decaying():
    return SGD(keras.optimizers.schedules.ExponentialDecay(RATE, 4, 0.8, staircase=True))


METHODS = {
    # name: replicas, inner and outer recursion, one line
    "BMUF-NBM": (2, sgd, bmuf_nbm, lambda: tfbm.BlockMomentum(
        SGD(RATE), 4, block_momentum=0.6, nesterov=True, block_learning_rate=0.9)),
    "SlowMo": (2, sgd, slowmo(lambda step: RATE), lambda: tfbm.BlockMomentum(
        SGD(RATE), 4, block_momentum=0.6, block_learning_rate=0.9)),
    "SlowMo, rate falls": (2, decayed_sgd, slowmo(decayed_rate), lambda: tfbm.BlockMomentum(
        decaying(), 4, outer_optimizer=tfbm.SlowMo(0.9, momentum=0.6))),
    "DiLoCo": (2, adamw, diloco, lambda: tfbm.BlockMomentum(
        keras.optimizers.AdamW(0.05, weight_decay=0.1), 4, block_momentum=0.9, nesterov=True,
        block_learning_rate=0.7)),
    "SNOO": (1, adamw, diloco, lambda: tfbm.BlockMomentum(
        keras.optimizers.AdamW(0.05, weight_decay=0.1), 4, block_momentum=0.9, nesterov=True,
        block_learning_rate=0.7)),
    "MuLoCo": (2, stock(muon), diloco, lambda: tfbm.BlockMomentum(
        muon(), 4, block_momentum=0.9, nesterov=True, block_learning_rate=0.7)),
    "FedAdam": (2, sgd, fedadam, lambda: tfbm.BlockMomentum(
        SGD(RATE), 4, outer_optimizer=keras.optimizers.Adam(0.1, beta_2=0.99, epsilon=1e-3))),
    "Lookahead": (1, sgd, lookahead, lambda: tfbm.BlockMomentum(
        SGD(RATE), 4, block_momentum=0, block_learning_rate=0.5)),
}  # fmt: skip


# Whose like is DiLoCo; the last is in test_oracles.py too.
_SLOW = ("BMUF-NBM", "SNOO", "MuLoCo", "FedAdam", "Lookahead")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in METHODS],
)
def test_a_published_recursion(strategy_of, name):
    replicas, inner, outer, make = METHODS[name]
    batches, dataset = data(STEPS - 2, replicas)  # the last block is cut short
    want, *_ = reference.local_training(
        start(), batches, reference.softmax_gradients, inner, outer, lambda *_: 4
    )
    model, seen = fit(strategy_of(replicas), make, dataset, jit=name == "DiLoCo")
    assert seen.lengths == [4, 4, 4, 4, 2]
    # Adam divides by the root of small numbers, which magnifies float32's rounding.
    tolerance = 3e-5 if name in ("DiLoCo", "SNOO", "MuLoCo", "FedAdam") else 1e-6
    for got, expected in zip(seen.weights, want, strict=True):
        close(got, expected, tolerance)

    again = tfbm.BlockMomentum.from_config(model.optimizer.get_config())
    assert type(again.outer_optimizer) is type(model.optimizer.outer_optimizer)
    assert again.get_config() == model.optimizer.get_config()


def test_an_outer_optimizer_is_block_momentum_in_other_words(strategy_of):
    """The same bits; and a schedule of the block learning rate goes by blocks."""
    _, dataset = data(12, 2)
    _, seen = fit(strategy_of(2), lambda: tfbm.BlockMomentum(SGD(RATE), 4, 0.7), dataset)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [1.0, 0.0])
    _, other = fit(
        strategy_of(2),
        lambda: tfbm.BlockMomentum(SGD(RATE), 4, outer_optimizer=SGD(schedule, momentum=0.7)),
        dataset,
    )
    for block in (0, 1):  # rates 1 and 1, then 0: v = beta v
        for a, b in zip(seen.weights[block], other.weights[block], strict=True):
            np.testing.assert_array_equal(a, b)
    moved = [b - a for a, b in zip(other.weights[0], other.weights[1], strict=True)]
    close(other.weights[2], [w + 0.7 * m for w, m in zip(other.weights[1], moved, strict=True)])


def block_momentum(beta):
    def outer(anchor, delta, state, step):
        v = [beta * b + d for b, d in zip(state or [0.0] * 9, delta, strict=False)]
        return [a + b for a, b in zip(anchor, v, strict=True)], v

    return outer


def drifting(target):
    length = 2

    def period(step, drift):
        nonlocal length
        if drift is not None:
            length = max(length // 2, 1) if drift > target else length
            length = min(2 * length, 16) if drift < target / 2 else length
        return length

    return period


PERIODS = {
    "piecewise": (
        lambda: tfbm.schedules.PiecewisePeriod([4, 10], [2, 3, 5]),
        lambda step, drift: 2 if step < 4 else 3 if step < 10 else 5,
    ),
    "growing": (
        lambda: tfbm.schedules.GrowingPeriod(1, every=4, maximum=6),
        lambda step, drift: min(2 ** (step // 4), 6),
    ),
    "callable": (lambda: by_step, lambda step, drift: 1 + step % 4),
    "drift": (lambda: tfbm.schedules.DriftPeriod(0.3, 2, maximum=16), drifting(0.3)),
}


@keras.saving.register_keras_serializable(package="tests")
def by_step(step):
    return 1 + step % 4


@pytest.mark.parametrize(
    "name",
    [
        "callable",
        "drift",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("piecewise", "growing")),
    ],
)
def test_a_schedule_of_the_period(strategy_of, tmp_path, name):
    make, period = PERIODS[name]
    batches, dataset = data(30, 2)
    want, lengths, following = reference.local_training(
        start(), batches, reference.softmax_gradients, sgd, block_momentum(0.5), period
    )
    assert len(set(lengths[:-1])) > 1  # it does change
    model, seen = fit(strategy_of(2), lambda: tfbm.BlockMomentum(SGD(RATE), make(), 0.5), dataset)
    assert seen.lengths == lengths
    for got, expected in zip(seen.weights, want, strict=True):
        close(got, expected)
    assert (min(seen.drifts) > 0) == (name == "drift")

    # It goes on where it was in a saved model.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.period == model.optimizer.period == following
    assert type(loaded.sync_period) is type(model.optimizer.sync_period)


def quadratic(step, drift):
    """Gu et al. (2024), eq. 2; until step 4 the value at the peak."""
    return max(2, int((0.4 / decayed_rate(max(step, 4))) ** 2))


def test_k_follows_the_learning_rate(strategy_of, tmp_path):
    """Which has another value at every fourth step, in the middle of blocks too."""
    batches, dataset = data(30, 2)
    want, lengths, following = reference.local_training(
        start(), batches, reference.softmax_gradients, decayed_sgd, block_momentum(0.5), quadratic
    )
    assert len(set(lengths)) > 2
    period = tfbm.schedules.QuadraticPeriod(2, 0.4, warmup_steps=4, peak_rate=decayed_rate(4))
    model, seen = fit(strategy_of(2), lambda: tfbm.BlockMomentum(decaying(), period, 0.5), dataset)
    assert seen.lengths == lengths
    for got, expected in zip(seen.weights, want, strict=True):
        close(got, expected)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.period == model.optimizer.period == following
    assert loaded.sync_period.get_config() == period.get_config()

    # Whoever sets the rate: it counts from the next block on, one that has begun keeps its K.
    optimizer = tfbm.BlockMomentum(SGD(0.1), tfbm.schedules.QuadraticPeriod(2, 0.2))
    w = keras.Variable(np.ones([2]))
    optimizer.build([w])
    loop = tfbm.BlockLoop(lambda x: optimizer.apply([x * w], [w]), optimizer)
    iterator = iter(tf.data.Dataset.from_tensors([1.0, 2.0]).repeat(40))
    loop.run(iterator, 1)
    optimizer.learning_rate = 0.05
    loop.run(iterator, 3)
    assert (optimizer.blocks, loop.position, optimizer.period) == (1, 0, 16)
    optimizer.learning_rate = 0.0
    loop.run(iterator, 1)
    loop.run(iterator, 30)
    assert (optimizer.blocks, loop.position) == (2, 15)

    post = tfbm.schedules.PostLocal(3, period)
    again = tfbm.schedules.PostLocal.from_config(post.get_config())
    assert (again(2, 0, 0.1), again(5, 0, 0.1)) == (1, 16)
    assert again.reads_rate
    assert period(5, rate=0.0) > 10**9
    assert period(5, rate=float("nan")) == 2


@pytest.mark.parametrize(
    "arguments",
    [(0, 0.1), (2, 0.0), (2, float("nan")), (2, 0.1, -1), (2, 0.1, 0, 0.3), (2, 0.1, 4, -1.0)],
)
def test_a_quadratic_period_that_cannot_be(arguments):
    with pytest.raises(ValueError, match="Received: "):
        tfbm.schedules.QuadraticPeriod(*arguments)


@pytest.mark.parametrize("inner_momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.8])
def test_post_local_sgd_begins_as_synchronous_sgd(strategy_of, inner_momentum):
    """Whatever the block momentum; steps_per_execution does not divide what it is."""
    batches, dataset = data(18, 2)
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([FEATURES]), keras.layers.Dense(CLASSES)])
        period = tfbm.schedules.PostLocal(7, 4)
        model.compile(
            tfbm.BlockMomentum(SGD(RATE, momentum=inner_momentum), period, 0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=5,
        )
    model.set_weights(start())
    whole = keras.Sequential([keras.Input([FEATURES]), keras.layers.Dense(CLASSES)])
    whole.compile(
        SGD(RATE, momentum=inner_momentum),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    whole.set_weights(start())
    model.fit(dataset.take(7), shuffle=False, verbose=0, callbacks=[tfbm.BlockTraining()])
    whole.fit(dataset.take(7), shuffle=False, verbose=0)
    assert model.optimizer.blocks == 7
    close(model.get_weights(), whole.get_weights())
    assert not any(v.numpy().any() for v in model.optimizer.outer_optimizer.variables[2:])

    model.fit(dataset.skip(7), shuffle=False, verbose=0, callbacks=[tfbm.BlockTraining()])
    assert model.optimizer.blocks == 7 + 3
    if not inner_momentum:
        begun = [np.asarray(w, np.float64) for w in whole.get_weights()]
        want, _ = reference.m_avg(begun, batches[7:], reference.softmax_gradients, RATE, 4, 0.9)
        close(model.get_weights(), want[-1])


@pytest.mark.parametrize(
    "inner_state", ["reset", "average", pytest.param("keep", marks=pytest.mark.slow)]
)
def test_inner_state(strategy_of, inner_state):
    def momentum_sgd(weights, grads, state, step):
        v = [0.9 * b - 0.1 * g for b, g in zip(state or [0.0] * 9, grads, strict=False)]
        return [w + b for w, b in zip(weights, v, strict=True)], v

    def end(states):
        if inner_state == "reset":
            return [None] * len(states)
        mean = [np.mean(parts, axis=0) for parts in zip(*states, strict=True)]
        return [mean] * len(states) if inner_state == "average" else states

    batches, dataset = data(STEPS, 2)
    want, *_ = reference.local_training(
        start(), batches, reference.softmax_gradients, momentum_sgd, block_momentum(0.5),
        lambda *_: 4, end,
    )  # fmt: skip
    _, seen = fit(
        strategy_of(2),
        lambda: tfbm.BlockMomentum(SGD(0.1, momentum=0.9), 4, 0.5, inner_state=inner_state),
        dataset,
    )
    for got, expected in zip(seen.weights, want, strict=True):
        close(got, expected, 2e-6)


class Proximal(keras.Sequential):
    """Li et al. (2020), eq. 2, as docs/methods.md has it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            pairs = self.optimizer.pairs
            loss += 0.7 / 2 * sum(tf.reduce_sum((w - anchor) ** 2) for w, anchor in pairs)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_fedprox(strategy_of):
    def proximal_sgd(weights, grads, anchor, step):
        anchor = weights if anchor is None else anchor
        pulled = zip(weights, grads, anchor, strict=True)
        return [w - RATE * (g + 0.7 * (w - a)) for w, g, a in pulled], anchor

    batches, dataset = data(STEPS, 2)
    want, *_ = reference.local_training(
        start(), batches, reference.softmax_gradients, proximal_sgd, block_momentum(0.5),
        lambda *_: 4, lambda states: [None] * len(states),
    )  # fmt: skip
    _, seen = fit(
        strategy_of(2), lambda: tfbm.BlockMomentum(SGD(RATE), 4, 0.5), dataset, kind=Proximal
    )
    for got, expected in zip(seen.weights, want, strict=True):
        close(got, expected)


def test_schedule_free_adamw_is_averaged_or_refused(strategy_of):
    """With both its points averaged, their average is too."""

    def make():
        return keras.optimizers.ScheduleFreeAdamW(0.05)

    def end(states):
        slots = [[v for v in o.variables[2:] if v.dtype == "float32"] for o, _ in states]
        for parts in zip(*slots, strict=True):
            mean = np.mean([part.numpy() for part in parts], axis=0)
            for part in parts:
                part.assign(mean)
        return states

    batches, dataset = data(STEPS, 2)
    want, *_ = reference.local_training(
        start(), batches, reference.softmax_gradients, stock(make), block_momentum(0.0),
        lambda *_: 4, end,
    )  # fmt: skip

    def wrap(**kwargs):
        return tfbm.BlockMomentum(make(), 4, **{"inner_state": "average", **kwargs})

    _, seen = fit(strategy_of(2), lambda: wrap(block_momentum=0), dataset)
    for got, expected in zip(seen.weights, want, strict=True):
        close(got, expected, 3e-5)
    for kwargs in ({}, {"block_momentum": 0, "inner_state": "keep"},
                   {"block_momentum": 0, "block_learning_rate": 0.5},
                   {"outer_optimizer": SGD(1.0)}):  # fmt: skip
        with pytest.raises(ValueError, match="keeps a second point"):
            wrap(**kwargs)


def test_reset_slots_are_as_new_and_no_more_than_slots():
    """Nadam has a slot that starts at 1; counters, rates and moving averages stay."""
    w = keras.Variable(np.ones([2]))
    inner = keras.optimizers.Nadam(0.1, use_ema=True, gradient_accumulation_steps=2)
    optimizer = tfbm.BlockMomentum(inner, sync_period=4, inner_state="reset")
    optimizer.build([w])
    before = {v.path: v.numpy() for v in inner.variables}

    def step(x):
        optimizer.apply([x * w], [w])

    loop = tfbm.BlockLoop(step, optimizer)
    loop.run(iter(tf.data.Dataset.from_tensors([1.0, 2.0]).repeat(4)), 4)
    changed = {v.path for v in inner.variables if (v.numpy() != before[v.path]).any()}
    assert len(changed) == 2, changed
    assert any("iteration" in path for path in changed)
    assert any("average" in path for path in changed)
