"""All that is private of TensorFlow, each with its reason."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf


def set_heartbeat(seconds: float) -> None:
    """How long a worker may be silent before TensorFlow takes it for dead.

    The strategy configures the coordination service itself and has no argument for it, and
    TensorFlow has no public function: only its context object takes the number.
    """
    from tensorflow.python.eager import context

    context = context.context()
    context.configure_coordination_service = functools.partial(
        type(context).configure_coordination_service,
        context,
        heartbeat_timeout_in_ms=int(1000 * seconds),
    )


def read_by_one_device(dataset: Any, strategy: Any) -> Any:
    """A distributed dataset, read by a plain iterator if this worker has one device.

    TensorFlow's iterator for several devices hands each batch through a remote call, a generator
    and three threads, also where there is one device: half a millisecond a batch on a busy CPU.
    Which iterator it takes hangs on the options, and those that mean a plain one cannot be given
    for a dataset that TensorFlow shall shard.
    """
    if len(strategy.extended.worker_devices) == 1:
        dataset._options = tf.distribute.InputOptions(
            experimental_fetch_to_device=False,
            experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA,
        )
    return dataset


def plain_iterator(iterator: Any) -> Any:
    """The plain iterator that a distributed one of one device reads (`read_by_one_device`).

    Asking the distributed one, a batch goes through three branches, one of which brings it to the
    device and would have to bring it back for the next to look at it.
    """
    parts: Any = getattr(iterator, "_iterators", ())
    part = getattr(parts[0], "_iterator", None) if len(parts) == 1 else None
    return part if isinstance(part, tf.data.Iterator) else None


class InUse:
    """The iterator that an epoch reads: held until the next one is, and then deleted in a thread.

    TensorFlow deletes an iterator when the thread that tunes its pipeline has ended. It wakes that
    thread first and marks it as cancelled afterwards (`CancellationManager::StartCancel`), so that
    it may find that nothing has changed and sleep on (`Model::OptimizeLoop`): up to as long again
    as the iterator has lived, and a minute at most. On a busy core it mostly does, at the end of
    each epoch and each evaluation.
    """

    def __init__(self) -> None:
        self._iterator: Any = None

    def hold(self, iterator: Any) -> None:
        """The one that is read now; Keras has let go of the one before."""
        if iterator is not self._iterator:
            self.let_go()
            if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
                self._iterator = iterator

    def let_go(self) -> None:
        """Nobody reads it any more."""
        last, self._iterator = [self._iterator], None
        if last[0] is not None:
            threading.Thread(target=last.clear, daemon=True).start()


def as_a_number(variable: Any) -> Any:
    """Lets `int(variable)` and `float(variable)` work for a variable of several replicas.

    Keras's variables call them on the TensorFlow variable inside. TensorFlow's own variables
    have them, those of a strategy do not (`int(optimizer.iterations)`: a TypeError).
    """
    cls = type(variable)
    for kind in (int, float):
        name = f"__{kind.__name__}__"
        if not hasattr(cls, name):
            setattr(cls, name, lambda self, kind=kind: kind(self.numpy()))
    return variable


def broadcast_initial_values_of_any_dtype(strategy: Any) -> None:
    """Lets variables of bfloat16, int8 and others be made on several workers.

    Every worker starts from the chief's initial value, which TensorFlow sends through a
    collective that takes only a few dtypes. The method of the strategy that makes the initial
    value is private, and so is all around it.
    """
    extended = strategy.extended
    original = extended._get_variable_creator_initial_value

    def initial_value(replica_id: int, device: Any, primary_var: Any, **kwargs: Any) -> Any:
        value, dtype = kwargs["initial_value"], tf.as_dtype(kwargs.get("dtype") or tf.float32)
        wire = wire_dtype(dtype)
        if replica_id or kwargs.get("dtype") is None or wire == dtype:
            return original(
                replica_id=replica_id, device=device, primary_var=primary_var, **kwargs
            )
        kwargs["dtype"] = wire
        kwargs["initial_value"] = lambda: tf.cast(value() if callable(value) else value, wire)
        sent = original(replica_id=replica_id, device=device, primary_var=primary_var, **kwargs)
        return lambda: tf.cast(sent(), dtype)

    extended._get_variable_creator_initial_value = initial_value


def wire_dtype(dtype: Any) -> tf.DType:
    """The dtype that values of `dtype` travel as: TensorFlow's collectives know a few."""
    dtype = tf.as_dtype(dtype)
    if dtype in (tf.float32, tf.float16, tf.float64, tf.int32, tf.int64):
        return dtype
    if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        return dtype  # as text; the collective will say so
    if dtype.is_floating:
        return tf.float32
    return tf.int64 if dtype in (tf.uint32, tf.uint64) else tf.int32


def assigned_in(graph: Any) -> list[tuple[Any, Any]]:
    """The variables of several replicas that a function's graph assigns (not those within its
    loops and branches), each with the operation. Only the graph knows which handles it has, and
    only a handle which variable is behind it."""
    handles = {id(inside): outside for outside, inside in graph.captures}
    found = []
    for operation in graph.get_operations():
        if "Assign" in operation.type or "ResourceScatter" in operation.type:
            handle = handles.get(id(operation.inputs[0]))
            container = getattr(handle, "_distributed_container", lambda: None)()
            if container is not None:
                found.append((container, operation))
    return found


def variables_written(function: Any) -> list[Any]:
    """The variables, each replica's its own, that a compiled function assigns, within its loops,
    branches and inner functions too. TensorFlow finds out which it only reads, to let them run
    side by side, and has no public function that tells."""
    from tensorflow.python.framework import auto_control_deps_utils

    graph = function.graph
    read = auto_control_deps_utils.get_read_only_resource_input_indices_graph(graph)
    only_read = {id(graph.inputs[i]) for i in read}
    handles = {id(outside) for outside, inside in graph.captures if id(inside) not in only_read}
    return [v for v in graph.variables if id(v.handle) in handles]


_made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def remembering(make: Callable[..., Any]) -> Callable[..., Any]:
    """A variable creator whose variables are among `variables_made`."""

    def creator(**kwargs: Any) -> Any:
        variable = make(**kwargs)
        _made[id(variable)] = variable
        return variable

    return creator


def variables_made(strategy: Any) -> list[Any]:
    """A strategy's variables that are still in use, metrics' not. What a step that runs eagerly
    assigns leaves no other trace than their values."""
    return [v for v in list(_made.values()) if v.distribute_strategy is strategy]


# Collectives besides the all-reduce. TensorFlow has them as raw operations that take the keys of a
# group of devices and of one call; a strategy has both, in the launcher of each of its replicas.


def all_to_all(parts: tf.Tensor) -> tf.Tensor:
    """In replica context: what is at index i of the first dimension goes to replica i, and what
    the replicas have sent to this one comes back, in their order."""
    launcher = _launcher()
    with tf.device(launcher._device):
        return tf.raw_ops.CollectiveAllToAllV2(
            input=parts, communication_hint=_hint(launcher, "auto"), **_keys(launcher)
        )


def all_gather(flat: tf.Tensor) -> tf.Tensor:
    """In replica context: the replicas' tensors of one shape, one after the other."""
    launcher = _launcher()
    with tf.device(launcher._device):
        return tf.raw_ops.CollectiveGatherV2(
            input=flat, communication_hint=_hint(launcher, "ring"), **_keys(launcher)
        )


def _launcher() -> Any:
    """Of this replica, of several."""
    context = tf.distribute.get_replica_context()
    extended = context.strategy.extended
    if tf.executing_eagerly() and len(extended.worker_devices) > 1:
        raise ValueError(
            "Functions that run eagerly run one replica after the other, which then wait for each "
            "other for ever. Received: run_eagerly, several replicas in this process, and "
            'compression="int8" or "int4". Leave one of them out.'
        )
    # MultiWorkerMirroredStrategy's only ones; MirroredStrategy may use others, and has these.
    ops = getattr(extended, "_collective_ops", None) or extended._cross_device_ops
    return ops._launchers[context._replica_id]


def _hint(launcher: Any, otherwise: str) -> str:
    """How a collective travels: as the strategy's options say, where they say NCCL."""
    wanted = launcher._options.implementation.value.lower()
    return wanted if wanted == "nccl" else otherwise


def _keys(launcher: Any) -> dict[str, Any]:
    return {
        "group_size": launcher._group_size,
        "group_key": launcher._group_key,
        "instance_key": launcher._next_instance_key(),
        "ordering_token": [launcher._get_ordering_token()],
        "timeout_seconds": launcher._options.timeout_seconds or 0.0,
    }


# What workers tell each other outside collectives: the coordination service, which the strategy
# starts, keeps keys and values for all. TensorFlow has no public function for it.


def tell_workers(key: str, value: str) -> None:
    """Leaves a value for the other workers, if there is none of that name yet."""
    from tensorflow.python.eager import context

    with contextlib.suppress(tf.errors.OpError):
        context.context().set_config_key_value(f"tf_blockmomentum/{key}", value)


def told_by_workers(key: str) -> str:
    """The value that a worker has left; "" if none has."""
    from tensorflow.python.eager import context

    with contextlib.suppress(tf.errors.OpError):
        return context.context().get_config_key_value(f"tf_blockmomentum/{key}", 20)
    return ""


def abort_collectives(message: str) -> None:
    """Lets what waits in a collective of this process fail, and all collectives after it."""
    from tensorflow.python.eager import context

    context.context().abort_collective_ops(9, message)  # FAILED_PRECONDITION
