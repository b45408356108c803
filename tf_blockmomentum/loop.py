"""BlockLoop: compiled local steps, and the boundary that ends a block."""

import concurrent.futures
import contextlib
import functools
import numbers
import warnings
import weakref

import tensorflow as tf

from tf_blockmomentum import _keras, progress
from tf_blockmomentum.optimizer import check_strategy, find, square_norm
from tf_blockmomentum.strategy import (
    BlockStrategy,
    check_number,
    pack,
    sum_over_replicas,
    sum_packs,
    unpack,
    worker_of,
)

_LARGE = 1_000_000  # weights; compiling takes a second, and saves some ms a block


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
        self._averaged = list(averaged_variables)
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
        with self._strategy.scope():
            # Steps this replica took in this block.
            self._steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="block_steps")
            # Of the block whose deltas were sent last: what `_outgoing` puts into the header.
            self._sent_counts = tf.Variable([0] * 4, dtype=tf.int64, trainable=False, name="sent")
            # What compression has kept back so far.
            self._residuals: list = []
            if getattr(self._strategy, "compression", None):
                self._check_built()
                self._residuals = [
                    tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False, name="residual")
                    for v in self._block_momentum.trained_variables
                ]

        def local_step(data):
            with self._block_momentum.local_step():
                return step_fn(data)

        self._local_steps = make_local_steps(
            local_step, self._strategy, self._jit, after_step=lambda: self._steps.assign_add(1)
        )
        self._boundary = self._on_replicas(self._replica_boundary)
        self._send = self._on_replicas(self._leave)
        self._begin = self._on_replicas(self._replica_begin)
        self._land = self._on_replicas(self._replica_land)
        self._transport = self._on_replicas(self._replica_transport)
        self._send_again = self._on_replicas(self._replica_send_again)
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

    def _compiled(self, replica_fn):
        """A function of the boundary that does not communicate. For large models XLA compiles
        it, whatever `jit_compile` is: each output takes one pass over what it depends on."""
        weights = sum(v.shape.num_elements() for v in self._block_momentum.trained_variables)
        jit = self._jit or weights >= _LARGE
        return tf.function(replica_fn, jit_compile=jit, autograph=False)

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
        return [self._steps, self._sent_counts, *self._residuals]

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
        optimizer, variables = self._block_momentum, self._travelling
        bad = {r: variables[first - 1] for r, first in enumerate(firsts) if first}
        what = "; ".join(
            f"replica {r} in variable {getattr(v, 'path', v.name)!r}" for r, v in bad.items()
        )
        bad_is = "NaN or infinity" + (", or too large for float16" if self._residuals else "")
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

    # -- what is compiled ---------------------------------------------------------------------
    #
    # The weights pass through memory as seldom as the arithmetic allows. XLA computes each
    # output of a function from the function's inputs alone, so what two outputs share is
    # computed, and its inputs are read, twice: hence several small compiled functions.

    def _replica_boundary(self, ended, stopping):
        """Ends this replica's block. Returns the status, see `_status`, and the drift."""
        sums, header = self._detach(sum_packs(self._leave(ended, stopping)))
        status = self._status(header)
        come_back = self._compiled(self._come_back)
        drift = tf.cond(status[0] > 0, lambda: come_back(sums, header), lambda: 0.0)
        self._heal()
        return tf.concat([status, [drift]], axis=0)

    def _come_back(self, sums, header):
        """The outer step, and this replica to the anchor. Returns the drift."""
        optimizer = self._block_momentum
        d, others = self._means(sums, header)
        share = _share(header[0])
        drift = optimizer.drift(d, header[-1] * share)
        optimizer.end_block(optimizer.deltas(), d, header[3] * share)
        for v, value in zip(self._statistics, others, strict=True):
            v.assign(value)
        return drift

    def _heal(self):
        """Once the weights are finite again, the inner state of a replica that was left out."""
        if self._skip_nonfinite:
            first = self._sent_counts[3]
            tf.cond(first > 0, lambda: _make_finite(self._block_momentum), lambda: None)

    def _replica_begin(self, sums):
        """With `overlap`: lands the block before (`sums`, if there was one), begins the next."""
        if sums:
            self._replica_land(sums)
        self._compiled(self._block_momentum.begin_next)()
        self._heal()

    def _replica_send_again(self):
        """What was in flight when a backup was written; no data had ended."""
        taking_part, stopping, steps, first = tf.unstack(tf.convert_to_tensor(self._sent_counts))
        tensors = [*self._block_momentum.sent, *self._statistics]
        tensors = [tf.cast(t, s.dtype) for t, s in zip(tensors, self._wire_specs, strict=True)]
        header = self._header(taking_part > 0, False, stopping, steps, first)
        return self._attach(pack(tensors), header)

    def _replica_transport(self, packs):
        """The all-reduce. Returns the sums and, for the host, the status."""
        sums = sum_packs(packs)
        return sums, tf.concat([self._status(self._detach(sums)[1]), [0.0]], axis=0)

    def _replica_land(self, sums, flush=None):
        """The outer step of the block before; with `flush` (None: never) this replica to the
        anchor, and the statistics' means. Without it they go on as they are: moving averages of
        a replica's own may be averaged at any later time with the same result."""
        optimizer = self._block_momentum
        sums, header = self._detach(sums)

        def outer_step(sums, header):
            optimizer.land(self._means(sums, header)[0])

        tf.cond(header[0] > 0, lambda: self._compiled(outer_step)(sums, header), lambda: None)
        if flush is not None:
            optimizer.discard_block()
        if not self._statistics or (flush is None and not self._skip_nonfinite):
            return
        for v, value in zip(self._statistics, self._means(sums, header)[1], strict=True):
            own = tf.convert_to_tensor(v)
            if flush is not None:
                v.assign(tf.where(tf.logical_and(flush, header[-1] > 0), value, own))
            else:
                v.assign(tf.where(tf.math.is_finite(own), own, value))

    def _leave(self, ended, stopping):
        """Ends this replica's block. Returns what it sends, packed: its deltas and statistics,
        as zeros if it is left out; then the header."""
        optimizer = self._block_momentum
        steps = tf.convert_to_tensor(self._steps)
        self._steps.assign(tf.zeros_like(self._steps))
        if optimizer.overlap:
            self._compiled(self._keep)(steps)
        # Without XLA they are parts of the variables with the deltas, not copies.
        in_variables = optimizer.overlap and not self._residuals
        packs = (self._packed if in_variables else self._compiled(self._packed))(steps)
        finite = tf.reduce_all([True, *(tf.reduce_all(tf.math.is_finite(p)) for p in packs)])
        first = tf.cond(finite, lambda: 0, lambda: self._first_not_finite(steps))
        taking_part = tf.logical_and(steps > 0, finite)
        # Not by multiplying: a replica that is left out may hold anything.
        packs = tf.cond(finite, lambda: packs, lambda: [tf.zeros_like(p) for p in packs])
        if optimizer.measures_drift:
            square = self._compiled(lambda steps: square_norm(self._coded(steps)[0]))(steps)
            square = tf.where(taking_part, square, 0.0)
        if self._residuals:  # not one function with the next: XLA would copy before it overwrites
            self._compiled(self._settle_residuals)(steps, taking_part)
        if optimizer.overlap:
            as_it_was = tf.logical_and(finite, in_variables)
            settle = self._compiled(self._settle_sent)
            tf.cond(as_it_was, lambda: None, lambda: settle(steps, taking_part))
        counts = (taking_part, stopping, steps, first)
        self._sent_counts.assign(tf.stack([tf.cast(x, tf.int64) for x in counts]))
        header = self._header(taking_part, ended, stopping, steps, first)
        if optimizer.measures_drift:
            header = tf.concat([header, [square]], axis=0)
        return self._attach(packs, header)

    def _wanted(self, steps):
        """This replica's deltas and what has been kept back of them; 0 if it took no step."""
        deltas = self._block_momentum.deltas()
        if self._residuals:
            deltas = [x + r for x, r in zip(deltas, self._residuals, strict=True)]
        return [tf.where(steps > 0, x, tf.zeros_like(x)) for x in deltas]

    def _keep(self, steps):
        """With `overlap`: the deltas are in variables from now on."""
        self._block_momentum.keep_deltas(self._wanted(steps))

    def _coded(self, steps):
        """What this replica sends as deltas, and what compression would keep back."""
        if self._block_momentum.overlap:
            wanted = list(map(tf.convert_to_tensor, self._block_momentum.sent))
        else:
            wanted = self._wanted(steps)
        return self._strategy.compress(wanted) if self._residuals else (wanted, [])

    def _packed(self, steps):
        return pack(self._outgoing(steps))

    def _outgoing(self, steps):
        """What a replica sends but for the header, should all be finite."""
        statistics = list(map(tf.convert_to_tensor, self._statistics))
        if not self._block_momentum.overlap:  # with it they are averaged later, if at all
            statistics = [tf.where(steps > 0, t, tf.zeros_like(t)) for t in statistics]
        return [*self._coded(steps)[0], *statistics]

    def _first_not_finite(self, steps):
        """The number, from 1, of the first tensor that is not."""
        finite = [tf.reduce_all(tf.math.is_finite(t)) for t in self._outgoing(steps)]
        return tf.argmin(tf.cast(tf.stack([True, *finite]), tf.int32), output_type=tf.int32)

    def _settle_residuals(self, steps, taking_part):
        """What has been sent is kept back no longer."""
        rests = self._coded(steps)[1]
        for residual, rest in zip(self._residuals, rests, strict=True):
            residual.assign(tf.where(taking_part, rest, residual))

    def _settle_sent(self, steps, taking_part):
        """With `overlap`: what has been sent is what is in flight."""
        codes = self._coded(steps)[0]
        for x, code in zip(self._block_momentum.sent, codes, strict=True):
            x.assign(tf.where(taking_part, tf.cast(code, x.dtype), tf.zeros_like(x)))

    @property
    def _wire_specs(self):
        """What `_outgoing` returns: shapes and dtypes."""
        specs = [tf.TensorSpec(v.shape, tf.as_dtype(v.dtype)) for v in self._travelling]
        if self._residuals:
            weights = len(self._residuals)
            specs[:weights] = [tf.TensorSpec(s.shape, tf.float16) for s in specs[:weights]]
        return specs

    @property
    def _travelling(self):
        """The variables that a boundary averages, in the order of `_outgoing`."""
        return [*self._block_momentum.trained_variables, *self._statistics]

    @property
    def _statistics(self):
        """What is averaged at a boundary besides the weights."""
        return [*self._averaged, *self._block_momentum.averaged_state]

    def _header(self, taking_part, ended, stopping, steps, first):
        context = tf.distribute.get_replica_context()
        replica, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync
        wire = self._header_dtype
        taken = tf.where(taking_part, steps, 0)
        numbers = [taking_part, ended, stopping, taken]
        which = tf.one_hot(replica, replicas, dtype=wire) * tf.cast(first, wire)
        counts = [tf.cast(x, wire) for x in numbers]
        last = [tf.cast(first == 0, wire)] if self._block_momentum.overlap else []
        return tf.concat([counts, which, last], axis=0)

    @property
    def _header_dtype(self):
        """One that is on the wire anyway, unless it counts badly."""
        specs = self._wire_specs
        wire = specs[0].dtype if specs else tf.float32
        coarse = wire in (tf.bfloat16, tf.float16) or self._block_momentum.scheduled
        return tf.float32 if coarse else wire

    def _attach(self, packs, header):
        """Appends the header to the last pack of its dtype, or as a pack of its own."""
        i = _last_of(packs, header.dtype)
        if i is None:
            return [*packs, header]
        return [*packs[:i], tf.concat([packs[i], header], axis=0), *packs[i + 1 :]]

    def _detach(self, packs):
        """The reverse of `_attach`, of sums."""
        optimizer = self._block_momentum
        size = 4 + self._strategy.num_replicas_in_sync
        size += optimizer.overlap or optimizer.measures_drift
        i = _last_of(packs, self._header_dtype)
        rest = [packs[i][:-size]] if packs[i].shape[0] > size else []
        return [*packs[:i], *rest, *packs[i + 1 :]], packs[i][-size:]

    def _status(self, header):
        """From a summed header: how many replicas were averaged, how many replicas' data has
        ended, how many ask to stop, the steps of those averaged, then for each replica 0 or the
        number of its first tensor that is not finite."""
        return tf.cast(header[: 4 + self._strategy.num_replicas_in_sync], tf.float32)

    def _means(self, sums, header):
        """The means of the deltas and of the statistics, from their sums, packed, and the summed
        header, which says how many replicas are in them."""
        weights = len(self._block_momentum.trained_variables)
        share = _share(header[0])
        others = _share(header[-1]) if self._block_momentum.overlap else share
        means = [
            tf.cast(s, v.dtype) * tf.cast(share if i < weights else others, v.dtype)
            for i, (s, v) in enumerate(
                zip(unpack(sums, self._wire_specs), self._travelling, strict=True)
            )
        ]
        return means[:weights], means[weights:]


def _last_of(packs, dtype):
    """The number of the last pack of that dtype, or None."""
    return max((i for i, flat in enumerate(packs) if flat.dtype == dtype), default=None)


def _share(replicas):
    """What one of so many has in a mean."""
    return tf.math.reciprocal(tf.maximum(replicas, 1))


def _make_finite(optimizer):
    """Rids a replica's inner state of NaN and infinity, which would return at every step."""
    inner = optimizer.inner_optimizer
    averages = {id(v): w for v, w in _keras.moving_averages(inner, optimizer.trained_variables)}
    for v in inner.variables:
        if tf.as_dtype(v.dtype).is_floating:
            value = tf.convert_to_tensor(v)
            instead = averages.get(id(v), tf.zeros_like(value))
            v.assign(tf.where(tf.math.is_finite(value), value, instead))


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


def check_on_nonfinite(on_nonfinite):
    """Returns `on_nonfinite` if it is one of the two."""
    if on_nonfinite in ("raise", "skip"):
        return on_nonfinite
    raise ValueError(
        f'`on_nonfinite` must be "raise" or "skip". Received: on_nonfinite={on_nonfinite!r}.'
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
