"""Faults of Keras's and TensorFlow's that this package works round, shown without it.

Where a test here fails, the fault is gone from the versions installed: its docstring names what
can then go from the package, once the oldest supported versions are without it too. Not here,
since a test of it would wait or be a matter of luck: the buffer on the device
(`inputs.no_device_buffer`, a crash in one of some 60 fits), an iterator that is left over when
the process ends (`data.Data`), one whose deletion takes as long as it has lived
(`_private.tensorflow.InUse`), and SIGTERM's handler, which tests/test_failures.py has.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

ON_READ = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA,
}


@pytest.fixture(scope="module")
def mirrored():
    """TensorFlow's own strategy, of two devices."""
    tf.distribute.MirroredStrategy._collective_key_base += 100000  # as in conftest
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def run(strategy, function):
    """In each replica, in a graph; a list of what it returns there."""
    outputs = tf.function(lambda: strategy.run(function), autograph=False)()
    return strategy.experimental_local_results(outputs)


# -- reductions -------------------------------------------------------------------------------


def stock_reductions(strategy):
    """By the method that ours overrides, of values as Keras gives them."""
    reduce = tf.distribute.MultiWorkerMirroredStrategy.reduce
    data = tf.data.Dataset.from_tensor_slices(np.ones([4, 2])).batch(4)
    batch = next(iter(strategy.experimental_distribute_dataset(data)))
    loss = strategy.run(tf.zeros, args=([],))
    errors = []
    for value, axis in (((batch, batch), None), (loss, 0)):
        try:
            reduce(strategy, "MEAN", value, axis)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_what_keras_reduces(pair):
    """`BlockStrategy.reduce` (keras issue 20585)."""
    for batch, loss in pair.run(stock_reductions):
        assert "Attempt to convert a value (PerReplica" in batch
        assert "Invalid reduction dimension 0" in loss


def stock_evaluation(strategy):
    """By Keras's own loop of `steps_per_execution` steps, which asks in a branch of a loop, over
    all workers, whether there is more data, and reduces there what a step returns."""
    with strategy.scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        model.compile(loss="mse", steps_per_execution=2)
    stock = functools.partial(keras.Model.make_test_function.__wrapped__, model)
    model.make_test_function = stock
    try:
        return model.evaluate(np.ones([16, 2]), np.ones([16, 1]), batch_size=4, verbose=0)
    except tf.errors.InvalidArgumentError as error:
        return str(error)


def test_collectives_in_a_loop(pair):
    """That Python decides where blocks end (`BlockLoop`), that `evaluate` has steps of ours
    (`make_test_function`), and that stock optimizers take no `steps_per_execution`."""
    for said in pair.run(stock_evaluation):
        assert "You must feed a value for placeholder" in str(said)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_dtypes_of_collectives(mirrored, dtype):
    """`wire_dtype`, `BlockStrategy.gather`, `broadcast_initial_values_of_any_dtype`."""
    keys = {"group_size": 1, "group_key": 99991, "instance_key": 99991}
    with pytest.raises((TypeError, tf.errors.OpError)):
        tf.raw_ops.CollectiveBcastSend(input=tf.zeros([1], dtype), shape=[1], **keys)
    values = mirrored.run(lambda: tf.zeros([2], dtype))
    with pytest.raises(TypeError, match="not in list of allowed values"):
        mirrored.gather(values, 0)


def test_reading_a_metric_to_reset_it(mirrored, monkeypatch):
    """That `reset_metrics` is answered locally: under several workers all would have to call."""
    with mirrored.scope():
        metric = keras.metrics.Mean()
    calls, reduce = [], mirrored.reduce
    monkeypatch.setattr(mirrored, "reduce", lambda *a, **k: (calls.append(a), reduce(*a, **k))[1])
    metric.reset_state()
    assert calls


# -- variables and optimizers ------------------------------------------------------------------


def test_numbers_of_variables(mirrored):
    """`as_a_number`."""
    with mirrored.scope():
        v = tf.Variable(1.0)
    with pytest.raises(TypeError):
        float(v)


def test_sparse_updates(mirrored):
    """`LocalUpdate.assign`, `assign_add` and `assign_sub`."""
    with mirrored.scope():
        v = tf.Variable(tf.zeros([3, 2]), **ON_READ)
    rows = tf.IndexedSlices(tf.ones([1, 2]), [1], [3, 2])
    with pytest.raises(NotImplementedError):
        run(mirrored, lambda: v.scatter_sub(rows))


@pytest.mark.parametrize("scaling", [False, True])
def test_updates_in_a_compiled_step(mirrored, scaling):
    """`LocalUpdate` (keras issue 17187), and `_tf_apply` in `_local_class` (keras issue 18666):
    Keras's optimizers communicate in every update, and not from a function within the step."""
    with mirrored.scope():
        v = keras.Variable([1.0])
        optimizer = keras.optimizers.SGD(0.1)
        if scaling:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build([v])
    step = tf.function(lambda: optimizer.apply([tf.ones([1])], [v]), autograph=False)
    with pytest.raises(RuntimeError, match="merge_call"):
        run(mirrored, lambda: step())


def test_xla_for_each_replica(mirrored):
    """The plain function around the compiled one (`LocalSteps._replica_step`), and
    `_without_jit` for `predict` (tensorflow issue 53140)."""
    with mirrored.scope():
        v = tf.Variable(1.0, **ON_READ)
    step = tf.function(lambda: v + 1.0, jit_compile=True, autograph=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="located in device"):
        tf.function(lambda: mirrored.run(step), autograph=False)()
    assert [float(x) for x in run(mirrored, lambda: step())] == [2, 2]


def test_random_numbers_of_replicas(mirrored):
    """`give_replicas_different_seeds`: all would drop the same units."""
    with mirrored.scope():
        generator = keras.random.SeedGenerator(1)
    one, other = run(mirrored, lambda: keras.random.uniform([3], seed=generator))
    np.testing.assert_array_equal(one, other)


def test_compile_arguments():
    """`recompile`, which takes the arguments as they were given."""

    def loss(y, y_pred):
        return keras.ops.mean(y_pred - y)

    model = keras.Sequential([keras.Input([2])])
    model.compile("sgd", loss)
    with pytest.raises(TypeError, match="Could not locate function"):
        model.compile_from_config(model.get_compile_config())


# -- data -------------------------------------------------------------------------------------


def test_inputs_that_are_none(mirrored):
    """`mark_none` and `none_for_marks` (tensorflow issue 54900)."""
    data = tf.data.Dataset.from_tensor_slices(np.ones([4, 2])).batch(4).map(lambda x: (x, None))
    iterator = iter(mirrored.experimental_distribute_dataset(data))
    with pytest.raises(AttributeError, match="NoneTensorSpec"):
        tf.function(lambda it: next(it), autograph=False)(iterator)


def test_memory_of_a_generators_arrays(mirrored):
    """`_copied`: what a replica is given is the user's own array, aligned as TensorFlow wants
    it, and an operation of the step that works in place works there."""
    room = np.zeros(8 + 8)
    begin = (-room.ctypes.data // 8) % 8
    array = room[begin : begin + 8]
    spec = tf.TensorSpec([8], "float64")
    data = tf.data.Dataset.from_generator(lambda: iter([array]), output_signature=spec)
    batch = next(iter(mirrored.experimental_distribute_dataset(data)))
    array += 1
    assert mirrored.experimental_local_results(batch)[0].numpy()[0] == 1


def small_model(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    return model


def test_a_first_look_at_the_data(mirrored):
    """`_maybe_symbolic_build` (keras issues 20394, 20425): to learn shapes, Keras draws a batch,
    by an iterator of its own over the dataset."""
    begun = []

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return np.ones([4, 2], "float32"), np.zeros([4, 1], "float32")

        def on_epoch_begin(self):
            begun.append(1)

    small_model(mirrored).fit(Data(), verbose=0)
    assert len(begun) > 1


class WithoutCall(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def train_step(self, data):
        return {"mean": tf.reduce_mean(self.dense(data[0]))}


@pytest.mark.filterwarnings("ignore:Layer 'without_call' looks like:UserWarning")
@pytest.mark.filterwarnings("ignore:`build\\(\\)` was called on layer:UserWarning")
def test_a_model_without_call(mirrored):
    """The RuntimeError that `build` looks over: Keras asks for a `call` under a strategy alone."""
    data = np.ones([4, 2], "float32"), np.ones([4, 1], "float32")
    alone = WithoutCall()
    alone.compile("sgd")
    alone.fit(*data, verbose=0)
    with mirrored.scope():
        model = WithoutCall()
        model.compile("sgd")
    with pytest.raises(RuntimeError, match="Unable to automatically build"):
        model.fit(*data, verbose=0)


def test_predictions_of_one_batch(mirrored):
    """`predict_on_batch` of ours."""
    assert small_model(mirrored).predict_on_batch(np.ones([3, 2])).shape == (6, 1)


# -- KerasTuner --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # KerasTuner's own
def test_a_grid_search_that_goes_on(tmp_path):
    """`resume_grid_search` (keras-tuner issue 1055)."""
    keras_tuner = pytest.importorskip("keras_tuner")

    def oracle():
        values = keras_tuner.HyperParameters()
        values.Int("units", 1, 3)
        oracle = keras_tuner.oracles.GridSearchOracle(
            objective=keras_tuner.Objective("loss", "min"), hyperparameters=values
        )
        oracle._set_project_dir(tmp_path, "search")
        return oracle

    before = oracle()
    trial = before.create_trial("tuner")
    before.update_trial(trial.trial_id, {"loss": 1.0})
    trial.status = "COMPLETED"
    before.end_trial(trial)
    before.save()
    after = oracle()
    after.reload()
    assert after.create_trial("tuner").status == "STOPPED"  # after one of three
