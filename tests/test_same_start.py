"""Everyone starts the same, and weights that somebody has set are the anchor: two real workers."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import Counter, scope

import tf_blockmomentum as tfbm
from tf_blockmomentum.strategy import worker_of

K = 2
ENOUGH = [pytest.param(False, marks=pytest.mark.slow), True]  # of `overlap`


def data_of(strategy, steps=6):
    """Unlike examples on each worker."""
    index = worker_of(strategy)[0]
    x = np.random.default_rng(index).normal(size=[steps, 4, 3]).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x.sum(axis=-1, keepdims=True)))
    return strategy.distribute_datasets_from_function(lambda _: data)


def model_of(strategy, inner="Adam", rate=0.05, normalized=False, **settings):
    with scope(strategy):
        keras.utils.set_random_seed(0)
        layers = [keras.Input([3]), keras.layers.Dense(2), keras.layers.Dense(1)]
        if normalized:
            layers.insert(2, keras.layers.BatchNormalization())
        model = keras.Sequential(layers)
        inner = getattr(keras.optimizers, inner)(rate)
        settings = {"sync_period": K, "block_momentum": 0.5, **settings}
        model.compile(tfbm.BlockMomentum(inner, **settings), "mse")
    return model


def fit(model, data, *callbacks, **settings):
    model.fit(data, verbose=0, callbacks=[tfbm.BlockTraining(), *callbacks], **settings)


def alike(results):
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def weights_of_the_chief_alone(strategy, what):
    model, data = model_of(strategy, normalized=True), data_of(strategy)
    index = worker_of(strategy)[0]
    optimizer = model.optimizer
    if what == "optimizer":  # as if the chief had loaded a model that has been trained
        fit(model, data)
    if index == 0 and what != "nothing":
        model.set_weights([w + 5 for w in model.get_weights()])
        if what == "optimizer":
            for v in optimizer.inner_optimizer.variables:
                v.assign(v + 1)
    fit(model, data, steps_per_epoch=1)
    parts = [optimizer.inner_optimizer.iterations, optimizer.inner_optimizer.variables[1]]
    return [*model.get_weights(), *(v.numpy() for v in parts)]


@pytest.mark.parametrize(
    "what", ["nothing", pytest.param("weights", marks=pytest.mark.slow), "optimizer"]
)
def test_what_the_chief_alone_has_loaded(pair, what):
    results = pair.run(weights_of_the_chief_alone, what)
    alike(results)
    said = "tf_blockmomentum: worker 1 began with other weights than worker 0, and took its"
    assert [said in text for text in pair.output] == [what != "nothing", False]
    if what != "nothing":
        assert results[0][0].mean() > 3
    if what == "optimizer":
        assert results[0][-2] == 6 + 1 + 1


def other_models(strategy, units, use_bias):
    index = worker_of(strategy)[0]
    with strategy.scope():
        dense = keras.layers.Dense(units[index], use_bias=use_bias[index])
        keras.Sequential([keras.Input([3]), dense, keras.layers.Dense(1)])


@pytest.mark.parametrize(
    ("units", "use_bias", "words"),
    [
        pytest.param(
            [1, 2], [True, True],
            "At the making of a variable named 'kernel', the workers have",
            marks=pytest.mark.slow,  # each starts two workers
        ),
        ([1, 1], [True, False], "is at the making of a variable named 'bias', and worker"),
    ],
)  # fmt: skip
def test_other_models(pair, units, use_bias, words):
    for error in pair.run(other_models, units, use_bias, expect_error=True):
        assert error.type == "RuntimeError"
        assert words in error.text.replace("'kernel', and", "'bias', and")


def fits_in_a_row(strategy, overlap):
    """Three fits of one epoch, and one of three; Adam's state and the velocity go on."""
    results = []
    for epochs in ([1, 1, 1], [3]):
        model, data = model_of(strategy, overlap=overlap), data_of(strategy)
        for n in epochs:
            fit(model, data, epochs=n)
        results.append([*model.get_weights(), model.optimizer.blocks])
    return results


@pytest.mark.parametrize("overlap", ENOUGH)
def test_fits_in_a_row_equal_one(pair, overlap):
    for several, one in pair.run(fits_in_a_row, overlap):
        alike([several, one])


class Sets(keras.callbacks.Callback):
    """Sets weights at a moment of the second epoch."""

    def __init__(self, hook, change, low_level=False):
        super().__init__()
        self.change, self.low_level, self.done = change, low_level, False
        setattr(self, hook, self.set)
        self.epoch = -1

    def on_epoch_begin(self, epoch, logs=None):
        pass

    def set(self, n, logs=None):
        blocks = self.model.optimizer.blocks
        if blocks >= 3 and not self.done:
            self.done = True
            for v in self.model.trainable_variables:
                target = v.value if self.low_level else v
                target.assign(self.change(v.numpy()))


def halve(w):
    return 0 * w + 0.5


def mask(w):
    return w * (np.arange(w.size).reshape(w.shape) % 2).astype(w.dtype)


def set_by_a_callback(strategy, hook, overlap, low_level=False):
    """A rate of 0 from the second epoch on: the weights stay what the callback makes of them,
    though the velocity is not 0 (it was trained before), if the callback comes last."""
    model, data = model_of(strategy, "SGD", 0.0, overlap=overlap), data_of(strategy, steps=7)
    fit(model, data, Sets(hook, halve, low_level), epochs=3)
    return model.get_weights()


@pytest.mark.parametrize(
    ("hook", "overlap"),
    [
        ("on_epoch_begin", True),
        ("on_train_batch_end", False),
        pytest.param("on_epoch_begin", False, marks=pytest.mark.slow),
        pytest.param("on_train_batch_end", True, marks=pytest.mark.slow),
    ],
)
def test_weights_set_by_a_callback_stay(pair, hook, overlap):
    for weights in pair.run(set_by_a_callback, hook, overlap):
        for w in weights:
            np.testing.assert_array_equal(w, 0 * w + 0.5)


def test_and_those_set_in_tensorflow_between_epochs(pair):
    for weights in pair.run(set_by_a_callback, "on_epoch_begin", False, low_level=True):
        for w in weights:
            np.testing.assert_array_equal(w, 0 * w + 0.5)


class Prunes(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        for w in self.model.trainable_variables:
            w.assign(mask(w.numpy()))


def pruned(strategy, overlap):
    model, data = model_of(strategy, overlap=overlap), data_of(strategy)
    fit(model, data, Prunes(), epochs=2)
    return model.get_weights()


@pytest.mark.parametrize("overlap", ENOUGH)
def test_a_mask_at_every_batch(pair, overlap):
    """Each worker masks its own weights in mid-block, which are unlike: their mean goes on."""
    results = pair.run(pruned, overlap)
    alike(results)
    for w in results[0]:
        np.testing.assert_array_equal(w, mask(w))
        assert w.size == 1 or np.abs(w).max() > 0


def set_on_the_chief_alone(strategy):
    model, data = model_of(strategy), data_of(strategy)
    fit(model, data, tfbm.ChiefOnly(Sets("on_train_batch_end", halve)), epochs=2)


def test_weights_set_on_the_chief_alone_are_an_error(pair):
    for error in pair.run(set_on_the_chief_alone, expect_error=True):
        assert error.type == "RuntimeError"
        assert "set in the middle of training on some workers only: on worker 0, not on" in (
            error.text
        )


def comes_apart(strategy):
    model, data = model_of(strategy), data_of(strategy)

    class Nudge(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if worker_of(strategy)[0]:
                anchor = self.model.optimizer.anchors[0]
                anchor.assign(anchor * 1.01)

    fit(model, data, Nudge())


def test_workers_that_have_come_apart_are_an_error(pair):
    for error in pair.run(comes_apart, expect_error=True):
        assert error.type == "RuntimeError"
        assert "The workers have come apart" in error.text
        assert "worker 1 has another one than worker 0" in error.text


class Interrupts(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:  # in the middle of a block
            raise KeyboardInterrupt


def interrupted(strategy, overlap):
    model, data = model_of(strategy, overlap=overlap), data_of(strategy)
    with contextlib.suppress(KeyboardInterrupt):
        fit(model, data, Interrupts())
    before = model.get_weights()
    fit(model, data, epochs=2)
    return [*model.get_weights(), model.optimizer.blocks], before


@pytest.mark.parametrize("overlap", ENOUGH)
def test_after_an_interrupted_fit_all_go_on_from_the_chief(pair, overlap):
    (got, before), (other, its_before) = pair.run(interrupted, overlap)
    assert not np.array_equal(before[0], its_before[0])
    alike([got, other])


def best_restored(strategy):
    """EarlyStopping puts the best weights back at the end; the next fit begins there."""
    model, data = model_of(strategy, "SGD"), data_of(strategy)
    fit(model, data, epochs=1)
    best = model.get_weights()

    class Worse(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["value"] = float(epoch)

    stop = keras.callbacks.EarlyStopping(
        "value", mode="min", patience=2, restore_best_weights=True
    )
    first = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (
            best.__setitem__(slice(None), model.get_weights()) if epoch == 0 else None
        )
    )
    counter = Counter()
    fit(model, data, Worse(), first, stop, counter, epochs=9)
    restored = model.get_weights()
    model.optimizer.learning_rate = 0.0
    fit(model, data, steps_per_epoch=K)
    return best, restored, model.get_weights(), counter.batches


def test_the_best_weights_are_the_next_anchor(pair):
    for best, restored, after, batches in pair.run(best_restored):
        alike([best, restored])
        assert batches == 3 * 6
        # The velocity goes on, as momentum does in Keras.
        assert not np.array_equal(restored[0], after[0])


def test_an_assignment_is_the_variables_own():
    """Not that of another one, which is no more, and whose place in memory it has."""
    from tf_blockmomentum._private.keras import take_assigned

    seen = set()
    for _ in range(200):  # a place in memory is soon used again
        v = keras.Variable(0.0)
        if id(v) in seen:
            break
        seen.add(id(v))
        v.assign(1.0)
        v = None
    else:
        pytest.skip("no place in memory was used again")
    assert take_assigned([v]) == []
    v.assign(2.0)
    assert take_assigned([v])[0] is v
    assert take_assigned([v]) == []
