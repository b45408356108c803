"""Where variables live: one copy per replica, unsynchronised.

A block strategy is TensorFlow's own strategy with two changes. Variables that
would be mirrored are per-replica instead, so that a replica can train alone for
a whole block. And what Keras reduces on its own account (the shape of a first
batch, whether any worker has data left) can be answered locally, so that the
only communication is at a block boundary.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_blockmomentum import process, progress
from tf_blockmomentum._private.tensorflow import (
    as_a_number,
    broadcast_initial_values_of_any_dtype,
    read_by_one_device,
    remembering,
    set_heartbeat,
    wire_dtype,
)
from tf_blockmomentum.inputs import check_global_batch, copied, mark_none, no_device_buffer
from tf_blockmomentum.meetings import Meetings
from tf_blockmomentum.tf_config import check_tf_config

_NO_STRATEGY = tf.distribute.get_strategy()
COMPRESSIONS = ("float16", "int8", "int4")


def _per_replica_creator(next_creator: Callable[..., Any], **kwargs: Any) -> Any:
    """Variable creator: what would be mirrored becomes per-replica.

    `ON_READ` makes an assignment inside a step local to its replica. With
    `ONLY_FIRST_REPLICA` a read outside a step takes this worker's first replica
    and never communicates, so the chief can save alone; what an `aggregation` of the
    user's asks for is done at boundaries (see `variables`). Variables that asked for
    a synchronisation of their own (metrics: `ON_READ`) keep it.
    """
    if kwargs.get("synchronization") in (None, tf.VariableSynchronization.AUTO):
        kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
        kwargs["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
        if kwargs.get("trainable") is None:  # ON_READ alone would mean False
            kwargs["trainable"] = True
        next_creator = remembering(next_creator)
    # Its initial value is sent by the chief, so all workers make the same variables.
    place = f"the making of a variable named {kwargs.get('name')!r}"
    with meeting(tf.distribute.get_strategy(), place):
        return as_a_number(next_creator(**kwargs))


class BlockStrategy(tf.distribute.Strategy):
    """What the two public strategies share (not to be instantiated)."""

    compression: str | None = None  # of deltas on the wire
    _answers_locally = False
    _any_batch = False
    _marks_none = False
    _meetings: Meetings | None = None
    _one_replica = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        process.keep_memory()  # before there are threads that allocate
        super().__init__(*args, **kwargs)

    def meeting(self, place: str) -> contextlib.AbstractContextManager[Any]:
        """Around what all workers have to call; `place` says to people where they are. Raises
        RuntimeError where the others are somewhere else."""
        return self._meetings.at(place) if self._meetings else contextlib.nullcontext()

    @property
    def num_replicas_in_sync(self) -> int:
        """How many replicas there are; 1 inside `one_replica`."""
        return 1 if self._one_replica else super().num_replicas_in_sync

    @contextlib.contextmanager
    def one_replica(self) -> Iterator[None]:
        """Inside, which is a local step, there is one replica: the one that asks.

        Keras, `tf.nn.compute_average_loss` and users' own code divide a loss by the number of
        replicas, since gradients are summed over them as a rule. A local step sums nothing.
        """
        before, self._one_replica = self._one_replica, True
        try:
            yield
        finally:
            self._one_replica = before

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Enters the strategy: variables made inside are per replica."""
        with super().scope(), tf.variable_creator_scope(_per_replica_creator):
            yield

    @contextlib.contextmanager
    def local_input(self) -> Iterator[None]:
        """Inside, `reduce` answers from this worker alone, without communication.

        TensorFlow's distributed iterator asks all workers before every batch
        whether any has data left, Keras averages a whole batch over the workers
        to learn its shape, and to reset a metric reads it: all through `reduce`.
        """
        before, self._answers_locally = self._answers_locally, True
        try:
            yield
        finally:
            self._answers_locally = before

    @contextlib.contextmanager
    def any_batch(self, marks_none: bool = True) -> Iterator[None]:
        """Inside, batches need not divide by the replicas: evaluation counts by the example. And
        inputs may be None, if steps get them through `none_for_marks`."""
        before = self._any_batch, self._marks_none
        self._any_batch, self._marks_none = True, marks_none
        try:
            yield
        finally:
            self._any_batch, self._marks_none = before

    def reduce(self, reduce_op: Any, value: Any, axis: int | None = None) -> Any:
        """Reduces a value, or a structure of values, over all replicas.

        As `tf.distribute.Strategy.reduce`, which takes neither structures nor
        an `axis` for scalars under `MultiWorkerMirroredStrategy`; Keras passes
        both (keras issue 20585).
        """
        if self._answers_locally:
            return tf.nest.map_structure(lambda v: self.experimental_local_results(v)[0], value)

        def reduce_one(v: Any) -> Any:
            scalar = tf.convert_to_tensor(self.experimental_local_results(v)[0]).shape.rank == 0
            return super(BlockStrategy, self).reduce(reduce_op, v, axis=None if scalar else axis)

        return tf.nest.map_structure(reduce_one, value)

    def gather(self, value: Any, axis: int) -> Any:
        """As in TensorFlow, of values of any dtype: its collectives know a few."""
        dtype = tf.as_dtype(self.experimental_local_results(value)[0].dtype)
        wire = wire_dtype(dtype)
        if wire == dtype:
            return super().gather(value, axis)
        wide = self.run(lambda v: tf.cast(v, wire), args=(value,))
        return tf.cast(super().gather(wide, axis), dtype)

    def mean_over_workers(self, value: Any, takes_part: Any = True) -> tf.Tensor:
        """The mean of the workers' own values of a tensor, on every worker; of those alone that
        take part."""
        value = tf.cast(value, tf.float32)
        part = tf.cast(takes_part, tf.float32)
        flat = tf.where(takes_part, tf.reshape(value, [-1]), 0.0)
        parts = self.experimental_distribute_values_from_function(
            lambda _: tf.concat([flat, [part]], axis=0)
        )
        with self.meeting("a mean over the workers"):
            sums = self.reduce("SUM", parts)
        return tf.reshape(tf.math.divide_no_nan(sums[:-1], sums[-1]), value.shape)

    def experimental_distribute_dataset(
        self, dataset: tf.data.Dataset, options: tf.distribute.InputOptions | None = None
    ) -> tf.distribute.DistributedDataset:
        """Shards and rebatches `dataset`, which is batched by the global batch.

        One batch is read ahead, on the host. `options` of your own replace this.

        Raises:
            ValueError: the batch size does not divide by the number of replicas.
        """
        size = int(
            tf.raw_ops.ComputeBatchSize(input_dataset=tf.data.experimental.to_variant(dataset))
        )
        if size < 0:  # batches that TensorFlow has not put together itself
            dataset = dataset.map(copied)
        if self._marks_none:
            dataset = mark_none(dataset)
        if not self._any_batch:
            check_global_batch(size if size > 0 else None, self)  # -1: TensorFlow cannot tell
        if options is None:
            dataset = super().experimental_distribute_dataset(
                dataset.prefetch(1), no_device_buffer()
            )
            return read_by_one_device(dataset, self)
        return super().experimental_distribute_dataset(dataset, options)

    def distribute_datasets_from_function(
        self,
        dataset_fn: Callable[[tf.distribute.InputContext], tf.data.Dataset],
        options: tf.distribute.InputOptions | None = None,
    ) -> tf.distribute.DistributedDataset:
        """As in TensorFlow; nothing is read ahead but what the dataset itself prefetches."""
        if options is None:
            dataset = super().distribute_datasets_from_function(dataset_fn, no_device_buffer())
            return read_by_one_device(dataset, self)
        return super().distribute_datasets_from_function(dataset_fn, options)


class MultiWorkerBlockStrategy(BlockStrategy, tf.distribute.MultiWorkerMirroredStrategy):
    """`tf.distribute.MultiWorkerMirroredStrategy` for block training.

    Every worker process creates one, before any other TensorFlow operation, and
    builds and compiles its model inside `scope()`. The cluster comes from the
    `TF_CONFIG` environment variable (`tfbm-launch` sets it); without it, the
    devices of this process are the replicas.

    Variables are per replica: an assignment inside a step stays in its replica,
    and a read outside a step sees this worker's first replica, without
    communication. Initial values are equal on all replicas (the chief's). Batches
    are global, as always with `tf.distribute`: each of P replicas takes 1/P.

    Use it with `BlockMomentum` and `BlockTraining`. With an optimizer of Keras's own,
    `fit` trains synchronously, as it would under TensorFlow's strategy if it ran
    there: gradients are summed over all replicas at every step (statistics such as
    BatchNormalization's are then each replica's own).

    An `evaluator` task in `TF_CONFIG` takes no part in training: it has a strategy of one
    replica, for a script that evaluates checkpoints at the side.

    Args:
        cluster_resolver: as in TensorFlow; default: `TF_CONFIG`.
        communication_options: as in TensorFlow.
        compression: what deltas travel as, with error feedback: what rounding takes from one
            block is sent with the next. Statistics and slots that are averaged travel as they
            are: they are no sums over time, in which an error could be made good.
            None (the default): as they are.
            "float16": half the bytes, added up as float16. One more copy of the weights. Not
            for weights that move by more than 60000/P in a block: reported as not finite.
            "int8", "int4": 0.252 and 0.127 of float32's bytes; at most 0.26 and 0.135 with
            the padding of any P, for models of a hundred thousand weights and more (a block
            of 256 a replica at least: for tiny ones they gain nothing). Blocks of 256 values
            share a 16-bit scale. Each replica owns 1/P of the sum: it gets the others' codes
            of that, adds them up in float32, codes the sum, keeps back what that rounding
            takes, and all gather the codes, so all decode the same numbers, to the bit. Costs
            one copy of the weights and 1/P of one; deltas below 2e38 fit. One replica alone
            codes too, and so trains as it would among others. Not on a link of 10 Gbit/s and
            more with one busy core a worker, where coding takes longer than it saves, and not
            with `run_eagerly` and several devices in one process.

    Raises:
        ValueError: `TF_CONFIG` is not a usable cluster description, or another `compression`.
        RuntimeError: TensorFlow has already run an operation in this process.

    Source of error feedback: Seide et al., "1-Bit Stochastic Gradient Descent" (Interspeech
    2014); Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes" (arXiv 1901.09847). At both ends of a sum: Tang et al., "1-bit Adam" (arXiv
    2102.02888).
    """

    def __init__(
        self,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        communication_options: tf.distribute.experimental.CommunicationOptions | None = None,
        compression: str | None = None,
    ) -> None:
        check_compression(compression)
        self.compression = compression
        if cluster_resolver is None:
            config = check_tf_config(os.environ.get("TF_CONFIG"))
            if config.get("task", {}).get("type") == "evaluator":
                # No member of the cluster, though TF_CONFIG tells it who trains.
                cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
                    tf.train.ClusterSpec({})
                )
        heartbeat = os.environ.get("TFBM_HEARTBEAT")
        if heartbeat:
            set_heartbeat(float(heartbeat))  # the cluster starts with the lines below
        process.let_messages_through()
        progress.note(progress.JOINING)
        try:
            super().__init__(
                cluster_resolver=cluster_resolver, communication_options=communication_options
            )
        except RuntimeError as error:
            if "program startup" not in str(error):
                raise
            raise RuntimeError(
                "MultiWorkerBlockStrategy() must come before any other TensorFlow operation: "
                "this process has already run one (a tensor, a variable, a random seed's draw, "
                "a dataset or a model). Move the strategy's line to the top of the script, "
                "right after the imports."
            ) from error
        progress.keep_signal_handler()
        broadcast_initial_values_of_any_dtype(self)
        cluster = self.cluster_resolver.cluster_spec().as_dict()
        addresses = [*cluster.get("chief", []), *cluster.get("worker", [])]
        if len(addresses) > 1:
            self._meetings = Meetings(worker_of(self)[0], addresses)
        progress.note("has joined the other workers")


class MultiDeviceBlockStrategy(BlockStrategy, tf.distribute.MirroredStrategy):
    """`tf.distribute.MirroredStrategy` for block training: several devices, one process.

    Variables are per replica, as in `MultiWorkerBlockStrategy`.

    Args:
        devices: list of device names such as `["GPU:0", "GPU:1"]`; default: all
            GPUs, or the CPU.
        cross_device_ops: as in TensorFlow.
        compression: None. What is said in `MultiWorkerBlockStrategy` of codes pays where workers
            share a network; devices of one machine exchange weights through its memory or NVLink
            in less time than it takes to code them.

    Raises:
        ValueError: a `compression`.

    Example:

    >>> strategy = tfbm.MultiDeviceBlockStrategy(["CPU:0"])
    >>> strategy.num_replicas_in_sync
    1
    """

    def __init__(
        self,
        devices: Sequence[str] | None = None,
        cross_device_ops: tf.distribute.CrossDeviceOps | None = None,
        compression: None = None,
    ) -> None:
        if compression is not None:
            raise ValueError(
                "MultiDeviceBlockStrategy takes no `compression`: devices of one machine exchange "
                "weights in less time than it takes to code them. Received: "
                f"compression={compression!r}. Leave it out, or use MultiWorkerBlockStrategy, for "
                "workers that share a network."
            )
        super().__init__(devices, cross_device_ops)


def worker_of(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """Returns (index, count): which of how many workers this process is."""
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or not resolver.cluster_spec():
        return 0, 1
    cluster = resolver.cluster_spec().as_dict()
    tasks = [(k, i) for k in ("chief", "worker") for i in range(len(cluster.get(k, [])))]
    return tasks.index((resolver.task_type, resolver.task_id)), len(tasks)


def meeting(
    strategy: tf.distribute.Strategy, place: str
) -> contextlib.AbstractContextManager[Any]:
    """As `BlockStrategy.meeting`; nothing for other strategies."""
    known = isinstance(strategy, BlockStrategy)
    return strategy.meeting(place) if known else contextlib.nullcontext()


def any_batch(
    strategy: tf.distribute.Strategy, marks_none: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """As `BlockStrategy.any_batch`; nothing for other strategies."""
    known = isinstance(strategy, BlockStrategy)
    return strategy.any_batch(marks_none) if known else contextlib.nullcontext()


def local_input(strategy: tf.distribute.Strategy) -> contextlib.AbstractContextManager[Any]:
    """As `BlockStrategy.local_input`; nothing for other strategies."""
    known = isinstance(strategy, BlockStrategy)
    return strategy.local_input() if known else contextlib.nullcontext()


def replicas_of(variable: Any, strategy: tf.distribute.Strategy) -> tuple[tf.Variable, ...]:
    """A variable's TensorFlow variables on this worker's replicas; a single one where it was made
    outside the strategy's scope."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return strategy.experimental_local_results(value)


def check_compression(compression: Any) -> None:
    """Raises ValueError unless it is None or a name that is known."""
    if compression is not None and compression not in COMPRESSIONS:
        raise ValueError(
            '`compression` must be None, "float16", "int8" or "int4". Received: '
            f"compression={compression!r}."
        )


def check_strategy(strategy: tf.distribute.Strategy) -> None:
    """Raises ValueError unless replicas can train alone under `strategy`."""
    if strategy is _NO_STRATEGY or isinstance(strategy, BlockStrategy):
        return
    remedy = (
        "tfbm.MultiWorkerBlockStrategy()"
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        else "tfbm.MultiDeviceBlockStrategy(devices)"
    )
    raise ValueError(
        f"Block training needs per-replica variables, which {type(strategy).__name__} does not "
        f"have. Received: a {type(strategy).__name__}. Use {remedy} in its place, or no strategy "
        f"for a single replica."
    )
