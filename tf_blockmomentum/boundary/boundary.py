"""A boundary in the replica: leave, exchange, land."""

import tensorflow as tf

from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.boundary.exchange import sum_packs
from tf_blockmomentum.boundary.packing import pack, unpack
from tf_blockmomentum.optimizer import square_norm

_LARGE = 1_000_000  # weights; compiling takes a second, and saves some ms a block


class Boundary:
    """What a replica does at a boundary. All of its methods but `variables` are called there.

    Args:
        optimizer: the BlockMomentum.
        strategy: of which the replicas are.
        averaged: variables that are averaged besides the weights.
        jit: whether XLA compiles what does not communicate, however small.
        skip_nonfinite: whether a replica that is not finite goes on from the anchor.
    """

    def __init__(self, optimizer, strategy, averaged, jit, skip_nonfinite):
        self._block_momentum = optimizer
        self._strategy = strategy
        self._averaged = averaged
        self._jit = jit
        self._skip_nonfinite = skip_nonfinite
        with strategy.scope():
            # Steps this replica took in this block.
            self.steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="block_steps")
            # Of the block whose deltas were sent last: what `_outgoing` puts into the header.
            self._sent_counts = tf.Variable([0] * 4, dtype=tf.int64, trainable=False, name="sent")
            # What compression has kept back so far.
            self.residuals: list = []
            if getattr(strategy, "compression", None):
                self.residuals = [
                    tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False, name="residual")
                    for v in optimizer.trained_variables
                ]

    @property
    def variables(self):
        """Its state."""
        return [self.steps, self._sent_counts, *self.residuals]

    def _compiled(self, replica_fn):
        """A function of the boundary that does not communicate. For large models XLA compiles
        it, whatever `jit_compile` is: each output takes one pass over what it depends on."""
        weights = sum(v.shape.num_elements() for v in self._block_momentum.trained_variables)
        jit = self._jit or weights >= _LARGE
        return tf.function(replica_fn, jit_compile=jit, autograph=False)

    #
    # The weights pass through memory as seldom as the arithmetic allows. XLA computes each
    # output of a function from the function's inputs alone, so what two outputs share is
    # computed, and its inputs are read, twice: hence several small compiled functions.

    def boundary(self, ended, stopping):
        """Ends this replica's block. Returns the status, see `_status`, and the drift."""
        sums, header = self._detach(sum_packs(self.leave(ended, stopping)))
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

    def begin(self, sums):
        """With `overlap`: lands the block before (`sums`, if there was one), begins the next."""
        if sums:
            self.land(sums)
        self._compiled(self._block_momentum.begin_next)()
        self._heal()

    def send_again(self):
        """What was in flight when a backup was written; no data had ended."""
        taking_part, stopping, steps, first = tf.unstack(tf.convert_to_tensor(self._sent_counts))
        tensors = [*self._block_momentum.sent, *self._statistics]
        tensors = [tf.cast(t, s.dtype) for t, s in zip(tensors, self._wire_specs, strict=True)]
        header = self._header(taking_part > 0, False, stopping, steps, first)
        return self._attach(pack(tensors), header)

    def transport(self, packs):
        """The all-reduce. Returns the sums and, for the host, the status."""
        sums = sum_packs(packs)
        return sums, tf.concat([self._status(self._detach(sums)[1]), [0.0]], axis=0)

    def land(self, sums, flush=None):
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

    def leave(self, ended, stopping):
        """Ends this replica's block. Returns what it sends, packed: its deltas and statistics,
        as zeros if it is left out; then the header."""
        optimizer = self._block_momentum
        steps = tf.convert_to_tensor(self.steps)
        self.steps.assign(tf.zeros_like(self.steps))
        if optimizer.overlap:
            self._compiled(self._keep)(steps)
        # Without XLA they are parts of the variables with the deltas, not copies.
        in_variables = optimizer.overlap and not self.residuals
        packs = (self._packed if in_variables else self._compiled(self._packed))(steps)
        finite = tf.reduce_all([True, *(tf.reduce_all(tf.math.is_finite(p)) for p in packs)])
        first = tf.cond(finite, lambda: 0, lambda: self._first_not_finite(steps))
        taking_part = tf.logical_and(steps > 0, finite)
        # Not by multiplying: a replica that is left out may hold anything.
        packs = tf.cond(finite, lambda: packs, lambda: [tf.zeros_like(p) for p in packs])
        if optimizer.measures_drift:
            square = self._compiled(lambda steps: square_norm(self._coded(steps)[0]))(steps)
            square = tf.where(taking_part, square, 0.0)
        if self.residuals:  # not one function with the next: XLA would copy before it overwrites
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
        if self.residuals:
            deltas = [x + r for x, r in zip(deltas, self.residuals, strict=True)]
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
        return self._strategy.compress(wanted) if self.residuals else (wanted, [])

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
        for residual, rest in zip(self.residuals, rests, strict=True):
            residual.assign(tf.where(taking_part, rest, residual))

    def _settle_sent(self, steps, taking_part):
        """With `overlap`: what has been sent is what is in flight."""
        codes = self._coded(steps)[0]
        for x, code in zip(self._block_momentum.sent, codes, strict=True):
            x.assign(tf.where(taking_part, tf.cast(code, x.dtype), tf.zeros_like(x)))

    @property
    def _wire_specs(self):
        """What `_outgoing` returns: shapes and dtypes."""
        specs = [tf.TensorSpec(v.shape, tf.as_dtype(v.dtype)) for v in self.travelling]
        if self.residuals:
            weights = len(self.residuals)
            specs[:weights] = [tf.TensorSpec(s.shape, tf.float16) for s in specs[:weights]]
        return specs

    @property
    def travelling(self):
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
                zip(unpack(sums, self._wire_specs), self.travelling, strict=True)
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
