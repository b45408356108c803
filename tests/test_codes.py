"""compression="int8" and "int4": codes, their sums, and what is kept back, to the bit."""

import os
import re
import signal
import time
import warnings

import keras
import numpy as np
import pool
import pytest
import reference
import tensorflow as tf
from helpers import classifier, crossentropy, dataset, examples, replica_values

import tf_blockmomentum as tfbm
from tf_blockmomentum.boundary import codes, compiling, feedback
from tf_blockmomentum.boundary.exchange import exchange_parts, join_parts
from tf_blockmomentum.strategy import worker_of

both = pytest.mark.parametrize("jit", [False, True], ids=["eager_ops", "xla"])
each = pytest.mark.parametrize("compression", ["int8", "int4"])


def values(blocks, seed=0):
    """Blocks of unlike magnitudes, from 1e-30 to 1e30; some all 0, some with one value."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[blocks, 256]) * 10.0 ** rng.integers(-30, 31, size=[blocks, 1])
    x[3] = 0
    x[5, 1:] = 0
    x[7] = 2.0**-101  # too small for a scale
    x[8] = np.arange(256) - 127.5  # halves: rounded to even
    return x.astype("float32")


@both
@each
def test_codes_are_the_oracles_to_the_bit(compression, jit):
    bits, x = codes.BITS[compression], values(40)

    @tf.function(jit_compile=jit)
    def encode(x):
        scales = codes.scales_of(codes.magnitudes(x), bits)
        inverse = codes.reciprocals(scales)
        return codes.encode(x, inverse, bits), scales, codes.rest(x, scales, inverse)

    @tf.function(jit_compile=jit)
    def decode(words, scales):
        return codes.decode(words, scales, bits)

    words, scales, rest = encode(x)
    assert words.dtype == tf.int32
    assert words.shape == [40, 8 * bits]
    got = decode(words, scales).numpy()
    want, want_scales = reference.coded(x, bits)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(rest, x - want)
    assert (np.abs(x - want).max(1) <= 0.5001 * want_scales + 2.0**-101).all()
    assert not want[7].any()
    # Bits that are the upper half of a float32's: they travel as 16.
    assert not (scales.numpy().view(np.int32) & 0xFFFF).any()


@both
@each
def test_what_is_not_finite_stays_so(compression, jit):
    bits = codes.BITS[compression]
    x = np.ones([5, 256], "float32")
    x[1, 3], x[2, 4], x[3, 5], x[4, 6] = np.nan, np.inf, -np.inf, 3e38

    @tf.function(jit_compile=jit)
    def there_and_back(x):
        scales = codes.scales_of(codes.magnitudes(x), bits)
        words = codes.encode(x, codes.reciprocals(scales), bits)
        fit = [tf.reduce_all(codes.fitting(row)) for row in tf.unstack(x)]
        return codes.decode(words, scales, bits), tf.stack(fit)

    got, fit = there_and_back(x)
    np.testing.assert_allclose(got[0], x[0], rtol=0.01)
    assert np.isnan(got[1:]).all()
    assert fit.numpy().tolist() == [True, False, False, False, False]


@each
@pytest.mark.parametrize("replicas", [1, 2, 3, 300])
@pytest.mark.parametrize("large", [codes.BLOCK * 64, None])
def test_layout(compression, replicas, large, monkeypatch):
    """Large tensors, with a rest and without, small ones, scalars and empty ones; messages."""
    bits, rng = codes.BITS[compression], np.random.default_rng(0)
    shapes = [(130, 256), (), (7, 3), (123, 457), (0, 4), (1000,)]
    tensors = [tf.constant(rng.normal(size=shape), tf.float32) for shape in shapes]
    if large:  # of these two; else they all share blocks
        monkeypatch.setattr(codes, "_LARGE", large)
    layout = codes.Layout(tensors, bits, replicas)
    assert layout.large == ([0, 3] if large else [])
    groups = layout.join(tensors)
    for got, tensor in zip(layout.split(groups), tensors, strict=True):
        np.testing.assert_array_equal(got, tensor)
    scales = [codes.scales_of(codes.magnitudes(x), bits) for x in groups]
    words = [
        codes.encode(x, codes.reciprocals(s), bits) for x, s in zip(groups, scales, strict=True)
    ]
    message = layout.write(words, tf.concat(scales, axis=0))
    assert message.shape == [replicas * layout.message]
    flat = np.concatenate([x.numpy() for x in groups])
    want, want_scales = reference.coded(flat, bits)
    for got, tensor in zip(
        layout.split(layout.decode(message)), layout.split(layout.join(tensors)), strict=True
    ):
        assert got.shape == tensor.shape
    got = np.concatenate(layout.decode(message))
    np.testing.assert_array_equal(got, np.where(flat == 0, 0, want))
    # A part is a message of its own.
    parts = tf.split(message, replicas)
    both_read = [layout.read(part) for part in parts]
    seen = np.concatenate([s.numpy().ravel() for _, s in both_read])
    np.testing.assert_array_equal(seen[: layout.blocks], want_scales)
    assert not seen[layout.blocks :].any()
    own = layout.write_part(both_read[0][0][0], both_read[0][1][0])
    np.testing.assert_array_equal(own, parts[0])


@pytest.mark.parametrize("replicas", [2, 3, 16, 64, 256])
def test_bytes_of_realistic_models(replicas):
    """What a worker sends, beside what the float32 weights would be."""
    mlp = [(784, 2048), (2048,), (2048, 1024), (1024,), (1024, 1024), (1024,), (1024, 10), (10,)]
    odd = [(3, 3, 61, 67), (67,)] * 40  # no multiples of anything
    for shapes in (mlp, odd):
        tensors = [tf.TensorSpec(shape) for shape in shapes]
        count = sum(spec.shape.num_elements() for spec in tensors)
        for compression, most in (("int8", 0.26), ("int4", 0.135)):
            layout = codes.Layout(tensors, codes.BITS[compression], replicas)
            # A ring's all-reduce, or an exchange and a gather, send this (P - 1) / P times twice.
            assert replicas * layout.message <= most * count, (replicas, compression)


@pytest.mark.parametrize("replicas", [3, 11])
def test_many_are_added_up_in_their_order(replicas):
    """A few in one expression, many in a loop; to the bit."""
    x = np.random.default_rng(0).normal(size=[replicas + 1, 2, 256]).astype("float32")

    adding = feedback.Feedback("int4", None, tf.function, False)
    adding.layout = codes.Layout([tf.TensorSpec([replicas * 512])], 4, replicas)
    scales = [codes.scales_of(codes.magnitudes(own), 4) for own in x[:-1]]
    words = [
        codes.encode(own, codes.reciprocals(s), 4) for own, s in zip(x[:-1], scales, strict=True)
    ]
    total = tf.function(adding._add, jit_compile=True)(
        tf.stack(words), tf.stack(scales), tf.reshape(x[-1], [-1])
    )
    want = x[-1]
    for own in x[:-1]:
        want = want + reference.coded(own, 4)[0]
    np.testing.assert_array_equal(total, want)


def test_parts_are_laid_out_anew():
    specs = [tf.TensorSpec([700]), tf.TensorSpec([130, 256])]
    two, three = (codes.Layout(specs, 8, replicas) for replicas in (2, 3))
    whole = np.arange(two.blocks * 256, dtype="float32")
    assert two.blocks == 133
    padded = np.pad(whole, [0, 256])
    parts = [two.anew([whole], replica) for replica in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), 2 * padded)  # of the sum, not the mean
    again = np.concatenate([three.anew(parts, replica) for replica in range(3)])
    assert len(again) == 3 * 45 * 256
    np.testing.assert_allclose(again[: len(whole)], 3 * whole, rtol=1e-6)
    assert not again[len(whole) :].any()


# -- on real workers ------------------------------------------------------------------------------


def exchanged(strategy, count, most=None):
    from tf_blockmomentum.boundary import exchange

    before, exchange._PIECE_BYTES = exchange._PIECE_BYTES, most or exchange._PIECE_BYTES

    def replica():
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        own = tf.range(count * replicas) + 10000 * context.replica_id_in_sync_group
        return exchange_parts(own, replicas), join_parts(own[:count], replicas)

    function = tf.function(lambda: strategy.run(replica))
    for _ in range(3):  # calls of one function do not mix up
        found = function()
    exchange._PIECE_BYTES = before
    return [strategy.experimental_local_results(x)[0].numpy() for x in found]


def test_parts_travel(pair, triple):
    for workers in (pair, triple):
        for count, most in ((5, None), (10, 12)):  # unlike sizes, and in pieces
            found = workers.run(exchanged, count, most)
            ids = 10000 * np.arange(workers.workers)[:, None]
            for index, (parts, joined) in enumerate(found):
                own = np.arange(count)
                np.testing.assert_array_equal(parts, (ids + own + index * count).ravel())
                np.testing.assert_array_equal(joined, (ids + own).ravel())


def trajectory(strategy, compression, slopes, shapes, jit, parts=False, **settings):
    """Every local replica's weights after each block of two steps, flat. `parts`: as of a large
    model, whose large variables have blocks of their own and are compiled, and the others not."""
    with pytest.MonkeyPatch.context() as patch:
        if parts:
            patch.setattr(codes, "_LARGE", 10_000)
            for name, value in (("_LARGE_CODED", 1), ("_LARGE_ALONE", 10_000)):
                patch.setattr(compiling, name, value)
        return trajectory_of(strategy, compression, slopes, shapes, jit, settings)


def trajectory_of(strategy, compression, slopes, shapes, jit, settings):
    """As `trajectory`."""
    strategy.compression = compression
    replicas = strategy.num_replicas_in_sync
    with strategy.scope():
        weights = [keras.Variable(np.zeros(shape, "float32")) for shape in shapes]
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.SGD(1.0), sync_period=2, block_momentum=0.5, **settings
        )
        optimizer.build(weights)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def step(slope):
        parts = np.split(np.arange(slopes.shape[-1]), ends)
        gradients = [
            tf.reshape(tf.gather(slope[0], part), shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]
        optimizer.apply(gradients, weights)

    loop = tfbm.BlockLoop(step, optimizer, strategy, jit_compile=jit)
    data = tf.data.Dataset.from_tensor_slices(slopes.reshape(-1, slopes.shape[-1]))
    iterator = iter(strategy.experimental_distribute_dataset(data.batch(replicas)))
    seen = []
    for block in range(len(slopes) // 2):
        loop.run(iterator, 2)
        if block == len(slopes) // 2 - 1:
            loop.flush()
        seen.append([replica_values(w) for w in weights])
    strategy.compression = None
    return [
        [np.concatenate([np.ravel(w[j]) for w in block]) for block in seen]
        for j in range(len(seen[0][0]))
    ]


def slopes_of(replicas, size, steps=12):
    rng = np.random.default_rng(0)
    return rng.normal(size=[steps, replicas, size]).astype("float32")


SHAPES = [(150, 256), (7, 3), (400,)]
SIZE = 150 * 256 + 421


@pytest.mark.parametrize(
    ("overlap", "jit", "parts", "compression"),
    [
        pytest.param(*case, code, id=f"{name}-{code}", marks=[pytest.mark.slow] * (code != enough))
        for name, *case, enough in (
            ("eager_ops", False, False, False, None),
            ("xla", False, True, False, "int4"),
            ("overlap-xla", 0.5, True, False, "int8"),
            ("whole_overlap-eager_ops", 1.0, False, False, "int4"),
            ("large_and_small", False, False, True, "int8"),
            ("overlap-large_and_small", 0.5, False, True, "int4"),
        )
        for code in ("int8", "int4")
    ],
)
def test_training_is_the_oracles_to_the_bit(pair, compression, overlap, jit, parts):
    """The weights of each worker after every block of two steps."""
    slopes = slopes_of(2, SIZE)
    found = pair.run(trajectory, compression, slopes, SHAPES, jit, parts, overlap=overlap)
    want = reference.coded_m_avg(slopes, 2, 0.5, codes.BITS[compression], int(2 * overlap))
    for index, (mine,) in enumerate(found):
        for got, block in zip(mine, want, strict=True):
            np.testing.assert_array_equal(got, block[index])


@pytest.mark.parametrize("compression", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_three_workers_have_the_same_to_the_bit(triple, compression):
    slopes = slopes_of(3, SIZE)
    found = triple.run(trajectory, compression, slopes, SHAPES, False)
    want = reference.coded_m_avg(slopes, 2, 0.5, codes.BITS[compression], 0)
    for (mine,) in found:
        for got, first, block in zip(mine, found[0][0], want, strict=True):
            np.testing.assert_array_equal(got, first)
            np.testing.assert_allclose(got, block[0], atol=2e-2)  # a third is no float32


def killed_meanwhile(strategy):
    """Worker 1 ends while worker 0 waits for its codes."""

    def replica():
        return exchange_parts(tf.zeros([8], tf.int32), 2)

    function = tf.function(lambda: strategy.run(replica))
    function()
    if worker_of(strategy)[0]:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        function()
    except tf.errors.OpError as error:
        raise RuntimeError(f"{type(error).__name__} after {time.monotonic() - began}") from None


def test_a_worker_that_is_killed_ends_the_exchange(pair, monkeypatch):
    """As it ends an all-reduce (test_failures.py)."""
    monkeypatch.setattr(pool, "SETTLE_SECONDS", 30.0)
    with pytest.raises(pool.WorkerError) as e:
        pair.run(killed_meanwhile)
    assert "Worker 1 of 2: the process has ended: SIGKILL" in str(e.value)
    error, seconds = re.search(r"RuntimeError: (\w+) after ([\d.]+)", str(e.value)).groups()
    assert error in ("UnavailableError", "CancelledError", "AbortedError")
    assert float(seconds) < 20


class NotANumber(keras.callbacks.Callback):
    """Worker 1's weights, at the end of the fourth step; what is kept back, at the end."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 3 and worker_of(self.model.distribute_strategy)[0]:
            kernel = self.model.weights[0].value  # as if the step had done it
            kernel.assign(kernel * float("nan"))


def poisoned(strategy, compression, overlap, on_nonfinite):
    strategy.compression = compression
    keras.utils.set_random_seed(0)
    x, y = examples(96)
    with strategy.scope():
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
        optimizer = tfbm.BlockMomentum(
            keras.optimizers.Adam(0.01), sync_period=3, block_momentum=0.5, overlap=overlap
        )
        model.compile(optimizer, crossentropy())
    training = tfbm.BlockTraining(on_nonfinite=on_nonfinite)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.fit(dataset(x, y, 8), verbose=0, callbacks=[training, NotANumber()])
    texts = [str(w.message) for w in seen if "Left out" in str(w.message)]
    state = [v.numpy() for v in training._loop.variables]
    return model.get_weights(), texts, training.skipped, all(np.isfinite(v).all() for v in state)


@pytest.mark.parametrize(
    ("compression", "overlap"),
    [("int8", False), pytest.param("int4", 1.0, marks=pytest.mark.slow)],
)
def test_a_worker_that_is_not_finite_is_left_out(pair, compression, overlap):
    found = pair.run(poisoned, compression, overlap, "skip")
    for weights, texts, skipped, finite in found:
        assert "(NaN or infinity) in block 2: replica 1 in variable" in texts[0]
        assert len(texts) == skipped == 1
        assert finite
        for got, first in zip(weights, found[0][0], strict=True):
            np.testing.assert_array_equal(got, first)
            assert np.isfinite(got).all()
    if not overlap:
        errors = pair.run(poisoned, compression, overlap, "raise", expect_error=True)
        assert all("The anchor is finite, made without that replica" in e.text for e in errors)


def half_precision(strategy, compression, overlap):
    strategy.compression = compression
    keras.config.set_dtype_policy("bfloat16")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = classifier()
        optimizer = tfbm.BlockMomentum(keras.optimizers.Adam(0.02), 3, overlap=overlap)
        model.compile(optimizer, crossentropy())
    x, y = examples(192)
    history = model.fit(
        dataset(x, y), epochs=3, verbose=0, callbacks=[tfbm.BlockTraining(jit_compile=False)]
    )
    return history.history["loss"], [w.astype("float32") for w in model.get_weights()]


@pytest.mark.parametrize("compression", [pytest.param("float16", marks=pytest.mark.slow), "int8"])
def test_bfloat16_variables_overlap_and_compression(pair, compression):
    (losses, first), (_, second) = pair.run(half_precision, compression, 0.5)
    assert losses[-1] < losses[0]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
