"""BlockLoop: compiled local steps, and the boundary that ends a block."""

import contextlib
import numbers

import tensorflow as tf

from tf_blockmomentum import _keras
from tf_blockmomentum.optimizer import check_number, check_strategy, find
from tf_blockmomentum.strategy import BlockStrategy, sum_over_replicas


class BlockLoop:
    """Runs a step function in blocks: K local steps, then the boundary.

    The local steps loop in one compiled `tf.function` and do not communicate. The
    boundary is a second one: a single packed all-reduce per dtype, the outer step,
    and the copy back to the replica. Where a block ends is decided in Python, since
    a collective cannot stand in a graph's loop under `MultiWorkerMirroredStrategy`;
    every worker must therefore call `run` and `flush` alike.

    A replica that took no step in a block (its data ended first) is left out of
    that block's mean. When data ends, the block ends too.

    Args:
        step_fn: function of one batch (one replica's share), run in every replica. It
            computes gradients and calls `optimizer.apply`, and returns scalars or
            other tensors of fixed shape, in any structure, or None. As usual under
            `tf.distribute` the loss is scaled by 1/P; `keras.losses` do that.
        optimizer: a built `BlockMomentum`, or Keras's LossScaleOptimizer around one.
        strategy: a block strategy, or None for one replica.
        averaged_variables: per-replica variables that are replaced by their means at
            a boundary, such as BatchNormalization's moving statistics.
        jit_compile: True compiles a replica's step with XLA; False does not; "auto"
            does where a GPU is present.

    Raises:
        TypeError: `optimizer` is not a BlockMomentum.
        ValueError: a strategy without per-replica variables, or a `jit_compile` that
            is none of the three.

    Example:

    >>> w = keras.Variable([0.0])
    >>> optimizer = tfbm.BlockMomentum(keras.optimizers.SGD(0.5), sync_period=2)
    >>> optimizer.build([w])
    >>> def step(x):
    ...     with tf.GradientTape() as tape:
    ...         loss = tf.reduce_mean((w - x) ** 2)
    ...     optimizer.apply([tape.gradient(loss, w.value)], [w])
    ...     return loss
    >>> loop = tfbm.BlockLoop(step, optimizer, strategy=None)
    >>> data = iter(tf.data.Dataset.from_tensors([2.0]).repeat(4))
    >>> float(loop.run(data, steps=4)), int(optimizer.blocks)
    (0.0, 2)
    """

    def __init__(
        self, step_fn, optimizer, strategy=None, averaged_variables=(), jit_compile="auto"
    ):
        self._block_momentum = find(optimizer)
        if self._block_momentum is None:
            raise TypeError(
                "BlockLoop needs a BlockMomentum optimizer. Received: optimizer="
                f"{optimizer!r}. Wrap yours: tfbm.BlockMomentum(optimizer)."
            )
        self._strategy = strategy or tf.distribute.get_strategy()
        check_strategy(self._strategy)
        self._averaged = list(averaged_variables)
        self._jit = resolve_jit(jit_compile)
        self._position = 0  # local steps since the last boundary
        self._lookahead = None  # (iterator, Optional of its next batch)
        self._finished = None  # the iterator whose end all replicas have reached
        with self._strategy.scope():
            # Steps this replica took in this block.
            self._steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="block_steps")

        def local_step(data):
            with self._block_momentum.local_step():
                return step_fn(data)

        self._local_steps = make_local_steps(
            local_step, self._strategy, self._jit, after_step=lambda: self._steps.assign_add(1)
        )
        self._boundary = tf.function(self._cross_replica_boundary, autograph=False)

    @property
    def position(self):
        """Local steps since the last boundary, from 0 to K - 1."""
        return self._position

    def run(self, iterator, steps):
        """Takes up to `steps` local steps, ending every block that becomes full.

        Args:
            iterator: from `iter(strategy.experimental_distribute_dataset(dataset))`, or
                from a tf.data dataset when there is no strategy.
            steps: how many batches to take, at least 1.

        Returns:
            What `step_fn` returned for the last batch, averaged over this worker's
            replicas (no communication).

        Raises:
            StopIteration: there was no batch left; all replicas have then ended.
        """
        return self._run(iterator, steps)

    def flush(self):
        """Ends the current block early, if it has begun. All workers call it alike."""
        if self._position:
            self._end_block(ended=False)

    # -- Python decides where blocks end ------------------------------------------------------

    def _run(self, iterator, steps, last=False, peek=False):
        """As `run`. `last`: this worker's data ends with these steps. `peek`: it may end
        anywhere, so look for the next batch, to know the last block for the last."""
        if not isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            raise TypeError(
                "BlockLoop.run takes an iterator over a distributed dataset, as in "
                "iter(strategy.experimental_distribute_dataset(dataset)). Received: "
                f"{type(iterator).__name__}."
            )
        if not self._block_momentum.built:
            raise ValueError(
                "The optimizer must be built before the first step. Call "
                "optimizer.build(model.trainable_variables), inside strategy.scope()."
            )
        check_number("steps", steps, numbers.Integral, "a whole number of at least 1", 1)
        if iterator is self._finished:
            raise StopIteration
        logs, remaining = None, steps
        while remaining > 0:
            period = self._block_momentum.sync_period
            wanted = min(remaining, max(period - self._position, 1))
            first, self._lookahead = self._lookahead, None
            first = first[1] if first and first[0] is iterator else None
            with explaining_xla(self._jit):
                taken, new_logs, following = self._local_steps(iterator, wanted, first, peek)
            self._position += taken
            remaining -= taken
            if taken:
                logs = new_logs
            ended = taken < wanted or (last and remaining == 0)
            if peek and not ended:
                ended = not bool(following.has_value())
                self._lookahead = (iterator, following)
            if ended or self._position >= period:
                self._end_block(ended)
            if ended:
                self._finished = iterator if taken < wanted or not last else None
                break
        if remaining == steps:
            raise StopIteration
        return logs

    def _end_block(self, ended):
        """The boundary. A replica whose data has ended goes on taking part, without steps,
        until the others' has ended too: all make the same number of boundaries."""
        replicas = self._strategy.num_replicas_in_sync
        while True:
            count = self._boundary(tf.constant(ended))
            self._position = 0
            if not ended or int(count) == replicas:
                return

    # -- what is compiled ---------------------------------------------------------------------

    def _cross_replica_boundary(self, ended):
        counts = self._strategy.run(self._replica_boundary, args=(ended,))
        return self._strategy.experimental_local_results(counts)[0]

    def _replica_boundary(self, ended):
        """Ends this replica's block; returns how many replicas' data has ended."""
        optimizer = self._block_momentum
        took_steps = tf.convert_to_tensor(self._steps) > 0
        self._steps.assign(tf.zeros_like(self._steps))
        counts = None

        def mean(tensors):
            nonlocal counts
            # Counts in a dtype that is on the wire anyway; bfloat16 counts to 256 only.
            wire = tensors[0].dtype if tensors else tf.float32
            wire = tf.float32 if wire == tf.bfloat16 else wire
            header = [tf.cast(flag, wire) for flag in (took_steps, ended)]
            # Not by multiplying: a replica that is left out may hold anything.
            sent = [tf.where(took_steps, t, tf.zeros_like(t)) for t in tensors]
            *sums, active, counts = sum_over_replicas([*sent, *header])
            share = tf.math.reciprocal(tf.maximum(active, 1))
            return [total * tf.cast(share, total.dtype) for total in sums], active > 0

        optimizer.end_block(mean, self._averaged)
        return counts


def make_local_steps(step_fn, strategy, jit_compile, after_step=None):
    """Returns a function that takes local steps: no communication, no retracing.

    Args:
        step_fn: function of one replica's batch.
        strategy: where it runs.
        jit_compile: whether XLA compiles it.
        after_step: called in the replica after each step, outside XLA.

    Returns:
        `local_steps(iterator, count, first=None, peek=False)`: takes up to `count`
        batches, the first one from the Optional `first` if given. Returns the number
        of batches this worker had, an int; the last outputs of `step_fn`, averaged
        over this worker's replicas; and with `peek` the next batch, an Optional.
    """
    step = tf.function(step_fn, jit_compile=jit_compile, autograph=False)

    def replica_step(data):
        # A plain function around the compiled one: strategy.run would lift a bare
        # tf.function out over all devices, and XLA refuses other devices' variables.
        data = _keras.none_for_optional(data)

        def take():
            outputs = step(data)
            if after_step is not None:
                after_step()
            return outputs

        def skip():  # the other replicas share out a last, smaller batch
            specs = step.get_concrete_function(data).structured_outputs
            return tf.nest.map_structure(_zeros, specs)

        some = _has_examples(data)
        if some is True:
            return take(), tf.constant(True)
        if tf.executing_eagerly():
            return (take() if some else skip()), some
        return tf.cond(some, take, skip), some

    @tf.function(reduce_retracing=True, autograph=False)
    def one_step(data):
        outputs, taken = strategy.run(replica_step, args=(data,))
        taken = strategy.experimental_local_results(taken)

        def combine(output):
            parts = strategy.experimental_local_results(output)
            if output is None or len(parts) == 1 or not parts[0].dtype.is_floating:
                return parts[0]
            kept = [tf.where(t, p, tf.zeros_like(p)) for t, p in zip(taken, parts, strict=True)]
            count = tf.add_n([tf.cast(t, tf.int32) for t in taken])
            return tf.add_n(kept) / tf.cast(tf.maximum(count, 1), parts[0].dtype)

        return tf.nest.map_structure(combine, outputs), tf.reduce_any(taken)

    def loop(iterator, count, first, peek):
        # A first look at one step tells what it returns, which the loop has to know.
        specs, _ = one_step.get_concrete_function(first.element_spec).structured_outputs
        outputs = [_zeros(spec) for spec in tf.nest.flatten(specs) if spec is not None]
        shapes = [spec.shape for spec in tf.nest.flatten(specs) if spec is not None]

        def more(i, following, _):
            return tf.logical_and(i < count, following.has_value())

        def body(i, following, outputs):
            new, taken = one_step(following.get_value())
            new = [tensor for tensor in tf.nest.flatten(new) if tensor is not None]
            outputs = tf.cond(taken, lambda: new, lambda: outputs) if new else outputs
            if peek:
                following = next_batch(iterator, strategy)
            else:
                following = tf.cond(
                    i + 1 < count, lambda: next_batch(iterator, strategy), lambda: following
                )
            return i + 1, following, outputs

        taken, following, outputs = tf.while_loop(
            more,
            body,
            (tf.constant(0), first, outputs),
            shape_invariants=(tf.TensorShape([]), tf.type_spec_from_value(first), shapes),
        )
        found = iter(outputs)
        outputs = tf.nest.map_structure(lambda s: None if s is None else next(found), specs)
        return taken, outputs, following if peek else None

    @tf.function(reduce_retracing=True, autograph=False)
    def from_iterator(iterator, count, peek):
        return loop(iterator, count, next_batch(iterator, strategy), peek)

    @tf.function(reduce_retracing=True, autograph=False)
    def from_first(iterator, count, first, peek):
        return loop(iterator, count, first, peek)

    def local_steps(iterator, count, first=None, peek=False):
        if not isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            # test_on_batch: the batch is this worker's, and each of its replicas takes it.
            outputs, _ = one_step(next(iterator))
            return 1, outputs, None
        count = tf.constant(count)
        if first is None:
            taken, outputs, following = from_iterator(iterator, count, peek)
        else:
            taken, outputs, following = from_first(iterator, count, first, peek)
        return int(taken), outputs, following

    return local_steps


def next_batch(iterator, strategy):
    """The iterator's next batch as an Optional, asking this worker only."""
    if isinstance(strategy, BlockStrategy):
        with strategy.local_input():
            return iterator.get_next_as_optional()
    return iterator.get_next_as_optional()


def resolve_jit(jit_compile):
    """Turns "auto" into whether a GPU is present."""
    if jit_compile == "auto":
        return bool(tf.config.list_physical_devices("GPU"))
    if jit_compile is True or jit_compile is False:
        return jit_compile
    raise ValueError(
        f'`jit_compile` must be True, False or "auto". Received: jit_compile={jit_compile!r}.'
    )


@contextlib.contextmanager
def explaining_xla(jit_compile):
    """Inside, an operation that XLA cannot compile raises a ValueError with the remedy."""
    try:
        yield
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        if not jit_compile or "XLA" not in str(error):
            raise
        raise ValueError(
            "XLA cannot compile this model's step. Received: jit_compile=True, and an operation "
            f"XLA does not support ({str(error).strip().splitlines()[0]}). Use "
            "jit_compile=False, or move the operation into the tf.data pipeline."
        ) from error


def _has_examples(data):
    """Whether a replica's share of a batch is not empty: True if that is certain."""
    for leaf in tf.nest.flatten(data):
        if isinstance(leaf, tf.Tensor) and leaf.shape.rank:
            return True if leaf.shape[0] else tf.shape(leaf)[0] > 0
        if isinstance(leaf, tf.RaggedTensor):
            return leaf.nrows() > 0
        if isinstance(leaf, tf.SparseTensor):
            return leaf.dense_shape[0] > 0
    return True


def _zeros(spec):
    return None if spec is None else tf.zeros([d or 0 for d in spec.shape], spec.dtype)
