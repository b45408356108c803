"""What evaluate, fit's logs and predict report is of one model, and the same on every worker."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import scope
from test_same_start import alike

import tf_blockmomentum as tfbm
from tf_blockmomentum.strategy import worker_of


def task(examples=48):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[examples, 3]).astype("float32")
    x[examples // 2 :] += 2  # no batch is like another
    return x, (x.sum(axis=1, keepdims=True) + rng.normal(size=[examples, 1])).astype("float32")


def linear(strategy, rate=0.0, inner=None, compiled=True, **settings):
    with scope(strategy):
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = keras.Sequential([keras.Input([3]), dense])
        inner = inner() if inner else keras.optimizers.SGD(rate)
        period = settings.pop("sync_period", 3)
        optimizer = tfbm.BlockMomentum(inner, sync_period=period) if strategy else inner
        if compiled:
            model.compile(optimizer, "mse", **settings)
    return model


def mean_square(x, y, weights=None):
    kernel, bias = weights or (np.ones([3, 1]), 0)
    return float(np.mean((x @ kernel + bias - y) ** 2))


# -- evaluate ------------------------------------------------------------------------------------


class Evaluates(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.notes = []

    def on_train_batch_end(self, batch, logs=None):
        if batch in (1, 2, 4):  # in mid-block, at its end, and in the next
            value = self.model.evaluate(*task(), batch_size=8, verbose=0)
            self.notes.append((value, mean_square(*task(), self.model.get_weights())))


def evaluates(strategy, overlap):
    with strategy.scope():
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = keras.Sequential([keras.Input([3]), dense])
        inner = keras.optimizers.SGD(0.02)
        model.compile(tfbm.BlockMomentum(inner, sync_period=3, overlap=overlap), "mse")
    looks = Evaluates()
    model.fit(
        *task(), batch_size=8, shuffle=False, verbose=0,
        callbacks=[tfbm.BlockTraining(), looks],
    )  # fmt: skip
    return looks.notes, model.get_weights()


@pytest.mark.parametrize("overlap", [False, True])
def test_evaluate_in_a_batch_callback(pair, overlap):
    (notes, weights), (other, its_weights) = pair.run(evaluates, overlap)
    alike([weights, its_weights])
    assert notes == other
    assert len(notes) == 3
    for value, by_hand in notes:
        assert value == pytest.approx(by_hand, rel=1e-5)


def evaluates_alone(strategy, where):
    model, chief = linear(strategy, 0.01), worker_of(strategy)[0] == 0
    evaluate = lambda *_: model.evaluate(*task(), batch_size=8, verbose=0)  # noqa: E731
    callbacks = [tfbm.BlockTraining()]
    if where == "in a callback":
        callbacks.append(tfbm.ChiefOnly(keras.callbacks.LambdaCallback(on_epoch_end=evaluate)))
    if where == "before the others" and chief:
        evaluate()
    model.fit(*task(), batch_size=8, epochs=2, verbose=0, callbacks=callbacks)


@pytest.mark.parametrize(
    "where", ["in a callback", pytest.param("before the others", marks=pytest.mark.slow)]
)
def test_evaluate_on_the_chief_alone_is_an_error_within_seconds(pair, where):
    for error in pair.run(evaluates_alone, where, expect_error=True, limit=60):
        assert error.type == "RuntimeError"
        assert "The workers wait for each other: worker" in error.text
        assert "evaluate's metrics" in error.text
        assert "has to be called by all workers" in error.text


def reads_alone(strategy):
    """What the chief may do alone: read, save, and take batches of its own."""
    model = linear(strategy, 0.01)
    model.fit(*task(), batch_size=8, verbose=0, callbacks=[tfbm.BlockTraining()])
    if worker_of(strategy)[0]:
        return None
    x, y = task()
    rows, loss = model.predict_on_batch(x[:5]), model.test_on_batch(x[:6], y[:6])
    return rows, loss, model(x[:5]).numpy(), mean_square(x[:6], y[:6], model.get_weights())


def test_what_the_chief_may_do_alone(pair):
    (rows, loss, called, by_hand), _ = pair.run(reads_alone)
    np.testing.assert_allclose(rows, called, rtol=1e-6)
    assert loss == pytest.approx(by_hand, rel=1e-5)


# -- data ----------------------------------------------------------------------------------------


def any_batches(strategy, form, size):
    """Evaluation and prediction with batches that three replicas cannot share evenly."""
    x, y = task(50)
    model = linear(strategy)
    given = {} if size is None or form == "dataset" else {"batch_size": size}
    if form == "dataset":
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size or 32)
        value = model.evaluate(data, verbose=0)
        rows = model.predict(data.map(lambda a, b: a), verbose=0)
    else:
        value = model.evaluate(x, y, verbose=0, **given)
        rows = model.predict(x, verbose=0, **given)
    arguments = (data,) if form == "dataset" else (x, y)
    with pytest.raises(ValueError, match="must divide by the number of replicas") as error:
        model.fit(*arguments, verbose=0, callbacks=[tfbm.BlockTraining()], **given)
    return value, rows, str(error.value)


@pytest.mark.parametrize(
    ("size", "form"),
    [
        (None, "arrays"),
        (7, "dataset"),
        pytest.param(7, "arrays", marks=pytest.mark.slow),
        pytest.param(None, "dataset", marks=pytest.mark.slow),
    ],
)
def test_batches_that_do_not_divide(triple, form, size):
    x, y = task(50)
    for value, rows, error in triple.run(any_batches, form, size):
        assert value == pytest.approx(mean_square(x, y), rel=1e-5)
        np.testing.assert_allclose(rows, x.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
        assert f"batches of {size or 32} for 3 replicas" in error


def several_files(strategy, folder, form):
    model = linear(strategy)
    names = sorted(str(path) for path in folder.glob("*.rows"))

    def parse(record):
        return tf.ensure_shape(tf.io.decode_raw(record, tf.float32), [3])

    data = tf.data.TFRecordDataset(names).map(parse).batch(4)
    if form == "distributed":
        data = strategy.experimental_distribute_dataset(data)
    return model.predict(data, verbose=0)


@pytest.mark.parametrize("form", ["dataset", "distributed"])
def test_predict_over_several_files(pair, tmp_path, form):
    x, _ = task(20)
    for i in range(4):
        with tf.io.TFRecordWriter(str(tmp_path / f"{i}.rows")) as writer:
            for row in x[5 * i : 5 * i + 5]:
                writer.write(row.tobytes())
    want = x.sum(axis=1, keepdims=True)
    if form == "distributed":
        pair.filters = [*pair.filters, "default:predict's rows come in the order:UserWarning"]
    for rows in pair.run(several_files, tmp_path, form):
        if form == "dataset":
            np.testing.assert_allclose(rows, want, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(np.sort(rows, 0), np.sort(want, 0), rtol=1e-5, atol=1e-6)
    for text in pair.output:
        assert ("predict's rows come in the order in which" in text) == (form == "distributed")


class Numbers(keras.utils.PyDataset):
    """Numbered examples, read ahead by threads."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.taken = []

    def __len__(self):
        return 6

    def __getitem__(self, i):
        part = np.arange(8 * i, 8 * i + 8, dtype="float32")[:, None]
        return part, part


def epochs_of(strategy, form):
    def number(y_true, y_pred):
        return y_true

    def square(y_true, y_pred):
        return y_true**2

    with scope(strategy):
        model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.0), sync_period=4)
        model.compile(optimizer, "mse", metrics=[number, square])
    data = Numbers(workers=2, max_queue_size=3)
    if form == "generator":

        def batches():
            while True:
                for i in range(6):
                    yield data[i]

        return model.fit(
            batches(), epochs=3, steps_per_epoch=6, verbose=0, callbacks=[tfbm.BlockTraining()]
        ).history
    return model.fit(data, epochs=3, verbose=0, callbacks=[tfbm.BlockTraining()]).history


@pytest.mark.parametrize("form", ["PyDataset", "generator"])
def test_each_example_once_an_epoch(pair, form):
    for history in pair.run(epochs_of, form):
        np.testing.assert_allclose(history["number"], [23.5] * 3, rtol=1e-6)
        np.testing.assert_allclose(
            history["square"], [np.mean(np.arange(48.0) ** 2)] * 3, rtol=1e-6
        )


def slices_of_weights(strategy):
    """A generator that yields slices of an array it keeps, aligned so that nobody copies it."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[48, 6]), rng.integers(3, size=[48])
    room = np.empty(48 + 8)
    begin = (-room.ctypes.data // 8) % 8
    weights = room[begin : begin + 48]
    weights[:] = rng.uniform(0.5, 2, size=48)
    before = weights.copy()

    def batches():
        while True:
            for i in range(0, 48, 16):
                yield x[i : i + 16], y[i : i + 16], weights[i : i + 16]

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        with strategy.scope():
            dense = keras.layers.Dense(3, activation="softmax")
            model = keras.Sequential([keras.Input([6]), dense])
            optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.05), sync_period=4)
            loss = "sparse_categorical_crossentropy"
            model.compile(optimizer, loss, steps_per_execution=2, jit_compile=False)
        for _ in range(3):
            model.fit(
                batches(), steps_per_epoch=3, epochs=5, verbose=0, callbacks=[tfbm.BlockTraining()]
            )
    finally:
        keras.config.set_floatx("float32")
    return before, weights


def test_a_generators_arrays_stay_as_they_are(pair):
    for before, after in pair.run(slices_of_weights):
        np.testing.assert_array_equal(before, after)


def own_arrays(strategy):
    x, y = task()
    own = slice(worker_of(strategy)[0], None, 2)
    model = linear(strategy)
    model.fit(x[own], y[own], batch_size=8, verbose=0, callbacks=[tfbm.BlockTraining()])


def test_a_shard_of_its_own_given_as_arrays(pair):
    with pytest.raises(Exception, match="fit was given other arrays on some workers"):
        pair.run(own_arrays)
    pair.filters = [*pair.filters, "default:fit was given other arrays:UserWarning"]
    pair.run(own_arrays)
    assert all("distribute_datasets_from_function" in text for text in pair.output)


# -- metrics -------------------------------------------------------------------------------------


def one_generator(strategy, anew):
    def batches():
        while True:
            yield from ((a[i : i + 8], b[i : i + 8]) for a, b in [task()] for i in (0, 8, 16))

    model, generator = linear(strategy), batches()
    for _ in range(2):
        x = batches() if anew else generator
        model.fit(x, steps_per_epoch=3, verbose=0, callbacks=[tfbm.BlockTraining()])


def test_one_generator_in_two_fits(pair):
    pair.run(one_generator, True)  # a warning is an error here
    for error in pair.run(one_generator, False, expect_error=True):
        assert error.type == "UserWarning"
        assert "fit was given a generator that an earlier fit has read from" in error.text


def no_data_on_one_worker(strategy, own_logs):
    class Own(keras.Sequential):
        def test_step(self, data):
            logs = super().test_step(data)
            return {"mine": logs["loss"] + 1} if own_logs else logs

    with scope(strategy):
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = Own([keras.Input([3]), dense])
        inner = keras.optimizers.SGD(0.0)
        model.compile(tfbm.BlockMomentum(inner, sync_period=3), "mse", metrics=["mae"])
    x, y = task()
    index = worker_of(strategy)[0]

    def shard(size):
        data = tf.data.Dataset.from_tensor_slices((x, y)).take(size if index == 0 else 0).batch(4)
        return strategy.distribute_datasets_from_function(lambda _: data)

    training = strategy.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    )
    return model.fit(
        training, validation_data=shard(8), epochs=2, verbose=0, callbacks=[tfbm.BlockTraining()]
    ).history


@pytest.mark.parametrize("own_logs", [False, True])
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_a_worker_without_validation_data(pair, own_logs):
    x, y = task()
    want = mean_square(x[:8], y[:8])
    for history in pair.run(no_data_on_one_worker, own_logs):
        np.testing.assert_allclose(history["loss"], [mean_square(x, y)] * 2, rtol=1e-5)
        if own_logs:  # a step's own numbers: of the last batch, of those that had one
            np.testing.assert_allclose(history["val_mine"], [want + 1] * 2, rtol=1e-5)
        else:
            np.testing.assert_allclose(history["val_loss"], [want] * 2, rtol=1e-5)


METRICS = [keras.metrics.AUC(name="auc"), keras.metrics.F1Score(threshold=0.5, name="f1")]


def metrics_of_another_scope(strategy):
    x, y = task()
    with scope(strategy):
        dense = keras.layers.Dense(1, activation="sigmoid", kernel_initializer="ones")
        model = keras.Sequential([keras.Input([3]), dense])
    optimizer = tfbm.BlockMomentum  # compiled outside the scope, too
    with scope(strategy):
        optimizer = optimizer(keras.optimizers.SGD(0.0), sync_period=2)
    model.compile(optimizer, "binary_crossentropy", metrics=METRICS)
    y = (y > 2).astype("float32")
    history = model.fit(
        x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[tfbm.BlockTraining()]
    ).history
    return history, model.evaluate(x, y, batch_size=8, return_dict=True, verbose=0)


def test_metrics_of_another_scope(pair):
    x, y = task()
    y = (y > 2).astype("float32")
    want = {}
    for metric in (keras.metrics.AUC(name="auc"), keras.metrics.F1Score(threshold=0.5, name="f1")):
        metric.update_state(y, 1 / (1 + np.exp(-x.sum(axis=1, keepdims=True))))
        want[metric.name] = np.array(metric.result())
    for history, evaluated in pair.run(metrics_of_another_scope):
        for name, value in want.items():
            np.testing.assert_allclose(history[name][0], value, rtol=1e-4)
            np.testing.assert_allclose(evaluated[name], value, rtol=1e-4)


def swapped(strategy, swap):
    inner = lambda: keras.optimizers.SGD(0.02, use_ema=True, ema_momentum=0.8)  # noqa: E731
    model = linear(strategy, inner=inner)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            seen.append(self.model.get_weights()[0])

    model.fit(
        *task(), batch_size=8, epochs=2, shuffle=False, verbose=0, validation_data=task(),
        validation_batch_size=24,
        callbacks=[
            tfbm.BlockTraining(), *([keras.callbacks.SwapEMAWeights()] if swap else []), Look()
        ],
    )  # fmt: skip
    return seen, model.get_weights()


def test_averaged_weights_in_validation(pair):
    (_, plain), _ = pair.run(swapped, False)
    (seen, weights), (other, its_weights) = pair.run(swapped, True)
    alike([seen, other])
    alike([weights, its_weights])
    for a, b in zip(weights, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
