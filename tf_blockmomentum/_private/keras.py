"""All that is private of Keras, each with its reason."""

import contextlib
import functools
import inspect
import weakref
from typing import Any

import keras
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum.strategy import BlockStrategy, check_global_batch

_Trainer = next(c for c in keras.Model.__mro__ if c.__name__ == "TensorFlowTrainer")
_BaseOptimizer = next(
    c for c in keras.optimizers.Optimizer.__mro__ if c.__name__ == "BaseOptimizer"
)


# -- optimizers ---------------------------------------------------------------------------


class LocalUpdate(keras.optimizers.Optimizer):
    """Keeps an optimizer's update inside its replica.

    Keras's TensorFlow optimizers sum gradients over the replicas and enter
    `merge_call`. The backend-agnostic base class does neither; these four of its
    methods are put between an optimizer's own class and the TensorFlow one, so
    that an optimizer which extends them itself (Nadam) still does.
    """

    _backend_update_step = _BaseOptimizer._backend_update_step
    _apply_weight_decay = _BaseOptimizer._apply_weight_decay
    _backend_increment_gradient_accumulators = (
        _BaseOptimizer._backend_increment_gradient_accumulators
    )
    _overwrite_model_variables_with_average_value = (
        _BaseOptimizer._overwrite_model_variables_with_average_value
    )

    # A per-replica variable takes no sparse update (an embedding's gradient), only
    # the replica's own part of it does.

    def assign(self, variable, value):
        super().assign(_replica_part(variable, value), value)

    def assign_add(self, variable, value):
        super().assign_add(_replica_part(variable, value), value)

    def assign_sub(self, variable, value):
        super().assign_sub(_replica_part(variable, value), value)


def _replica_part(variable, value):
    context = tf.distribute.get_replica_context()
    if not isinstance(value, tf.IndexedSlices) or context is None:
        return variable
    parts = context.strategy.experimental_local_results(getattr(variable, "value", variable))
    return parts[int(tf.get_static_value(context.replica_id_in_sync_group)) % len(parts)]


@functools.cache
def _local_class(cls: Any) -> Any:
    extra = {"__doc__": cls.__doc__, "__module__": cls.__module__, "_keras_class": cls}
    if issubclass(cls, keras.optimizers.LossScaleOptimizer):
        # Its TensorFlow path asks all replicas whether gradients are finite; the
        # common path asks only this one.
        extra["_tf_apply"] = cls._common_apply
    return type(cls.__name__, (cls, LocalUpdate), extra)


def make_local(optimizer: Any) -> None:
    """Makes a Keras optimizer update the variables of its own replica only, in place."""
    if not isinstance(optimizer, LocalUpdate):
        cls: Any = type(optimizer)
        optimizer.__class__ = _local_class(cls)
    inner = getattr(optimizer, "inner_optimizer", None)  # of a LossScaleOptimizer
    if inner is not None:
        make_local(inner)


def serialize_optimizer(optimizer):
    """As `keras.optimizers.serialize`, under the class the user knows."""
    local = type(optimizer)
    optimizer.__class__ = getattr(local, "_keras_class", local)
    try:
        return keras.saving.serialize_keras_object(optimizer)
    finally:
        optimizer.__class__ = local


def strategy_of(optimizer):
    """The strategy whose scope the optimizer was made in."""
    return optimizer._distribution_strategy


def trained_variables(optimizer):
    """The variables an optimizer was built with, which it has no public name for."""
    return optimizer._trainable_variables


def index_of(optimizer, variable):
    """Where a variable stands among those an optimizer was built with."""
    return optimizer._get_variable_index(variable)


def moving_averages(optimizer, variables):
    """Pairs of an optimizer's moving averages (`use_ema`) and the variables they follow."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    averages = optimizer._model_variables_moving_average if optimizer.use_ema else []
    return [(a, v) for a, v in zip(averages, variables, strict=False) if a is not None]


def slots(optimizer):
    """What an optimizer remembers of its gradients: no counters, learning rate or averages of
    the weights, and no gradients accumulated for the next step."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    others = [optimizer._learning_rate]
    others += optimizer._accumulated_gradients if optimizer.gradient_accumulation_steps else []
    others += optimizer._model_variables_moving_average if optimizer.use_ema else []
    kept = {id(v) for v in others}
    return [
        v for v in optimizer.variables if id(v) not in kept and tf.as_dtype(v.dtype).is_floating
    ]


def track_block_count(optimizer):
    """Returns the base class's own counter, which a wrapper has no other use for."""
    return optimizer._iterations


# -- models -------------------------------------------------------------------------------


def layers_of(model):
    """All layers of a model, nested ones too."""
    return model._flatten_layers()


def statistics(model):
    """State that layers change themselves while training (BatchNormalization's averages).

    The weights of a frozen layer are non-trainable too, but do not change.
    """
    found = {
        id(v): v
        for layer in layers_of(model)
        if layer.trainable
        for v in layer._non_trainable_variables
        if tf.as_dtype(v.dtype).is_floating
    }
    weights = {id(v) for v in model.non_trainable_weights}  # not metrics
    return [v for key, v in found.items() if key in weights]


def seed_generators(model):
    """The seed generators of a model's layers (dropout, augmentation)."""
    return [generator for layer in layers_of(model) for generator in layer._seed_generators]


def build(model, element_spec):
    """Builds model, metrics and optimizer from the spec of a batch, outside any trace."""

    def shape_and_type(spec):
        return None if isinstance(spec, tf.OptionalSpec) else spec

    if not model.optimizer.built or not all(layer.built for layer in layers_of(model)):
        model._symbolic_build(data_batch=keras.tree.map_structure(shape_and_type, element_spec))


def recompile(model, optimizer):
    """Compiles a model again as it was compiled, with another optimizer.

    The arguments as they were given, since the public `get_compile_config` serializes
    them and fails for a loss that is a local function. `Model.compile` itself, since a
    subclass may have a `compile` with other arguments.
    """
    auto_scale_loss = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    arguments = {**model._compile_config.config, "optimizer": optimizer}
    keras.Model.compile(model, **arguments, auto_scale_loss=auto_scale_loss)


def none_for_optional(data):
    """Keras passes a missing input (`None`) through tf.data as an empty Optional."""
    return keras.tree.map_structure(
        lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
    )


# -- fit, evaluate and predict under a block strategy ----------------------------------------


def _strategy_method(make):
    """Replaces a method of Keras's trainer for models of a block strategy only."""
    name = make.__name__
    original = getattr(_Trainer, name)
    if hasattr(original, "_tfbm_original"):
        original = original._tfbm_original

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        if isinstance(self.distribute_strategy, BlockStrategy):
            return make(self, original, *args, **kwargs)
        return original(self, *args, **kwargs)

    method._tfbm_original = original  # type: ignore[attr-defined]
    setattr(_Trainer, name, method)


class _LastCallback(keras.callbacks.Callback):
    """Hears of an epoch's end after the user's callbacks. Fit reads `stop_training` next."""

    def on_epoch_end(self, epoch, logs=None):
        training: Any = getattr(self.model.train_function, "__self__", None)
        if hasattr(training, "after_callbacks"):
            training.after_callbacks()


def install(make_test_function):
    """Lets stock `fit`, `evaluate` and `predict` run under a block strategy.

    There is no public place for it: `evaluate` may come before any callback of
    ours. Keras's own functions put collectives into graph loops and into XLA,
    where they fail under MultiWorkerMirroredStrategy, and synchronise every step.

    Args:
        make_test_function: called with a model, returns its `test_function`.
    """

    def fit(self, original, *args, **kwargs):
        # tf.data cannot tell the batch size of the dataset that Keras makes of arrays.
        given = inspect.signature(original).bind(self, *args, **kwargs)
        check_global_batch(given.arguments.get("batch_size"), self.distribute_strategy)
        callbacks = given.arguments.get("callbacks")
        last = _LastCallback()
        if isinstance(callbacks, keras.callbacks.CallbackList):
            last.set_model(self)  # which the list did for the others when it was made
            callbacks.callbacks.append(last)
        else:
            given.arguments["callbacks"] = [*keras.tree.flatten(callbacks or []), last]
        return original(*given.args, **given.kwargs)

    def _maybe_symbolic_build(self, original, *args, **kwargs):
        with self.distribute_strategy.local_input():  # only shapes are wanted
            return original(self, *args, **kwargs)

    def reset_metrics(self, original):
        # TensorFlow reads a metric's variable, over all workers, after it has assigned to it.
        with self.distribute_strategy.local_input():
            return original(self)

    def make_test(self, original, force=False):
        if self.test_function is None or force:
            self.test_function = make_test_function(self)

    make_test.__name__ = "make_test_function"

    def make_predict_function(self, original, force=False):
        with _without_jit(self):
            return original(self, force=force)

    def _get_metrics_result_or_logs(self, original, logs):
        progress.note("waits for the metrics of all workers")
        training: Any = getattr(self.train_function, "__self__", None)
        if hasattr(training, "before_epoch_logs"):
            training.before_epoch_logs()
        result = original(self, logs)
        progress.note("has the metrics of all workers")
        if result is logs:  # not metrics: what a train_step or test_step of the user's returned
            return keras.tree.map_structure(self.distribute_strategy.mean_over_workers, logs)
        return result

    for replacement in (
        fit,
        _maybe_symbolic_build,
        reset_metrics,
        make_test,
        make_predict_function,
        _get_metrics_result_or_logs,
    ):
        _strategy_method(replacement)
    _remember_epochs()


# -- where fit is in its data -----------------------------------------------------------------


class Epochs:
    """What fit's own epoch iterator, of which no callback can get hold, knows and can be told.

    Counts the iterators that fit makes, one or two an epoch: each draws the next seed of a
    dataset that reshuffles, so that a new process has to draw as many.
    """

    def __init__(self, epoch_iterator):
        self._epochs = epoch_iterator
        self._made = 0
        self._get = epoch_iterator._get_iterator
        epoch_iterator._get_iterator = self._counting

    def _counting(self):
        self._made += 1
        return self._get()

    @property
    def element_spec(self):
        return self._get().element_spec

    def state(self, epoch_ended):
        """A dict for `resume`: whole numbers and None."""
        epochs = self._epochs
        goes_on = not epoch_ended or (
            epochs.steps_per_epoch is not None and epochs._current_iterator is not None
        )
        return {
            "goes_on": goes_on,  # with the iterator it has
            "iterators": self._made - goes_on,  # before that one
            "fresh": epoch_ended and epochs._steps_seen == 0,  # and it has given nothing yet
            "steps_seen": epochs._steps_seen,
            "num_batches": epochs._num_batches,
        }

    def resume(self, state, step, restore):
        """Makes the next epoch begin at `step`, from an iterator given to `restore`."""
        epochs = self._epochs
        if epochs._num_batches is None:  # found out when the data first ended
            epochs._num_batches = state["num_batches"]
        original = epochs._enumerate_iterator

        def from_step():
            del epochs._enumerate_iterator  # this epoch only
            for _ in range(state["iterators"]):
                iter(self._counting())
            first = True
            for begin, end, iterator in original():
                if begin < step:
                    continue
                if first and state["goes_on"]:
                    epochs._steps_seen = state["steps_seen"] + epochs.steps_per_execution
                    restore(iterator)
                first = False
                yield begin, end, iterator

        epochs._enumerate_iterator = from_step


def _remember_epochs():
    """Notes fit's epoch iterator on the model: it is a local variable of fit, and passes
    through this method just before callbacks are told of the beginning of training."""
    original = _Trainer._maybe_symbolic_build
    if hasattr(original, "_tfbm_remembers"):
        return

    @functools.wraps(original)
    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        self._tfbm_epoch_iterator = None if iterator is None else weakref.ref(iterator)
        return original(self, iterator=iterator, data_batch=data_batch)

    _maybe_symbolic_build._tfbm_remembers = True  # type: ignore[attr-defined]
    _Trainer._maybe_symbolic_build = _maybe_symbolic_build


def epochs_of(model):
    """The `Epochs` of the fit that is beginning."""
    return Epochs(model._tfbm_epoch_iterator())


def set_initial_epoch(model, epoch):
    """As `BackupAndRestore` does; None takes it back, or the next fit would begin there too."""
    model._initial_epoch = epoch


@contextlib.contextmanager
def _without_jit(model):
    # strategy.run lifts a jitted function out over all devices, which XLA refuses.
    before, model._jit_compile = model._jit_compile, False
    try:
        yield
    finally:
        model._jit_compile = before
