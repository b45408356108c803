"""The compiled local steps, and the next batch."""

import contextlib

import tensorflow as tf

from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.strategy import BlockStrategy


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
            if output is None or len(parts) == 1:
                return parts[0]
            parts = [tf.convert_to_tensor(part) for part in parts]  # eagerly they may be floats
            if not parts[0].dtype.is_floating:
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
