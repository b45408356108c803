"""Searches of several workers, for test_tuner.py; a line of JSON is printed for what happens."""

import json
import os
import signal
from typing import Any

import helpers
import keras
import keras_tuner as kt
import tensorflow as tf

import tf_blockmomentum as tfbm
from tf_blockmomentum.strategy import worker_of


def say(**what):
    print(json.dumps(what), flush=True)


class Told:
    """A tuner that tells what its trials do on this worker."""

    oracle: Any  # the tuner's, in front of which this is put
    trial = None

    def on_trial_begin(self, trial):
        Told.trial = trial.trial_id
        say(run=trial.trial_id, values=trial.hyperparameters.values)

    def on_epoch_begin(self, trial, model, epoch, logs=None):
        optimizer = model.optimizer
        say(epoch=epoch, iterations=int(optimizer.iterations.numpy()) if optimizer.built else 0)

    def on_trial_end(self, trial):
        super().on_trial_end(trial)
        trial = self.oracle.get_trial(trial.trial_id)
        say(end=trial.trial_id, status=trial.status, score=trial.score, message=trial.message)


def tuner(strategy, directory, cls, build, objective="loss", **arguments):
    worker, _ = worker_of(strategy)
    told = type(cls.__name__, (Told, cls), {})
    return tfbm.tuner.distribute(told)(
        tfbm.tuner.BlockMomentumHyperModel(build, sync_period=(1, 8)),
        objective=objective,
        distribution_strategy=strategy,
        directory=str(directory) if worker == 0 else "/proc/only-worker-0-has-it",
        project_name=f"{cls.__name__}_{objective}",
        seed=100 + worker,
        **arguments,
    )


def build(hp):
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
    rate = hp.Choice("lr", [0.1, 0.2, 0.3])
    model.compile(keras.optimizers.SGD(rate), helpers.crossentropy())
    return model


def data():
    x, y = helpers.examples()
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return helpers.dataset(x, y).with_options(options)


def classes(strategy, directory):
    """The tuner classes that the searches below do not have."""
    for cls, arguments in {
        kt.BayesianOptimization: {"max_trials": 2, "num_initial_points": 1},
        kt.Hyperband: {"max_epochs": 2, "factor": 2},
    }.items():
        search = tuner(strategy, directory, cls, build, **arguments)
        say(tuner=cls.__name__)
        search.search(data(), epochs=1, verbose=0)


def tell_the_best(search):
    model = search.get_best_models()[0]
    say(
        best=search.get_best_hyperparameters()[0].values,
        loss=model.evaluate(data(), verbose=0),
        blocks=model.optimizer.blocks,
        scores=[trial.score for trial in search.oracle.get_best_trials(9)],
    )


class Faults(keras.callbacks.Callback):
    """On one worker only, in the trial given."""

    def __init__(self, here):
        super().__init__()
        self.here = here

    def on_train_batch_end(self, batch, logs=None):
        if self.here and batch == 2:
            if Told.trial == "1":
                raise ArithmeticError("a callback's error")
            if Told.trial == "4":
                self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if self.here and Told.trial == "5":
            raise ArithmeticError("an error after validation")


def failures(strategy, directory):
    """Trials that fail in different ways on worker 1."""
    here = worker_of(strategy)[0] == 1

    def faulty_build(hp):
        model = build(hp)
        if Told.trial == "0" and here:
            raise ArithmeticError("a build's error")
        if Told.trial == "3":
            model.compile(keras.optimizers.SGD(1e30), lambda y, output: tf.reduce_mean(output**2))
        return model

    fifth = helpers.examples()[0][64, 0]

    def check(x):
        if here and Told.trial == "2" and x[0, 0] == fifth:
            raise ArithmeticError("a dataset's error")
        return x

    def checked(x, y):
        return tf.ensure_shape(tf.py_function(check, [x], tf.float32), x.shape), y

    search = tuner(
        strategy, directory, kt.RandomSearch, faulty_build, "val_loss",
        max_trials=6, max_consecutive_failed_trials=9,
    )  # fmt: skip
    search.search(
        data().map(checked), validation_data=data(), epochs=2, verbose=0, callbacks=[Faults(here)]
    )


class Killed(keras.callbacks.Callback):
    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def on_train_batch_end(self, batch, logs=None):
        if Told.trial == "1" and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def killed(strategy, directory):
    """A GridSearch, of which worker 1 dies in its second trial, once."""
    search = tuner(strategy, directory, kt.GridSearch, build, max_trials=3)
    say(tuner=sorted(search.oracle.trials))
    callbacks = [Killed(directory / "killed")] if worker_of(strategy)[0] == 1 else []
    search.search(data(), epochs=1, verbose=0, callbacks=callbacks)
    tell_the_best(search)
