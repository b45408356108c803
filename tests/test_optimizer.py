"""BlockMomentum as a Keras optimizer: the whole wrapper contract, around many optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import classifier, crossentropy, examples, replica_values, scope

import tf_blockmomentum as tfbm

INNER = {
    "sgd": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(0.1, 100), momentum=0.9
    ),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw_clipnorm": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.01, clipnorm=1.0),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.01, global_clipnorm=1.0),
    "lion": lambda: keras.optimizers.Lion(0.003),
    "muon": lambda: keras.optimizers.Muon(0.01, exclude_layers=["dense_out"]),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.02),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adamw_clipnorm_ema": lambda: keras.optimizers.AdamW(
        0.01, clipnorm=1.0, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
    ),
    "ema": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
    ),
    "accumulation": lambda: keras.optimizers.SGD(0.2, gradient_accumulation_steps=2),
}


def compiled(strategy, inner, **settings):
    with scope(strategy):
        model = classifier()
        settings = {"sync_period": 3, "block_momentum": 0.5, **settings}
        model.compile(
            tfbm.BlockMomentum(inner(), **settings), crossentropy(), metrics=["accuracy"]
        )
    return model


# Each compiles for ten seconds; what is peculiar about an optimizer is in this one.
QUICK = ("adamw_clipnorm_ema",)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in INNER],
)
def test_trains_evaluates_saves_and_reloads(strategy_of, tmp_path, name):
    """On two replicas, XLA and not; then the file gives back the compiled model."""
    x, y = examples()
    losses = {}
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        model = compiled(strategy_of(2), INNER[name])
        history = model.fit(
            x, y, batch_size=16, epochs=6, shuffle=False, verbose=0,
            callbacks=[tfbm.BlockTraining(jit_compile=jit)],
        )  # fmt: skip
        losses[jit] = history.history["loss"]
        assert model.optimizer.blocks == 12
        for variable in model.trainable_variables:
            a, b = replica_values(variable)
            np.testing.assert_array_equal(a, b)
    # Sharp optimizers (Lion's sign, Muon) magnify the last bits of the first steps.
    np.testing.assert_allclose(losses[False], losses[True], rtol=2e-2)
    after, accuracy = model.evaluate(x, y, batch_size=16, verbose=0)
    assert np.isfinite(after)
    assert after < 0.9 * losses[True][0]

    path = tmp_path / "model.keras"
    model.save(path)
    alone = keras.models.load_model(path)
    assert isinstance(alone.optimizer, tfbm.BlockMomentum)
    assert type(alone.optimizer.inner_optimizer).__name__ == type(INNER[name]()).__name__
    with strategy_of(2).scope():
        again = keras.models.load_model(path)
    assert model.optimizer.variables
    for loaded in (alone, again):
        for got, want in zip(
            [*loaded.optimizer.variables, *loaded.trainable_variables],
            [*model.optimizer.variables, *model.trainable_variables],
            strict=True,
        ):
            for value in replica_values(got):
                np.testing.assert_array_equal(value, want.numpy())
    history = alone.fit(x, y, batch_size=16, verbose=0, callbacks=[tfbm.BlockTraining()])
    assert alone.optimizer.blocks == 14
    assert history.history["loss"][0] < losses[True][0]
    assert alone.evaluate(x, y, verbose=0, batch_size=16)[1] > 0.9 * accuracy


def test_embeddings_train_with_sparse_gradients(strategy_of):
    """An embedding has a sparse gradient, and the local step must take it."""
    ids = np.arange(64).reshape(16, 4) % 7
    y = (ids.sum(1) % 2).astype("float32")
    results = []
    for sparse in (True, False):
        with strategy_of(2).scope():
            keras.utils.set_random_seed(0)
            embedding = keras.layers.Embedding(7, 3)
            head = [keras.layers.Flatten(), keras.layers.Dense(1)]
            model = keras.Sequential([keras.Input([4], dtype="int32"), embedding, *head])
            if not sparse:  # by a product with one-hot rows, the gradient is dense
                embedding.call = lambda i, e=embedding: keras.ops.matmul(
                    keras.ops.one_hot(i, 7), e.embeddings
                )
            inner = keras.optimizers.SGD(0.1, momentum=0.9)
            model.compile(tfbm.BlockMomentum(inner, sync_period=2), "mse")
        model.fit(ids, y, batch_size=8, shuffle=False, epochs=2, verbose=0,
                  callbacks=[tfbm.BlockTraining()])  # fmt: skip
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_learning_rate_goes_through(strategy_of):
    x, y = examples()
    model = compiled(strategy_of(2), lambda: keras.optimizers.SGD(0.1))
    seen = []

    class Rates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            inner = self.model.optimizer.inner_optimizer.learning_rate
            seen.append([float(v) for v in replica_values(inner)])

    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=100)
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)
    for callback in (schedule, plateau):
        model.fit(x, y, batch_size=16, epochs=2, verbose=0,
                  callbacks=[tfbm.BlockTraining(), callback, Rates()])  # fmt: skip
    assert [r[0] for r in seen] == pytest.approx([0.05, 0.025, 0.025, 0.0125])
    assert all(a == b for a, b in seen)
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.0125)
    with pytest.raises(TypeError, match="LearningRateSchedule"):
        compiled(None, INNER["sgd"]).optimizer.learning_rate = 0.1


def test_config_round_trip():
    inner = keras.optimizers.AdamW(0.01, weight_decay=0.1, clipnorm=2.0)
    made = tfbm.BlockMomentum(
        inner, sync_period=5, block_momentum=0.3, nesterov=True, block_learning_rate=0.9, name="o"
    )
    again = keras.optimizers.deserialize(keras.optimizers.serialize(made))
    assert isinstance(again, tfbm.BlockMomentum)
    assert again.get_config() == made.get_config()
    assert again.inner_optimizer.get_config() == inner.get_config()
    assert made.get_config()["inner_optimizer"]["class_name"] == "AdamW"
    assert again.outer_optimizer.get_config() == made.outer_optimizer.get_config()
    for given, kept in ((False, False), (True, 0.5), (0.25, 0.25), (1, 1.0)):
        # A configuration may hold True or False, as it was once written.
        config = {**made.get_config(), "overlap": given}
        loaded = tfbm.BlockMomentum.from_config(config)
        assert (loaded.overlap, type(loaded.get_config()["overlap"])) == (kept, type(kept))


def test_own_inner_class_survives_a_round_trip():
    @keras.saving.register_keras_serializable("tests")
    class Own(keras.optimizers.SGD):
        pass

    again = keras.optimizers.deserialize(keras.optimizers.serialize(tfbm.BlockMomentum(Own(0.1))))
    assert isinstance(again.inner_optimizer, Own)


def test_variables_and_memory():
    """Anchor and velocity: two copies of the weights more than the inner optimizer."""
    for beta, copies in ((0.5, 2), (0.0, 1)):
        w = keras.Variable(np.ones([10, 10], "float32"))
        optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1), block_momentum=beta)
        optimizer.build([w])
        sizes = [int(np.prod(v.shape)) for v in optimizer.variables]
        assert sum(size for size in sizes if size > 1) == copies * 100
        assert len({id(v) for v in optimizer.variables}) == len(sizes)
        paths = [v.path for v in optimizer.variables]
        assert any("anchor" in path for path in paths)
        np.testing.assert_array_equal(optimizer.variables[1].numpy(), w.numpy())
    assert int(optimizer.iterations.numpy()) == 0


def test_moving_average_at_the_end_is_the_replicas_mean(strategy_of):
    x, y = examples()
    model = compiled(strategy_of(2), lambda: keras.optimizers.SGD(0.1, use_ema=True))
    own = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            own[:] = map(replica_values, averages())

    def averages():
        inner = model.optimizer.inner_optimizer
        return [v for v in inner.variables if v.path.endswith("_average")]

    model.fit(x, y, batch_size=16, verbose=0, callbacks=[tfbm.BlockTraining(), Look()])
    assert len(own) == len(model.trainable_variables)
    for weight, average, before in zip(model.trainable_variables, averages(), own, strict=True):
        assert not np.array_equal(*before)
        for value in [*replica_values(weight), *replica_values(average)]:
            np.testing.assert_allclose(value, np.mean(before, axis=0), rtol=1e-6, atol=1e-7)


def test_constraints_hold_after_the_outer_step(strategy_of):
    x, y = examples()
    with strategy_of(2).scope():
        model = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(3, kernel_constraint=keras.constraints.NonNeg()),
            ]
        )
        model.compile(
            tfbm.BlockMomentum(keras.optimizers.SGD(0.5), sync_period=2, block_momentum=0.9),
            crossentropy(),
        )
    model.fit(x, y, batch_size=16, epochs=3, verbose=0, callbacks=[tfbm.BlockTraining()])
    kernel = model.layers[0].kernel.numpy()
    assert kernel.min() == 0.0  # the constraint acted
    assert kernel.max() > 0.0


# On two workers, in test_dtypes.py, are the others.
LOW = [("mixed_float16", True), ("float16", False)]
LOW += [
    pytest.param(policy, jit, marks=pytest.mark.slow)
    for policy in ("mixed_float16", "mixed_bfloat16", "float16", "bfloat16")
    for jit in (False, True)
    if (policy, jit) not in LOW
]


@pytest.mark.parametrize(("policy", "jit"), LOW)
def test_low_precision(strategy_of, policy, jit):
    x, y = examples()
    keras.config.set_dtype_policy(policy)
    model = compiled(strategy_of(2), lambda: keras.optimizers.SGD(0.1))
    before = model.evaluate(x, y, batch_size=16, verbose=0)[0]
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    model.fit(np.tile(x, [5, 1]), np.tile(y, 5), batch_size=16, verbose=0,
              callbacks=[tfbm.BlockTraining(jit_compile=jit)])  # fmt: skip
    assert model.evaluate(x, y, batch_size=16, verbose=0)[0] < 0.8 * before
    wrapper = model.optimizer.inner_optimizer if scaled else model.optimizer
    assert wrapper.blocks == 10


def test_loss_scaling_inside_the_wrapper(strategy_of):
    """In a float32 model nothing else scales, and the wrapper must pass the scale on."""
    x, y = examples()
    results = []
    for wrap in (lambda o: o, keras.optimizers.LossScaleOptimizer):
        keras.utils.set_random_seed(0)
        model = compiled(strategy_of(2), lambda w=wrap: w(keras.optimizers.SGD(0.1)))
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[tfbm.BlockTraining()])
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_overflow_lowers_the_scale_and_skips_the_step(strategy_of):
    keras.config.set_dtype_policy("mixed_float16")
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=1), "mse")
    before = model.get_weights()
    x = np.full([4, 2], 3e4, "float32")
    model.fit(x, x[:, :1], batch_size=4, verbose=0, callbacks=[tfbm.BlockTraining()])
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**14


def test_tf_checkpoint_round_trip(tmp_path):
    w = keras.Variable(np.ones([3], "float32"))
    optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build([w])
    velocity = optimizer.outer_optimizer.variables[-1]
    velocity.assign([1.0, 2.0, 3.0])
    path = tf.train.Checkpoint(optimizer=optimizer).save(tmp_path / "c")
    velocity.assign([0.0, 0.0, 0.0])
    tf.train.Checkpoint(optimizer=optimizer).restore(path).assert_existing_objects_matched()
    np.testing.assert_array_equal(velocity.numpy(), [1, 2, 3])
