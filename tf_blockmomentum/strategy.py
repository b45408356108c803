"""Where variables live: one copy per replica, unsynchronised.

A block strategy is TensorFlow's own strategy with two changes. Variables that
would be mirrored are per-replica instead, so that a replica can train alone for
a whole block. And what Keras reduces on its own account (the shape of a first
batch, whether any worker has data left) can be answered locally, so that the
only communication is at a block boundary.
"""

import contextlib
import json
import os

import tensorflow as tf

from tf_blockmomentum import progress

# Between two workers on 1 Gbit/s 19 MB took 173 ms in one piece and 159 to 162 in four or more,
# two at once or all. With more pieces the messages begin to cost; with more at once, memory.
_PACK_BYTES, _PACKS, _AT_ONCE = 4 << 20, 32, 2
_MOST = 60000.0  # that rounding cannot carry past the largest float16


def _per_replica_creator(next_creator, **kwargs):
    """Variable creator: what would be mirrored becomes per-replica.

    `ON_READ` makes an assignment inside a step local to its replica. With
    `ONLY_FIRST_REPLICA` a read outside a step takes this worker's first replica
    and never communicates, so the chief can save alone. Variables that asked for
    a synchronisation of their own (metrics: `ON_READ` and `SUM`) keep it.
    """
    if kwargs.get("synchronization") in (None, tf.VariableSynchronization.AUTO):
        kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
        if kwargs.get("aggregation") != tf.VariableAggregation.SUM:
            kwargs["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
        if kwargs.get("trainable") is None:  # ON_READ alone would mean False
            kwargs["trainable"] = True
    return next_creator(**kwargs)


class BlockStrategy(tf.distribute.Strategy):
    """What the two public strategies share (not to be instantiated)."""

    compression: str | None = None  # of deltas on the wire
    _answers_locally = False

    def compress(self, wanted):
        """What a replica sends in place of tensors that it wants to, in replica context.

        float16 with error feedback: what rounding takes from one block is in the replica's
        residual, and wanted with the next. A value that is too large for the sum becomes
        infinite, and so an error. A coarser code (fewer bits, the largest values alone) would
        go here, with a sum of its own in `sum_packs` where codes do not add up.

        Args:
            wanted: this replica's deltas, with the residuals added.

        Returns:
            List of float16 tensors, and the list of residuals if they are sent.

        Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
        Compression Schemes" (arXiv 1901.09847), EF-SGD.
        """
        most = _MOST / self.num_replicas_in_sync
        codes = [
            tf.cast(tf.where(tf.abs(x) > most, x * float("inf"), x), tf.float16) for x in wanted
        ]
        return codes, [x - tf.cast(c, x.dtype) for x, c in zip(wanted, codes, strict=True)]

    @contextlib.contextmanager
    def scope(self):
        """Enters the strategy: variables made inside are per replica."""
        with super().scope(), tf.variable_creator_scope(_per_replica_creator):
            yield

    @contextlib.contextmanager
    def local_input(self):
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

    def reduce(self, reduce_op, value, axis=None):
        """Reduces a value, or a structure of values, over all replicas.

        As `tf.distribute.Strategy.reduce`, which takes neither structures nor
        an `axis` for scalars under `MultiWorkerMirroredStrategy`; Keras passes
        both (keras issue 20585).
        """
        if self._answers_locally:
            return tf.nest.map_structure(lambda v: self.experimental_local_results(v)[0], value)

        def reduce_one(v):
            scalar = tf.convert_to_tensor(self.experimental_local_results(v)[0]).shape.rank == 0
            return super(BlockStrategy, self).reduce(reduce_op, v, axis=None if scalar else axis)

        return tf.nest.map_structure(reduce_one, value)

    def mean_over_workers(self, value):
        """The mean of the workers' own values of a tensor, on every worker."""
        value = tf.cast(value, tf.float32)
        values = self.experimental_distribute_values_from_function(lambda _: value)
        return self.reduce("MEAN", values)

    def experimental_distribute_dataset(self, dataset, options=None):
        """Shards and rebatches `dataset`, which is batched by the global batch.

        One batch is read ahead, on the host. `options` of your own replace this.

        Raises:
            ValueError: the batch size does not divide by the number of replicas.
        """
        size = int(
            tf.raw_ops.ComputeBatchSize(input_dataset=tf.data.experimental.to_variant(dataset))
        )
        check_global_batch(size if size > 0 else None, self)  # -1: TensorFlow cannot tell
        if options is None:
            dataset, options = dataset.prefetch(1), _no_device_buffer()
        return super().experimental_distribute_dataset(dataset, options)

    def distribute_datasets_from_function(self, dataset_fn, options=None):
        """As in TensorFlow; nothing is read ahead but what the dataset itself prefetches."""
        if options is None:
            options = _no_device_buffer()
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

    Args:
        cluster_resolver: as in TensorFlow; default: `TF_CONFIG`.
        communication_options: as in TensorFlow.
        compression: "float16" halves what a boundary sends: deltas travel, and are added up,
            as float16 with error feedback (what rounding takes from one block is sent with
            the next). Statistics and slots that are averaged travel as they are. Costs one
            more copy of the weights. Not for weights that move by more than 60000/P in a
            block: that is reported as not finite. None (the default) sends them as they are.

    Raises:
        ValueError: `TF_CONFIG` is not a usable cluster description, or another `compression`.
        RuntimeError: TensorFlow has already run an operation in this process.
    """

    def __init__(self, cluster_resolver=None, communication_options=None, compression=None):
        if compression not in (None, "float16"):
            raise ValueError(
                f'`compression` must be None or "float16". Received: compression={compression!r}.'
            )
        self.compression = compression
        if cluster_resolver is None:
            _check_tf_config(os.environ.get("TF_CONFIG"))
        heartbeat = os.environ.get("TFBM_HEARTBEAT")
        if heartbeat:
            # Both import this module; and the cluster starts with the lines below.
            from tf_blockmomentum import _keras

            _keras.set_heartbeat(float(heartbeat))
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
        progress.note("has joined the other workers")


class MultiDeviceBlockStrategy(BlockStrategy, tf.distribute.MirroredStrategy):
    """`tf.distribute.MirroredStrategy` for block training: several devices, one process.

    Variables are per replica, as in `MultiWorkerBlockStrategy`.

    Args:
        devices: list of device names such as `["GPU:0", "GPU:1"]`; default: all
            GPUs, or the CPU.
        cross_device_ops: as in TensorFlow.

    Example:

    >>> strategy = tfbm.MultiDeviceBlockStrategy(["CPU:0"])
    >>> strategy.num_replicas_in_sync
    1
    """


def worker_of(strategy):
    """Returns (index, count): which of how many workers this process is."""
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or not resolver.cluster_spec():
        return 0, 1
    cluster = resolver.cluster_spec().as_dict()
    tasks = [(k, i) for k in ("chief", "worker") for i in range(len(cluster.get(k, [])))]
    return tasks.index((resolver.task_type, resolver.task_id)), len(tasks)


def sum_over_replicas(tensors):
    """Sums each tensor over all replicas, in replica context: a few large messages.

    Adds one packed copy of `tensors` to memory while it runs.

    Args:
        tensors: list of floating point tensors, of the same shapes on every replica.

    Returns:
        List of the sums, of the same shapes and dtypes.
    """
    return unpack(sum_packs(pack(tensors)), tensors)


def pack(tensors):
    """Flat tensors of one dtype each and some megabytes, so that a list travels neither in one
    message for each nor in a single one: with several on their way, one is added up while
    another is on the link. Large tensors are cut, without a copy if XLA does not compile this;
    small ones are put together. bfloat16, which CPU collectives do not accept, travels as
    float32."""
    flat = [tf.reshape(tf.cast(t, _wire(t)), [-1]) for t in tensors]
    return [
        tf.concat([flat[i][begin:end] for i, begin, end in pieces], axis=0)
        for pieces in _pieces(tensors)
    ]


def sum_packs(packs):
    """Sums flat tensors over all replicas, in replica context, a few at a time: each has buffers
    of its own in TensorFlow's transport while it travels."""
    context = tf.distribute.get_replica_context()
    sums: list = []
    for i, flat in enumerate(packs):
        arrived = [sums[i - _AT_ONCE]] if i >= _AT_ONCE else []
        with tf.control_dependencies(arrived):
            flat = tf.identity(flat)  # in any case: an argument alone has no device
        sums.append(context.all_reduce(tf.distribute.ReduceOp.SUM, flat))
    return sums


def unpack(packs, like):
    """The reverse of `pack`: a list of tensors of the shapes and dtypes of `like`."""
    parts: list = [[] for _ in like]
    for flat, pieces in zip(packs, _pieces(like), strict=True):
        own = tf.split(flat, [end - begin for _, begin, end in pieces])
        for (i, _, _), part in zip(pieces, own, strict=True):
            parts[i].append(part)
    return [
        tf.cast(tf.reshape(tf.concat(own, 0) if own else [], t.shape), t.dtype)
        for own, t in zip(parts, like, strict=True)
    ]


def _pieces(tensors):
    """For each pack, what it holds: number of the tensor, and from which element to which."""
    members: dict = {}
    for i, tensor in enumerate(tensors):
        members.setdefault(_wire(tensor), []).append(i)
    packs: list = []
    for wire, those in members.items():
        counts = {i: tensors[i].shape.num_elements() for i in those}
        size, room = max(_PACK_BYTES // wire.size, -(-sum(counts.values()) // _PACKS)), 0
        small: list = []
        for i, count in counts.items():
            if count > size // 2:
                each = -(-count // max(1, round(count / size)))
                each += -each % 64  # elements, lest a part not aligned be copied
                packs += [[(i, b, min(b + each, count))] for b in range(0, count, each)]
            elif count:
                if count > room:
                    packs.append(small := [])
                    room = size
                small.append((i, 0, count))
                room -= count
    return packs


def _wire(tensor):
    dtype = tf.as_dtype(tensor.dtype)
    return tf.float32 if dtype == tf.bfloat16 else dtype


def _no_device_buffer():
    """Input options without which a worker crashed in one of some 60 fits on busy machines.

    With a buffer on the device, TensorFlow's default, a thread of its own reads ahead. If the
    iterator is deleted meanwhile, as Keras does at the end of every evaluation, the thread can
    read freed memory (DatasetBaseIterator::GetNext, from BackgroundThread in
    multi_device_iterator_ops.cc). Without a buffer it reads only while it is waited for.
    """
    return tf.distribute.InputOptions(experimental_per_replica_buffer_size=0)


def check_global_batch(size, strategy):
    """Raises ValueError unless the replicas can share out batches of `size` (None: unknown)."""
    replicas = strategy.num_replicas_in_sync
    if size and size % replicas:
        share = -(-size // replicas)
        raise ValueError(
            f"The global batch must divide by the number of replicas. Received: batches of "
            f"{size} for {replicas} replicas. Use a multiple of {replicas}, such as "
            f"batch_size={replicas * share}; each replica then gets {share} examples a step."
        )


def check_number(name, value, kind, expected, least, below=float("inf")):
    """Raises ValueError unless `value` is of `kind` and `least <= value < below`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < below:
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")


def _check_tf_config(text):
    """Raises ValueError, with the remedy, for a `TF_CONFIG` TensorFlow would trip over."""
    if not text:
        return
    example = (
        '{"cluster": {"worker": ["host1:port", "host2:port"]}, '
        '"task": {"type": "worker", "index": 0}}'
    )

    def bad(problem):
        return ValueError(
            f"TF_CONFIG is not usable: {problem}. Received: TF_CONFIG={text!r}. "
            f"Expected something like {example}. "
            f"`python -m tf_blockmomentum.launch` sets it for every worker."
        )

    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad(f"it is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise bad("it is not a JSON object")
    if not config:
        return
    cluster, task = config.get("cluster"), config.get("task")
    if not isinstance(cluster, dict) or not cluster:
        raise bad("it has no `cluster`")
    for kind, addresses in cluster.items():
        if kind not in ("chief", "worker", "evaluator"):
            raise bad(f"block training knows the tasks chief and worker, not {kind!r}")
        if not isinstance(addresses, list) or not all(
            isinstance(address, str) and address.rpartition(":")[2].isdigit()
            for address in addresses
        ):
            raise bad(f'`cluster[{kind!r}]` is not a list of "host:port"')
        if len(set(addresses)) != len(addresses):
            raise bad(f"`cluster[{kind!r}]` names an address twice")
    if not isinstance(task, dict) or task.get("type") not in cluster:
        raise bad(f"`task.type` is none of {sorted(cluster)}")
    index = task.get("index")
    if not isinstance(index, int) or not 0 <= index < len(cluster[task["type"]]):
        count = len(cluster[task["type"]])
        raise bad(f"`task.index` is not a whole number from 0 to {count - 1}")
