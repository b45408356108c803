"""BlockLoop: compiled local steps, and the boundary that ends a block."""

import concurrent.futures
import functools
import numbers
import warnings
import weakref

import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum.boundary.boundary import Boundary
from tf_blockmomentum.boundary.exchange import sum_over_replicas
from tf_blockmomentum.optimizer import check_strategy, find
from tf_blockmomentum.steps import explaining_xla, make_local_steps, next_batch, resolve_jit
from tf_blockmomentum.strategy import check_number, worker_of


class BlockLoop:
    """Runs a step function in blocks: K local steps, then the boundary.

    The local steps loop in one compiled `tf.function` and do not communicate. The
    boundary is a second one: an all-reduce of a few packed messages, the outer step,
    and the copy back to the replica. Where a block ends is decided in Python, since
    a collective cannot stand in a graph's loop under `MultiWorkerMirroredStrategy`;
    every worker must therefore call `run` and `flush` alike.

    A replica that took no step in a block (its data ended first) is left out of
    that block's mean. When data ends, the block ends too. A replica whose weights are
    not finite at a boundary is left out of the mean as well, so the anchor stays finite.

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
        on_nonfinite: what to do about a replica with NaN or infinite weights or
            statistics at a boundary. "raise" stops all workers. "skip" warns, counts it
            in `skipped`, and lets that replica go on from the anchor; what is not finite
            in its inner optimizer's state becomes 0.

    Raises:
        TypeError: `optimizer` is not a BlockMomentum.
        ValueError: a strategy without per-replica variables, or a `jit_compile` or
            `on_nonfinite` that is none of the above.
        FloatingPointError: from `run` and `flush`, on every worker: a replica is not finite
            and `on_nonfinite="raise"`, or no replica is.

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
        self,
        step_fn,
        optimizer,
        strategy=None,
        averaged_variables=(),
        jit_compile="auto",
        on_nonfinite="raise",
    ):
        self._block_momentum = find(optimizer)
        if self._block_momentum is None:
            raise TypeError(
                "BlockLoop needs a BlockMomentum optimizer. Received: optimizer="
                f"{optimizer!r}. Wrap yours: tfbm.BlockMomentum(optimizer)."
            )
        self._strategy = strategy or tf.distribute.get_strategy()
        check_strategy(self._strategy)
        self._jit = resolve_jit(jit_compile)
        self._skip_nonfinite = check_on_nonfinite(on_nonfinite) == "skip"
        self._position = 0  # local steps since the last boundary
        # Batches taken from the present iterator. It is not kept alive: TensorFlow may wait
        # forever for one that is left over when the process ends.
        self._iterator = lambda: None
        self._taken = 0
        self._ended = 0  # replicas whose data had ended at the last boundary
        self._stopping = False  # whether a worker has asked all to stop
        self.skipped = 0
        self._drift = 0.0
        self._lookahead: tuple | None = None  # (iterator, Optional of its next batch)
        self._finished = lambda: None  # the iterator whose end all replicas have reached
        if getattr(self._strategy, "compression", None):
            self._check_built()
        self._replica = replica = Boundary(
            self._block_momentum,
            self._strategy,
            list(averaged_variables),
            self._jit,
            self._skip_nonfinite,
        )

        def local_step(data):
            with self._block_momentum.local_step():
                return step_fn(data)

        self._local_steps = make_local_steps(
            local_step, self._strategy, self._jit, after_step=lambda: replica.steps.assign_add(1)
        )
        self._boundary = self._on_replicas(replica.boundary)
        self._send = self._on_replicas(replica.leave)
        self._begin = self._on_replicas(replica.begin)
        self._land = self._on_replicas(replica.land)
        self._transport = self._on_replicas(replica.transport)
        self._send_again = self._on_replicas(replica.send_again)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # started when first used
        self._flight: concurrent.futures.Future | None = None  # deltas on their way
        self._sum = tf.function(
            lambda x: self._strategy.run(lambda x: sum_over_replicas([x])[0], args=(x,)),
            autograph=False,
        )

    def _on_replicas(self, replica_fn):
        @functools.wraps(replica_fn)
        def on_replicas(*args):
            return self._strategy.run(replica_fn, args=args)

        return tf.function(on_replicas, autograph=False)

    @property
    def position(self):
        """Local steps since the last boundary, from 0 to K - 1."""
        return self._position

    @property
    def at_anchor(self):
        """Whether no block has begun, and no deltas are in flight."""
        return self._position == 0 and self._flight is None

    @property
    def drift(self):
        """The replicas' drift at the last boundary, if the schedule of `sync_period` measures it
        (0 if not): how far they were from their mean, relative to the anchor's norm."""
        return self._drift

    @property
    def stopping(self):
        """Whether a worker asked all to stop at the last boundary."""
        return self._stopping

    @property
    def some_ended(self):
        """Whether the data of a replica had ended at the last boundary."""
        return self._ended > 0

    @property
    def all_ended(self):
        """Whether the data of all replicas has ended, all of them knowing it."""
        return self._ended == self._strategy.num_replicas_in_sync

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
        """Ends the current block early, if it has begun, and with `overlap` lands what is in
        flight: all replicas are at the anchor then. All workers call it alike."""
        if self._position:
            self._end_block(ended=False)
        if self._flight is not None:
            self._land_flight(flush=True)

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
        self._check_built()
        check_number("steps", steps, numbers.Integral, "a whole number of at least 1", 1)
        if self.has_finished(iterator):
            raise StopIteration
        logs, remaining = None, steps
        while remaining > 0:
            period = self._block_momentum.period
            wanted = min(remaining, max(period - self._position, 1))
            first, self._lookahead = self._lookahead, None
            first = first[1] if first and first[0] is iterator else None
            with explaining_xla(self._jit):
                taken, new_logs, following = self._local_steps(iterator, wanted, first, peek)
            self._position += taken
            self._count(iterator, taken)
            remaining -= taken
            if taken:
                logs = new_logs
            ended = taken < wanted or (last and remaining == 0)
            if peek and not ended:
                ended = not bool(following.has_value())
                self._lookahead = None if ended else (iterator, following)
            if ended or self._position >= period:
                self._end_block(ended)
            if ended:
                over = taken < wanted or not last
                self._finished = weakref.ref(iterator) if over else lambda: None
            if ended or self._stopping:
                break
        if remaining == steps:
            raise StopIteration
        return logs

    def _check_built(self):
        if not self._block_momentum.built:
            raise ValueError(
                "The optimizer must be built before the first step. Call "
                "optimizer.build(model.trainable_variables), inside strategy.scope()."
            )

    @property
    def batches(self):
        """The present iterator, how many of its batches have been trained on, and whether
        one more has been taken from it already."""
        iterator = self._iterator()
        one_more = self._lookahead is not None and self._lookahead[0] is iterator
        return iterator, self._taken, one_more

    def _count(self, iterator, batches):
        if self._iterator() is not iterator:
            self._iterator, self._taken = weakref.ref(iterator), 0
        self._taken += batches

    def has_finished(self, iterator):
        """Whether all replicas have come to the end of this iterator's data."""
        return self._finished() is iterator

    @property
    def variables(self):
        """Its own state besides `position`: each replica's steps in the present block."""
        return self._replica.variables

    def go_on(self, position):
        """Goes on in the middle of a block whose variables have been restored."""
        self._position = position
        if self._block_momentum.in_flight:
            self._depart(self._send_again())
            assert self._flight is not None
            self._flight.result()  # others may communicate before the next step

    def skip(self, iterator, count, taken=0):
        """Takes `count` batches without training on them, on this worker alone; `taken`
        more have been taken from the iterator already."""
        strategy = self._strategy

        @tf.function(autograph=False)
        def take(iterator, count):
            tf.while_loop(
                lambda i, more: tf.logical_and(i < count, more),
                lambda i, more: (i + 1, next_batch(iterator, strategy).has_value()),
                (tf.constant(0), tf.constant(True)),
            )

        if count:
            take(iterator, tf.constant(count))
        self._count(iterator, count + taken)

    def begin_epoch(self):
        """Forgets that data had ended, and whether to stop."""
        self._ended, self._stopping = 0, False

    def end_epoch(self, stopping):
        """Ends this worker's part of an epoch, however it came to its end; `stopping`: whether
        this worker wants to stop."""
        if not self.all_ended:
            self._end_block(ended=True, stopping=stopping)

    def any_worker(self, wish):
        """Whether any worker's wish is True; all workers ask alike."""
        if worker_of(self._strategy)[1] == 1:
            return wish
        wishes = self._sum(tf.constant(float(wish)))
        return float(self._strategy.experimental_local_results(wishes)[0]) > 0

    def _end_block(self, ended, stopping=False):
        """The boundary. A replica whose data has ended goes on taking part, without steps,
        until the others' has ended too: all make the same number of boundaries."""
        while True:
            progress.note("waits in a boundary")
            self._position = 0
            flags = tf.constant(ended), tf.constant(stopping)
            if self._block_momentum.overlap:
                self._send_block(*flags)
                if ended:
                    self._land_flight()
            else:
                period = self._block_momentum.period
                self._take_note(self._first(self._boundary(*flags)), period)
            progress.note("ended a block")
            if not ended or self.all_ended:
                return

    def _take_note(self, status, period=None):
        """Of what a boundary has told this worker."""
        replicas = self._strategy.num_replicas_in_sync
        counts, self._drift = status[: 4 + replicas], float(status[-1])
        active, self._ended, stop, steps, *nonfinite = map(round, counts.tolist())
        if period:
            self._block_momentum.adapt_period(period, round(steps / max(active, 1)), self._drift)
        self._stopping = stop > 0
        if any(nonfinite):
            self._handle_nonfinite(nonfinite)

    def _first(self, values):
        return self._strategy.experimental_local_results(values)[0].numpy()

    # -- overlap ------------------------------------------------------------------------------

    def _send_block(self, ended, stopping):
        """Ends a block: sends its deltas, lands those of the one before, and begins the next."""
        sums, status = self._arrive() if self._flight else ([], None)
        self._depart(self._send(ended, stopping))
        self._begin(sums)
        if status is not None:
            self._take_note(status)

    def _land_flight(self, flush=False):
        """Waits for what is in flight, and goes to the anchor. `flush`, or that the data of
        all replicas has ended: statistics become their means."""
        sums, status = self._arrive()
        replicas = self._strategy.num_replicas_in_sync
        flush = flush or round(float(status[1])) == replicas
        self._land(sums, tf.constant(flush))
        self._take_note(status)

    def _depart(self, packs):
        """Starts the all-reduce. All workers start theirs in the same order, and no other
        collective before this one has arrived: nothing else communicates within an epoch."""
        if tf.config.functions_run_eagerly():  # a setting of the process, not of a thread
            self._flight = concurrent.futures.Future()
            self._flight.set_result(self._transport(packs))
        else:
            self._flight = self._thread.submit(self._transport, packs)

    def _arrive(self):
        assert self._flight is not None
        flight, self._flight = self._flight, None
        sums, status = flight.result()
        status = self._first(status)
        if any(status[4:-1]) and not self._skip_nonfinite:
            self._land(sums, tf.constant(True))
            self._take_note(status)  # raises
        return sums, status

    def _handle_nonfinite(self, firsts):
        """`firsts`: for each replica 0, or the number of its first tensor not finite."""
        optimizer, variables = self._block_momentum, self._replica.travelling
        bad = {r: variables[first - 1] for r, first in enumerate(firsts) if first}
        what = "; ".join(
            f"replica {r} in variable {getattr(v, 'path', v.name)!r}" for r, v in bad.items()
        )
        bad_is = "NaN or infinity" + (
            ", or too large for float16" if self._replica.residuals else ""
        )
        text = f"A delta is not finite ({bad_is}) in block {optimizer.blocks}: {what}"
        if not self._skip_nonfinite:
            raise FloatingPointError(
                f'{text}. Received: on_nonfinite="raise". The anchor is finite, made without that '
                "replica. Lower the inner learning rate, clip gradients (clipnorm on the inner "
                "optimizer) or look for bad examples in its data; or leave such replicas out of "
                'the block with on_nonfinite="skip".'
            )
        if len(bad) == len(firsts):
            raise FloatingPointError(
                f'{text}. Received: on_nonfinite="skip", and no replica is left for the mean. '
                "Lower the inner learning rate, or clip gradients (clipnorm on the inner "
                "optimizer)."
            )
        self.skipped += len(bad)
        warnings.warn(f"{text}. Left out of this block; it goes on from the anchor.", stacklevel=2)


def check_on_nonfinite(on_nonfinite):
    """Returns `on_nonfinite` if it is one of the two."""
    if on_nonfinite in ("raise", "skip"):
        return on_nonfinite
    raise ValueError(
        f'`on_nonfinite` must be "raise" or "skip". Received: on_nonfinite={on_nonfinite!r}.'
    )
