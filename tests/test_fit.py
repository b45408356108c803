"""model.fit, evaluate and predict: everything a Keras user does, in blocks."""

import logging
import threading
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    Counter,
    classifier,
    crossentropy,
    dataset,
    examples,
    replica_values,
    scope,
    unknown_length,
)

import tf_blockmomentum as tfbm
from tf_blockmomentum._private.tensorflow import InUse, plain_iterator


def compiled(strategy, model=None, sync_period=4, inner=None, **settings):
    with scope(strategy):
        keras.utils.set_random_seed(0)
        model = model() if model else classifier()
        optimizer = tfbm.BlockMomentum(
            inner() if inner else keras.optimizers.SGD(0.1), sync_period
        )
        settings = {"loss": crossentropy(), "metrics": ["accuracy"], **settings}
        model.compile(optimizer, **settings)
    return model


def fit(model, *data, **settings):
    callbacks = [tfbm.BlockTraining(), *settings.pop("callbacks", [])]
    return model.fit(*data, verbose=0, callbacks=callbacks, **settings).history


# 96 examples in batches of 16: 6 steps an epoch.
@pytest.mark.parametrize(
    ("sync_period", "blocks", "known"),
    [
        pytest.param(1, [6, 12], True, marks=pytest.mark.slow),
        pytest.param(3, [2, 4], False, marks=pytest.mark.slow),
        pytest.param(4, [2, 4], True, marks=pytest.mark.slow),
        (4, [2, 4], False),
        pytest.param(50, [1, 2], False, marks=pytest.mark.slow),
    ],
)
def test_steps_per_execution_changes_nothing(strategy_of, sync_period, blocks, known):
    """Whether it divides K or not: same weights, same blocks; validation sees the anchor."""
    x, y = examples()
    results = []
    for steps_per_execution in (1, 4):
        model = compiled(strategy_of(2), sync_period=sync_period,
                         steps_per_execution=steps_per_execution)  # fmt: skip
        counter = Counter()
        data = dataset(x, y) if known else unknown_length(dataset(x, y))
        history = fit(model, data, epochs=2, validation_data=dataset(x, y), callbacks=[counter])
        assert counter.blocks_at_validation == counter.blocks_at_epoch_end == blocks
        assert counter.batches == 12 // steps_per_execution + (steps_per_execution == 4)
        results.append((model.get_weights(), history))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for name, values in results[0][1].items():
        np.testing.assert_allclose(values, results[1][1][name], rtol=1e-5)
    assert results[0][1]["val_loss"][1] < results[0][1]["val_loss"][0]


def test_steps_per_epoch_counts_whole_executions_as_keras_does():
    """3 steps an epoch in executions of 2 are 4; the batches go on where they stopped."""
    x, y = examples()
    results = []
    for ours in (False, True):
        keras.utils.set_random_seed(0)
        model, inner = classifier(), keras.optimizers.Adam(0.01)
        optimizer = tfbm.BlockMomentum(inner, 3, block_momentum=0.0) if ours else inner
        model.compile(optimizer, crossentropy(), steps_per_execution=2)
        callbacks = [tfbm.BlockTraining(refresh_statistics=0)] if ours else []
        data = dataset(x, y, 8)  # 12 batches
        model.fit(data, epochs=2, steps_per_epoch=3, verbose=0, callbacks=callbacks)
        results.append([int(inner.iterations), *model.get_weights()])
    assert results[0][0] == results[1][0] == 8
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_validation_sees_the_anchor_on_every_replica(strategy_of):
    """In mid-block weights differ; when validation begins they are equal on all replicas."""
    x, y = examples()
    seen = {"train": [], "test": []}

    class Spread(keras.callbacks.Callback):
        def spread(self):
            a, b = replica_values(self.model.trainable_variables[0])
            return float(np.abs(a - b).max())

        def on_train_batch_end(self, batch, logs=None):
            seen["train"].append(self.spread())

        def on_test_begin(self, logs=None):
            seen["test"].append(self.spread())

    model = compiled(strategy_of(2))
    fit(model, dataset(x, y), validation_data=dataset(x, y), callbacks=[Spread()])
    assert [s > 0 for s in seen["train"]] == [True, True, True, False, True, False]
    assert seen["test"] == [0.0]


def test_epoch_logs_are_exact_global_metrics(strategy_of):
    """With a learning rate of 0 an epoch's logs are an evaluation of the data, in which
    96 - 3 = 93 examples leave a last batch that the replicas share unevenly."""
    x, y = (part[:93] for part in examples())
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
        optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.0), sync_period=4)
        model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    logs = np.asarray(model.predict(x, verbose=0))
    want = {
        "accuracy": np.mean(logs.argmax(1) == y),
        "loss": float(crossentropy()(y, logs)),
    }
    history = fit(model, x, y, batch_size=16, validation_data=(x, y))
    for name, value in want.items():
        assert history["val_" + name][0] == pytest.approx(value, rel=1e-5)
        assert history[name][0] == pytest.approx(value, rel=1e-5)


def test_a_last_batch_smaller_than_the_replicas(strategy_of):
    """65 = 4 * 16 + 1 examples: the other replica has no example in the last step."""
    x, y = (part[:65] for part in examples())
    model = compiled(strategy_of(2), sync_period=5)
    history = fit(model, x, y, batch_size=16, epochs=2, shuffle=False)
    assert model.optimizer.blocks == 2
    assert np.isfinite(history["loss"]).all()
    for weight in model.trainable_variables:
        assert np.array_equal(*replica_values(weight))
    assert np.isfinite(model.evaluate(x, y, batch_size=16, verbose=0)).all()
    assert model.predict(x, batch_size=16, verbose=0).shape == (65, 3)


def test_nothing_is_traced_after_the_first_block(strategy_of):
    traces = []

    class Traced(keras.Sequential):
        def train_step(self, data):
            traces.append("train")
            return super().train_step(data)

        def test_step(self, data):
            traces.append("test")
            return super().test_step(data)

    x, y = examples()
    layers = [keras.Input([6]), keras.layers.Dense(3)]
    model = compiled(strategy_of(2), lambda: Traced(layers), steps_per_execution=3)
    boundaries = []

    class AfterFirstBlock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            boundaries.append((self.model.optimizer.blocks, traces.count("train")))

    data = {"x": x, "y": y, "batch_size": 16, "epochs": 2, "validation_data": (x, y)}
    fit(model, **data, callbacks=[AfterFirstBlock()])
    assert boundaries[-1][0] == 4
    assert boundaries[0][1] == boundaries[-1][1]
    count = len(traces)
    assert count > 0
    fit(model, **data)  # nor in a second fit, with a callback of its own
    assert len(traces) == count
    assert model.optimizer.blocks == 8
    model.compile(model.optimizer, crossentropy())
    fit(model, x, y, batch_size=16)
    assert len(traces) > count


def test_many_dropout_layers_make_tensorflow_warn_of_no_retracing(strategy_of):
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())

    def with_dropout():
        dropout = [keras.layers.Dropout(0.1) for _ in range(8)]
        return keras.Sequential([keras.Input([6]), *dropout, keras.layers.Dense(3)])

    model = compiled(strategy_of(2), with_dropout)
    tf.get_logger().addHandler(handler)
    try:
        fit(model, *examples(), batch_size=16)
    finally:
        tf.get_logger().removeHandler(handler)
    # Of other functions it may warn, which other tests have traced too.
    assert not [text for text in warnings if "retracing" in text and "replica_ids" in text]


def test_own_train_step_weights_and_several_inputs(strategy_of):
    """A custom train_step; two inputs, two outputs; sample and class weights."""

    class Own(keras.Model):
        def train_step(self, data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True), sample_weight)
            self.optimizer.apply(tape.gradient(loss, self.trainable_weights),
                                 self.trainable_weights)  # fmt: skip
            return {"own_loss": loss}

    def build(cls):
        a, b = keras.Input([4], name="a"), keras.Input([2], name="b")
        h = keras.layers.Dense(8, activation="relu")(keras.layers.Concatenate()([a, b]))
        outputs = {
            "p": keras.layers.Dense(3, name="p")(h),
            "q": keras.layers.Dense(1, name="q")(h),
        }
        return cls([a, b], outputs)

    x, y = examples()
    inputs = {"a": x[:, :4], "b": x[:, 4:]}
    targets = {"p": y, "q": x[:, :1]}
    weights = np.linspace(0, 2, len(x)).astype("float32")
    results = []
    for cls in (keras.Model, Own):
        model = compiled(
            strategy_of(2), lambda c=cls: build(c), loss={"p": crossentropy(), "q": "mse"},
            metrics=None,
        )  # fmt: skip
        history = fit(model, inputs, targets, sample_weight={"p": weights, "q": weights},
                      batch_size=16, shuffle=False)  # fmt: skip
        results.append(model.get_weights())
    assert list(history) == ["own_loss"]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    # A class weight is that sample weight.
    results = []
    for how in ({"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}},
                {"sample_weight": np.array([1.0, 3.0, 0.5])[y]}):  # fmt: skip
        model = compiled(strategy_of(2))
        fit(model, x, y, batch_size=16, shuffle=False, **how)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("jit", "steps_per_execution"),
    [
        (True, 3),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((False, 1), (True, 1), (False, 3))),
    ],
)
def test_evaluate_and_predict_before_any_fit(strategy_of, jit, steps_per_execution):
    x, y = examples()
    results = []
    for strategy in (strategy_of(2), None):
        model = compiled(strategy, jit_compile=jit, steps_per_execution=steps_per_execution)
        loss, accuracy = model.evaluate(x, y, batch_size=16, verbose=0)
        outputs = model.predict(x, batch_size=16, verbose=0)
        model.reset_metrics()  # older Keras goes on from evaluate's
        results.append([loss, accuracy, outputs, model.test_on_batch(x[:16], y[:16])])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    history = fit(compiled(strategy_of(2), jit_compile=jit), x, y, batch_size=16)
    assert history["loss"][0] > 0


def test_a_list_of_callbacks_that_the_user_made(strategy_of):
    """Keras tells the callbacks of such a list about the model when it is made, not in fit."""
    x, y = examples()
    model = compiled(strategy_of(2), sync_period=4)
    callbacks = keras.callbacks.CallbackList(
        [tfbm.BlockTraining()], add_history=True, model=model, epochs=2, steps=6
    )
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks)
    assert len(history.history["loss"]) == 2
    assert model.optimizer.blocks == 4


def test_chief_only_hands_its_callback_the_params(strategy_of):
    """Keras gives callbacks their model before the params of the fit; another caller may not."""
    seen = []

    class Reads(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((self.params["epochs"], self.params["steps"], self.model.optimizer.blocks))

    x, y = examples()
    model = compiled(strategy_of(2), sync_period=4)
    fit(model, x, y, batch_size=16, epochs=2, callbacks=[tfbm.ChiefOnly(Reads())])
    assert seen == [(2, 6, 2), (2, 6, 4)]
    chief_only = tfbm.ChiefOnly(Reads())
    chief_only.set_params({"epochs": 3, "steps": 5})
    chief_only.set_model(model)
    chief_only.on_epoch_end(0)
    assert seen[2:] == [(3, 5, 4)]


@pytest.mark.parametrize(
    "inner", [pytest.param(keras.optimizers.SGD, marks=pytest.mark.slow), keras.optimizers.Adam]
)
def test_a_stock_optimizer_trains_synchronously(strategy_of, inner):
    """Keras's own optimizers sum gradients over the replicas at every step, as ever."""
    x, y = examples()
    results = []
    for strategy in (strategy_of(2), None):
        with scope(strategy):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
            model.compile(inner(0.05), crossentropy(), metrics=["accuracy"])
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_steps_per_epoch_goes_on_with_the_data(strategy_of):
    """An endless dataset, whose epochs end where the user says; the last one is cut."""
    x, y = examples()
    model = compiled(strategy_of(2), steps_per_execution=2)
    counter = Counter()
    fit(model, dataset(x, y).repeat(), steps_per_epoch=5, epochs=3, callbacks=[counter])
    assert counter.blocks_at_epoch_end == [2, 4, 6]
    assert int(model.optimizer.iterations.numpy()) == 18  # three executions of two, as in Keras
    # Promised more than there is: Keras warns, and the block that was begun is ended.
    model = compiled(strategy_of(2), sync_period=4)
    with pytest.warns(UserWarning, match="ran out of data"):
        fit(model, unknown_length(dataset(x, y)), steps_per_epoch=50)
    assert model.optimizer.blocks == 2
    assert int(model.optimizer.iterations.numpy()) == 6
    for weight in model.trainable_variables:
        assert np.array_equal(*replica_values(weight))


def test_stopping_in_mid_epoch_ends_the_block(strategy_of):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 2

    x, y = examples()
    model = compiled(strategy_of(2), sync_period=4)
    fit(model, dataset(x, y), epochs=3, callbacks=[Stop()])
    assert model.optimizer.blocks == 1
    assert int(model.optimizer.iterations.numpy()) == 3
    for weight in model.trainable_variables:
        assert np.array_equal(*replica_values(weight))


def test_weights_set_between_fits_are_the_new_anchor(strategy_of):
    x, y = examples()
    model = compiled(strategy_of(2), inner=lambda: keras.optimizers.SGD(0.0))
    fit(model, x, y, batch_size=16)
    weights = [np.full_like(w, 0.25) for w in model.get_weights()]
    model.set_weights(weights)
    fit(model, x, y, batch_size=16)
    trained = {id(v) for v in model.trainable_variables}
    for variable, want in zip(model.weights, weights, strict=True):
        if id(variable) in trained:
            np.testing.assert_array_equal(variable.numpy(), want)


@pytest.mark.slow  # test_dtypes has the like
def test_run_eagerly(strategy_of):
    x, y = examples()
    results = []
    for run_eagerly in (False, True):
        model = compiled(strategy_of(2), run_eagerly=run_eagerly)
        fit(model, dataset(x, y), validation_data=dataset(x, y))
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_distributed_dataset_and_generator(strategy_of):
    """Data in the other forms that fit takes."""
    x, y = examples()
    strategy = strategy_of(2)
    results = []
    for make in (
        lambda: dataset(x, y),
        lambda: strategy.experimental_distribute_dataset(dataset(x, y)),
        lambda: tf.data.Dataset.from_generator(
            lambda: iter(dataset(x, y)),
            output_signature=(tf.TensorSpec([None, 6]), tf.TensorSpec([None], tf.int64)),
        ),
    ):
        model = compiled(strategy)
        fit(model, make())
        assert model.optimizer.blocks == 2
        results.append(model.get_weights())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_one_device_reads_a_plain_iterator(monkeypatch, strategy_of, steps_per_execution):
    """And it trains as with TensorFlow's, of data that ends within an execution."""
    data = tf.data.Dataset.from_tensor_slices(examples(88)).batch(16)
    assert plain_iterator(iter(strategy_of(2).experimental_distribute_dataset(data))) is None
    weights = []
    for found in (plain_iterator, lambda iterator: None):
        monkeypatch.setattr("tf_blockmomentum.feed.plain_iterator", found)
        strategy = tfbm.MultiDeviceBlockStrategy(["CPU:0"])
        assert plain_iterator(iter(strategy.experimental_distribute_dataset(data))) is not None
        model = compiled(strategy, steps_per_execution=steps_per_execution)
        fit(model, data, epochs=2)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_idle_iterator_reads_ahead_on_the_host_only(strategy_of):
    """A buffer on the device crashed workers, see `strategy._no_device_buffer`."""
    reads = []

    def read(x):
        reads.append(len(x))
        return x

    dataset = tf.data.Dataset.range(64).batch(4)
    dataset = dataset.map(lambda x: tf.ensure_shape(tf.numpy_function(read, [x], tf.int64), [4]))
    iterator = iter(strategy_of(2).experimental_distribute_dataset(dataset))
    time.sleep(0.3)
    assert reads == []
    next(iterator)
    time.sleep(0.3)
    assert len(reads) <= 3  # of 4 that TensorFlow would have read by now


def test_iterators_are_deleted_where_nobody_waits_for_it(strategy_of, monkeypatch):
    """TensorFlow may take as long again to delete an iterator as that has lived: neither the next
    epoch, nor the end of an evaluation, nor the end of fit waits for it."""
    deleted = []
    hold = InUse.hold

    def watching(self, iterator):
        new = iterator is not self._iterator
        hold(self, iterator)
        if new:
            weakref.finalize(iterator, lambda: deleted.append(threading.current_thread()))

    monkeypatch.setattr(InUse, "hold", watching)
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), 2), "mse")
    x, y = np.ones([8, 3], "float32"), np.ones([8, 1], "float32")
    model.fit(
        x, y, 2, epochs=3, validation_data=(x, y), verbose=0, callbacks=[tfbm.BlockTraining()]
    )
    model.evaluate(x, y, verbose=0)
    until = time.monotonic() + 60
    while len(deleted) < 7 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(deleted) == 7  # three of training, three of validation, one of evaluate
    assert threading.main_thread() not in deleted
