"""All that is private of Keras, each with its reason."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

_BaseOptimizer = next(
    c for c in keras.optimizers.Optimizer.__mro__ if c.__name__ == "BaseOptimizer"
)


# -- optimizers ---------------------------------------------------------------------------


class LocalUpdate(keras.optimizers.Optimizer):
    """Keeps an optimizer's update inside its replica.

    Keras's TensorFlow optimizers sum gradients over the replicas and enter
    `merge_call`, which a compiled step cannot (keras issue 17187). The
    backend-agnostic base class does neither; these four of its methods are put
    between an optimizer's own class and the TensorFlow one, so that an optimizer
    which extends them itself (Nadam) still does.
    """

    _apply_weight_decay = _BaseOptimizer._apply_weight_decay
    _backend_increment_gradient_accumulators = (
        _BaseOptimizer._backend_increment_gradient_accumulators
    )
    _overwrite_model_variables_with_average_value = (
        _BaseOptimizer._overwrite_model_variables_with_average_value
    )

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        # `update_step` gets TensorFlow's variables, as it does on one device.
        own = [replica_part(v) for v in trainable_variables]
        _BaseOptimizer._backend_update_step(self, grads, own, learning_rate)

    # A per-replica variable takes no sparse update (an embedding's gradient), only
    # the replica's own part of it does.

    def assign(self, variable: Any, value: Any) -> None:
        super().assign(_part_for(variable, value), value)

    def assign_add(self, variable: Any, value: Any) -> None:
        super().assign_add(_part_for(variable, value), value)

    def assign_sub(self, variable: Any, value: Any) -> None:
        super().assign_sub(_part_for(variable, value), value)


def _part_for(variable: Any, value: Any) -> Any:
    return replica_part(variable) if isinstance(value, tf.IndexedSlices) else variable


def replica_part(variable: Any) -> tf.Variable:
    """The TensorFlow variable that a variable is in this replica."""
    variable = variable.value if isinstance(variable, keras.Variable) else variable
    context = tf.distribute.get_replica_context()
    if context is None:
        return variable
    parts = context.strategy.experimental_local_results(variable)
    return parts[int(tf.get_static_value(context.replica_id_in_sync_group)) % len(parts)]


@functools.cache
def _local_class(cls: Any) -> Any:
    extra = {"__doc__": cls.__doc__, "__module__": cls.__module__, "_keras_class": cls}
    if issubclass(cls, keras.optimizers.LossScaleOptimizer):
        # Its TensorFlow path asks all replicas whether gradients are finite; the
        # common path asks only this one (keras issue 18666).
        extra["_tf_apply"] = cls._common_apply
    return type(cls.__name__, (cls, LocalUpdate), extra)


def make_local(optimizer: Any) -> None:
    """Makes a Keras optimizer update the variables of its own replica only, in place."""
    if not isinstance(optimizer, LocalUpdate):
        cls: Any = type(optimizer)
        optimizer.__class__ = _local_class(cls)
    for inner in parts_of(optimizer)[1:]:
        make_local(inner)


def parts_of(optimizer: Any) -> list[Any]:
    """An optimizer and those inside it: of a LossScaleOptimizer, or of a MultiOptimizer, which
    knows them all only once it is built."""
    inner = getattr(optimizer, "inner_optimizer", None)
    inside = [inner] if inner is not None else getattr(optimizer, "optimizers", [])
    return [optimizer, *(part for one in inside for part in parts_of(one))]


def serialize_optimizer(optimizer: Any) -> dict[str, Any]:
    """As `keras.optimizers.serialize`, under the class the user knows."""
    local = type(optimizer)
    optimizer.__class__ = getattr(local, "_keras_class", local)
    try:
        return keras.saving.serialize_keras_object(optimizer)
    finally:
        optimizer.__class__ = local


def strategy_of(optimizer: Any) -> tf.distribute.Strategy:
    """The strategy whose scope the optimizer was made in."""
    return optimizer._distribution_strategy


def trained_variables(optimizer: Any) -> list[Any]:
    """The variables an optimizer was built with, which it has no public name for."""
    return optimizer._trainable_variables


def index_of(optimizer: Any, variable: Any) -> int:
    """Where a variable stands among those an optimizer was built with."""
    return optimizer._get_variable_index(variable)


def knows(optimizer: Any, variable: Any) -> bool:
    """Whether an optimizer was built with a variable."""
    return optimizer._var_key(variable) in optimizer._trainable_variables_indices


def moving_averages(optimizer: Any) -> list[tuple[Any, Any]]:
    """Pairs of an optimizer's moving averages (`use_ema`) and the variables they follow."""
    pairs = [
        pair
        for part in parts_of(optimizer)
        if part.use_ema and part.built
        for pair in zip(
            part._model_variables_moving_average, part._trainable_variables, strict=False
        )
    ]
    return [(average, variable) for average, variable in pairs if average is not None]


def slots(optimizer: Any) -> list[Any]:
    """What an optimizer remembers of its gradients: no counters, learning rate or averages of
    the weights, and no gradients accumulated for the next step."""
    others = [average for average, _ in moving_averages(optimizer)]
    for part in parts_of(optimizer):
        others += [part._learning_rate]
        others += part._accumulated_gradients if part.gradient_accumulation_steps else []
    kept = {id(v) for v in others}
    return [
        v for v in optimizer.variables if id(v) not in kept and tf.as_dtype(v.dtype).is_floating
    ]


def learning_rates(optimizer: Any) -> list[keras.Variable]:
    """The learning rates of an optimizer and those inside it, where they are variables."""
    rates = [part._learning_rate for part in parts_of(optimizer)]
    return [rate for rate in rates if isinstance(rate, keras.Variable)]


def rate_of(optimizer: Any) -> float:
    """An optimizer's learning rate now; of a MultiOptimizer, its parts' largest."""
    parts = [part for part in parts_of(optimizer) if len(parts_of(part)) == 1]
    return max(float(part.learning_rate) for part in parts)


def counters(optimizer: Any) -> list[Any]:
    """The counts of steps of an optimizer and those inside it, which schedules go by."""
    return [part._iterations for part in parts_of(optimizer)]


def track_block_count(optimizer: Any) -> Any:
    """Returns the base class's own counter, which a wrapper has no other use for."""
    return optimizer._iterations


# -- variables ----------------------------------------------------------------------------

_watchers: list[Callable[[Any, Any], None]] = []
# By id, and weakly: the id of one that is no more may be a new one's.
_assigned_outside: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_assignments = [0]  # how many


def _watch_assignments() -> None:
    """Wraps `keras.Variable.assign`, through which layers, `set_weights`, `load_weights` and
    callbacks change variables. Keras has no hook for it, and to find out by comparing all
    weights would take longer than a boundary."""
    original = keras.Variable.assign
    if hasattr(original, "_tfbm_original"):
        return

    @functools.wraps(original)
    def assign(self: Any, value: Any) -> Any:
        value = self._convert_to_tensor(value, dtype=self._dtype)
        for watcher in _watchers:
            watcher(self, value)
        if not _watchers and tf.executing_eagerly():
            _assigned_outside[id(self)] = self
            _assignments[0] += 1
        return original(self, value)

    assign._tfbm_original = original  # type: ignore[attr-defined]
    keras.Variable.assign = assign


_watch_assignments()


@contextlib.contextmanager
def assignments_told_to(watcher: Callable[[Any, Any], None]) -> Iterator[None]:
    """Inside, `watcher` is told of each variable and value before the assignment."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def assignments_outside() -> int:
    """How many there have been outside any step. While there are no more, a step need not look
    through all variables."""
    return _assignments[0]


def take_assigned(variables: Iterable[Any]) -> list[Any]:
    """Those of the variables that have been assigned to, outside any step, since the last call
    with them."""
    if not _assigned_outside:
        return []
    found = [v for v in variables if _assigned_outside.get(id(v)) is v]
    for v in found:
        _assigned_outside.pop(id(v), None)
    return found


def in_a_layer() -> bool:
    """Whether a layer is being called: Keras keeps what it knows of the call for nested layers."""
    return (
        keras.src.backend.common.global_state.get_global_attribute("current_call_ctx") is not None
    )


def layers_being_called() -> list[Any]:
    """The layer or model that a step is calling, and all layers in it; of nested calls Keras
    keeps the outermost."""
    context = keras.src.backend.common.global_state.get_global_attribute("current_call_ctx")
    return [] if context is None else list(context.entry_layer._flatten_layers())


@contextlib.contextmanager
def without_updates(optimizer: Any) -> Iterator[None]:
    """Inside, a step that applies this optimizer updates nothing. `apply` is what Keras's trainer
    and users call; there is no switch for it."""
    names = ("apply", "apply_gradients")
    for name in names:
        setattr(optimizer, name, lambda *args, **kwargs: optimizer.iterations)
    try:
        yield
    finally:
        for name in names:
            delattr(optimizer, name)


def is_plain_state(variable: Any) -> bool:
    """Whether a variable is no metric's, which has a synchronisation of its own, and no seed
    generator's."""
    return variable.synchronization == "auto" and variable.name != "seed_generator_state"
