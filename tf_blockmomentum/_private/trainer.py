"""All that is private of Keras's trainer: `fit`, `evaluate` and `predict` in blocks.

There is no public place for it: `evaluate` may come before any callback of ours. Keras's own
functions put collectives into graph loops and into XLA, where they fail under
MultiWorkerMirroredStrategy, and synchronise every step.
"""

import contextlib
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum._private import models as _models
from tf_blockmomentum._private.tensorflow import InUse
from tf_blockmomentum.given import batch_size, fingerprint, in_order, note_iterator
from tf_blockmomentum.inputs import check_global_batch
from tf_blockmomentum.optimizer import find
from tf_blockmomentum.strategy import BlockStrategy, any_batch, local_input, meeting, worker_of

_Trainer = next(c for c in keras.Model.__mro__ if c.__name__ == "TensorFlowTrainer")


@dataclasses.dataclass
class Fit:
    """What a fit was called with, and its callback cannot know."""

    data: int = 0  # a checksum of arrays; 0: other data
    stops_on_nan: bool = False
    counts_steps: bool = False  # an epoch ends after a number of steps, not with the data
    keras_callbacks: list[Any] = dataclasses.field(default_factory=list)  # and in ChiefOnly
    in_use: InUse = dataclasses.field(default_factory=InUse)  # of the training data
    _at_end: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def at_end(self, function: Callable[[], Any]) -> None:
        """Has a function called when fit ends, however it does."""
        self._at_end.callback(function)

    def end(self) -> None:
        """Fit has ended."""
        self.in_use.let_go()
        self._at_end.close()


def fit_of(model: keras.Model) -> Fit:
    """Of the fit that is beginning."""
    return getattr(model, "_tfbm_fit", None) or Fit()


def _ours(model: keras.Model) -> bool:
    return isinstance(model.distribute_strategy, BlockStrategy) or bool(
        _models.optimizers_of(model, find)
    )


def _replace(name: str, make: Callable[..., Any]) -> None:
    """Replaces a method of Keras's trainer, for models with a block strategy or with
    BlockMomentum only."""
    original = getattr(_Trainer, name)
    original = getattr(original, "_tfbm_original", original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (functools.partial(make, self, original) if _ours(self) else
                functools.partial(original, self))(*args, **kwargs)  # fmt: skip

    method._tfbm_original = original  # type: ignore[attr-defined]
    setattr(_Trainer, name, method)


def training_of(model: keras.Model) -> Any:
    """The BlockTraining that trains a model, or None."""
    training = getattr(model.train_function, "__self__", None)
    return training if hasattr(training, "after_callbacks") else None


class _LastCallback(keras.callbacks.Callback):
    """Hears of batches' and epochs' ends after the user's callbacks. Fit reads `stop_training`
    next."""

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        training = training_of(self.model)
        if training is not None:
            training.after_batch_callbacks()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        training = training_of(self.model)
        if training is not None:
            training.after_callbacks()


def _fit(self: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(self, *args, **kwargs)
    wanted, strategy = given.arguments, self.distribute_strategy
    x, y = wanted.get("x"), wanted.get("y")
    _check_fit(self)
    check_global_batch(batch_size(x, wanted), strategy)
    note_iterator(x, strategy)
    callbacks = wanted.get("callbacks")
    last = _LastCallback()
    if isinstance(callbacks, keras.callbacks.CallbackList):
        last.set_model(self)  # which the list did for the others when it was made
        callbacks.callbacks.append(last)
        known = callbacks.callbacks
    else:
        known = [*keras.tree.flatten(callbacks or []), last]
        wanted["callbacks"] = known
    inside = [getattr(callback, "callback", callback) for callback in known]
    self._tfbm_fit = Fit(
        data=fingerprint(x, y) if worker_of(strategy)[1] > 1 else 0,
        stops_on_nan=any(isinstance(c, keras.callbacks.TerminateOnNaN) for c in inside),
        counts_steps=bool(wanted.get("steps_per_epoch")),
        keras_callbacks=[
            c
            for c, callback in zip(known, inside, strict=True)
            if type(callback).__module__.startswith("keras.")
        ],
    )
    try:
        with any_batch(strategy):
            return original(*given.args, **given.kwargs)
    finally:
        self._tfbm_fit.end()
        self._tfbm_fit = None
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.callbacks.remove(last)


def _evaluate(self: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _flush(self)
    before, self._tfbm_tests = getattr(self, "_tfbm_tests", False), True
    try:
        with any_batch(self.distribute_strategy):
            return original(self, *args, **kwargs)
    finally:
        self._tfbm_tests = before
        in_use = getattr(self.test_function, "in_use", None)
        if in_use is not None:
            in_use.let_go()


def _predict(self: Any, original: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    _flush(self)
    strategy = self.distribute_strategy
    with any_batch(strategy, marks_none=False), meeting(strategy, "predict"):
        return original(self, in_order(x, strategy), *args, **kwargs)


def _test_on_batch(self: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _flush(self)
    return original(self, *args, **kwargs)


def _predict_on_batch(self: Any, original: Callable[..., Any], x: Any) -> Any:
    # The batch is this worker's own: Keras would return it once for each replica.
    strategy = self.distribute_strategy
    if not isinstance(strategy, BlockStrategy):
        return original(self, x)

    @tf.function(autograph=False)
    def predict(data: Any) -> Any:
        outputs = strategy.run(self.predict_step, args=(data,))
        return keras.tree.map_structure(
            lambda output: strategy.experimental_local_results(output)[0], outputs
        )

    if worker_of(strategy)[1] == 1:
        _flush(self)
    outputs = predict((x,))
    return keras.tree.map_structure(
        lambda t: t.numpy() if isinstance(t, tf.Tensor) else t, outputs
    )


def _maybe_symbolic_build(
    self: Any, original: Callable[..., Any], iterator: Any = None, data_batch: Any = None
) -> Any:
    # Fit's epoch iterator is a local variable of fit, and passes through here just before
    # callbacks are told of the beginning of training.
    self._tfbm_epoch_iterator = None if iterator is None else weakref.ref(iterator)
    strategy = self.distribute_strategy
    if not isinstance(strategy, BlockStrategy):
        return original(self, iterator=iterator, data_batch=data_batch)
    with strategy.local_input():  # only shapes are wanted
        if iterator is not None:
            # Without drawing a batch, as on one device: it would be missing from the epoch,
            # or a thread be left that reads ahead (keras issues 20394, 20425).
            data = iterator._get_iterator()
            if not _models.build(self, data.element_spec):
                first = next(iter(data))
                _models.build_with(self, strategy.reduce("MEAN", first, axis=None))
            return None
        return original(self, iterator=iterator, data_batch=data_batch)


def _reset_metrics(self: Any, original: Callable[..., Any]) -> Any:
    # TensorFlow reads a metric's variable, over all workers, after it has assigned to it.
    with local_input(self.distribute_strategy):
        return original(self)


def _make_predict_function(self: Any, original: Callable[..., Any], force: bool = False) -> Any:
    if not isinstance(self.distribute_strategy, BlockStrategy):
        return original(self, force=force)
    with _without_jit(self):
        return original(self, force=force)


def _get_metrics_result_or_logs(self: Any, original: Callable[..., Any], logs: Any) -> Any:
    tests, training = getattr(self, "_tfbm_tests", False), training_of(self)
    strategy = self.distribute_strategy
    progress.note("waits for the metrics of all workers")
    if training is not None and not tests:
        training.before_epoch_logs()
    if not isinstance(strategy, BlockStrategy):
        return original(self, logs)
    with strategy.meeting("evaluate's metrics" if tests else "fit's metrics"):
        result = self.get_metrics_result()
    progress.note("has the metrics of all workers")
    if tests:  # a test_function of the user's own has none
        specs = getattr(getattr(self.test_function, "steps", None), "specs", None)
    else:
        specs = training and training.log_specs
    own = logs or specs or result
    if not isinstance(own, dict) or set(own) == set(result):
        return result
    # Not metrics: what a train_step or test_step of the user's returned. A worker without
    # data has none of its own.
    return keras.tree.map_structure(
        lambda value: strategy.mean_over_workers(
            value if logs else tf.zeros(value.shape), bool(logs)
        ),
        own,
    )


_REPLACED: dict[str, Callable[..., Any]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "predict": _predict,
    "test_on_batch": _test_on_batch,
    "predict_on_batch": _predict_on_batch,
    "_maybe_symbolic_build": _maybe_symbolic_build,
    "reset_metrics": _reset_metrics,
    "make_predict_function": _make_predict_function,
    "_get_metrics_result_or_logs": _get_metrics_result_or_logs,
}


def install(make_test_function: Callable[..., Any], between_fits: Callable[..., Any]) -> None:
    """Lets `fit`, `evaluate`, `predict` and `train_on_batch` run in blocks.

    Args:
        make_test_function: called with a model, returns its `test_function`.
        between_fits: called with a model, returns the `train_function` it has outside fit.
    """

    def make_train_function(self: Any, original: Callable[..., Any], force: bool = False) -> Any:
        if not _models.optimizers_of(self, find):
            return original(self, force=force)
        if self.train_function is None or force:
            self.train_function = between_fits(self)
        return self.train_function

    def make_test(self: Any, original: Callable[..., Any], force: bool = False) -> Any:
        if not isinstance(self.distribute_strategy, BlockStrategy):
            return original(self, force=force)
        _models.bring_into_scope(self)
        if self.test_function is None or force:
            self.test_function = make_test_function(self)
        return self.test_function

    for name in ("save", "save_weights", "export"):
        _flushed(name)
    _replace("make_train_function", make_train_function)
    _replace("make_test_function", make_test)
    for name, replacement in _REPLACED.items():
        _replace(name, replacement)


def _flushed(name: str) -> None:
    """Lets a method that saves end the block of a loop over `train_on_batch` first, where one
    process trains; with several workers the chief may save alone, and cannot end a block."""
    original = getattr(keras.Model, name)
    original = getattr(original, "_tfbm_original", original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        training = training_of(self)
        if training is not None and worker_of(self.distribute_strategy)[1] == 1:
            training.flush_between_fits()
        return original(self, *args, **kwargs)

    method._tfbm_original = original  # type: ignore[attr-defined]
    setattr(keras.Model, name, method)


def _flush(model: keras.Model) -> None:
    """Before somebody looks at a model, it is one model."""
    training = training_of(model)
    if training is not None:
        training.flush()


def _check_fit(model: keras.Model) -> None:
    """Raises ValueError for what cannot run in blocks, or under a block strategy."""
    strategy = model.distribute_strategy
    if _models.optimizers_of(model, find):
        _models.check_layers(model)
    elif model.steps_per_execution > 1 and worker_of(strategy)[1] > 1:
        raise ValueError(
            "With an optimizer of Keras's own, fit is synchronous, and TensorFlow cannot put its "
            "collectives into a loop of several steps. Received: steps_per_execution="
            f"{model.steps_per_execution}. Compile with steps_per_execution=1, or train in "
            "blocks with tfbm.BlockMomentum."
        )


@contextlib.contextmanager
def _without_jit(model: keras.Model) -> Iterator[None]:
    # strategy.run lifts a jitted function out over all devices, which XLA refuses (tensorflow
    # issue 53140).
    before, model._jit_compile = model._jit_compile, False
    try:
        yield
    finally:
        model._jit_compile = before
