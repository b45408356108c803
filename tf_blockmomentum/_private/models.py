"""All that is private of Keras's models, each with its reason."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_blockmomentum._private.keras import is_plain_state, parts_of
from tf_blockmomentum.inputs import none_for_marks


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers of a model, nested ones too."""
    return model._flatten_layers()


def seed_generators(model: keras.Model) -> list[Any]:
    """The seed generators of a model's layers (dropout, augmentation)."""
    return [generator for layer in layers_of(model) for generator in layer._seed_generators]


def optimizers_of(model: keras.Model, find: Callable[[Any], Any]) -> list[Any]:
    """The optimizers of a model in which `find` finds a BlockMomentum: the compiled one, and
    those that a `compile` of the user's has put into attributes (a GAN's)."""
    known = [getattr(model, "optimizer", None)]
    for value in vars(model).values():
        if isinstance(value, keras.optimizers.Optimizer):
            known.append(value)
        elif isinstance(value, list | tuple | dict):
            values = value.values() if isinstance(value, dict) else value
            known += [v for v in values if isinstance(v, keras.optimizers.Optimizer)]
    return list({id(v): v for v in known if v is not None and find(v) is not None}.values())


def unwrap_second_loss_scaling(model: keras.Model) -> None:
    """Takes off the loss scaling that `compile` puts around an optimizer under mixed_float16 if
    there is one inside already, where `compile` does not see it: gradients would be unscaled
    twice."""
    outer = getattr(model, "optimizer", None)
    if isinstance(outer, keras.optimizers.LossScaleOptimizer):
        kinds = [isinstance(part, keras.optimizers.LossScaleOptimizer) for part in parts_of(outer)]
        if sum(kinds) > 1:
            model.optimizer = outer.inner_optimizer


def shared_variables(model: keras.Model) -> list[Any]:
    """A model's variables that are the same on all replicas when nobody is in a block: no
    metrics, no seeds."""
    return [v for v in model.weights if is_plain_state(v)]


def bring_into_scope(model: keras.Model) -> None:
    """Gives each replica its own copy of variables that were made outside the strategy's scope:
    metrics at the top of a script, a layer that was adapted or loaded before the model was built,
    a model that is compiled again. There would be a single one for all replicas of a process, and
    none that knows of other workers'.

    Raises:
        ValueError: an optimizer has been built with such a variable.
    """
    strategy = model.distribute_strategy
    everything = [*model.variables, *(v for metric in model.metrics for v in metric.variables)]
    alone = {
        id(v): v for v in everything if not isinstance(v.value, tf.distribute.DistributedValues)
    }.values()
    known = {id(v) for o in optimizers_of(model, lambda o: o) for v in _built_with(o)}
    built = [v.path for v in alone if id(v) in known]
    if built:
        raise ValueError(
            "Weights were made outside strategy.scope(), and an optimizer built with them. "
            f"Received: {', '.join(sorted(built)[:5])}. Make the model, and build the optimizer, "
            "inside `with strategy.scope():`."
        )
    with strategy.scope():
        for v in alone:
            v._initialize(tf.convert_to_tensor(v.value))


def _built_with(optimizer: Any) -> list[Any]:
    return [v for part in parts_of(optimizer) if part.built for v in part._trainable_variables]


def build(model: keras.Model, element_spec: Any) -> bool:
    """Builds model, metrics and optimizer from the spec of a batch, outside any trace. Returns
    whether all is done that can be done so."""

    def shape_and_type(spec: Any) -> Any:
        spec = getattr(spec, "_value_specs", [spec])[0]  # a PerReplicaSpec's
        missing = isinstance(spec, tf.OptionalSpec | tf.NoneTensorSpec)
        return None if missing else none_for_marks(spec)

    built = model.optimizer is None or model.optimizer.built
    if built and all(layer.built for layer in layers_of(model)) and not _unbuilt_parts(model):
        return True
    batch = keras.tree.map_structure(shape_and_type, element_spec)
    dense = all(isinstance(s, tf.TensorSpec) for s in keras.tree.flatten(batch) if s is not None)
    if not dense:  # Keras would take ragged and sparse tensors for dense ones
        try:
            build_with(model, keras.tree.map_structure(_symbolic, batch))
        except Exception:  # an actual batch, or the step, tells more
            return False
        return True
    try:
        with model.distribute_strategy.scope():
            model._symbolic_build(data_batch=batch)
    except RuntimeError as error:
        # Without a strategy Keras does not ask for this: a model with a train_step of its own
        # need have no call(). Its optimizers are built by the first step.
        own_step = type(model).train_step is not _TRAIN_STEP
        if own_step:
            _make_variables(model, batch)
        return own_step and "Unable to automatically build" in str(error)
    except (TypeError, ValueError):
        # An actual batch tells more: what the model cannot take, or its metrics or loss. The
        # optimizer's part is done all the same, or its absence would hide that error.
        optimizer = model.optimizer
        if optimizer is not None and all(layer.built for layer in layers_of(model)):
            with model.distribute_strategy.scope():
                optimizer.build(model.trainable_variables)
        return False
    return True


def _make_variables(model: keras.Model, batch: Any) -> None:
    """Makes the variables that a model's own train_step makes, outside any trace: one that is
    broken off, since only the step knows what its optimizers are for, leaves them without a value.
    Keras gives them one at the end of its stateless scope, in which nothing else changes."""
    step = tf.function(model.train_step, autograph=False)
    own = [o for o in optimizers_of(model, lambda o: o) if not o.built]
    with model.distribute_strategy.scope(), contextlib.ExitStack() as stack:
        for optimizer in own:
            for name in ("apply", "apply_gradients"):
                setattr(optimizer, name, lambda *args, **kwargs: None)
                stack.callback(delattr, optimizer, name)
        with keras.StatelessScope(), contextlib.suppress(Exception):  # the actual trace says more
            step.get_concrete_function(batch)


def _symbolic(spec: Any) -> Any:
    if spec is None:
        return None
    sparse, ragged = isinstance(spec, tf.SparseTensorSpec), isinstance(spec, tf.RaggedTensorSpec)
    return keras.KerasTensor(spec.shape, spec.dtype.name, sparse=sparse, ragged=ragged)


def build_with(model: keras.Model, batch: Any) -> None:
    """As `build`, with an actual batch."""
    batch = none_for_optional(none_for_marks(batch))
    x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
    with model.distribute_strategy.scope():
        y_pred = model(x, training=False) if model._call_has_training_arg else model(x)
        for part in (model._compile_metrics, model._compile_loss):
            if part is not None and not part.built:
                part.build(y, y_pred)
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)


def check_layers(model: keras.Model) -> None:
    """Raises ValueError for layers that communicate within a step."""
    names = [layer.name for layer in layers_of(model) if getattr(layer, "synchronized", False)]
    if names and model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            "A layer cannot be synchronized within a block, in which replicas do not "
            f"communicate. Received: synchronized=True in {', '.join(names)}. Use "
            "BatchNormalization(synchronized=False): its moving statistics are averaged at "
            "every boundary."
        )


_TRAIN_STEP = keras.Model.train_step


def _unbuilt_parts(model: keras.Model) -> bool:
    parts = (model._compile_metrics, model._compile_loss)
    return any(part is not None and not part.built for part in parts)


def recompile(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Compiles a model again as it was compiled, with another optimizer.

    The arguments as they were given, since the public `get_compile_config` serializes
    them and fails for a loss that is a local function. `Model.compile` itself, since a
    subclass may have a `compile` with other arguments.
    """
    auto_scale_loss = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    arguments = {**model._compile_config.config, "optimizer": optimizer}
    keras.Model.compile(model, **arguments, auto_scale_loss=auto_scale_loss)


def none_for_optional(data: Any) -> Any:
    """Keras passes a missing input (`None`) through tf.data as an empty Optional."""
    return keras.tree.map_structure(
        lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
    )
