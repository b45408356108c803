"""What a replica sends at a boundary, and its state."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_blockmomentum._private.tensorflow import wire_dtype
from tf_blockmomentum.algorithm import only, square_norm, square_sum
from tf_blockmomentum.boundary.codes import BITS, fitting
from tf_blockmomentum.boundary.compiling import Compiling
from tf_blockmomentum.boundary.exchange import zero_unless
from tf_blockmomentum.boundary.feedback import Feedback, HalfFeedback, wide
from tf_blockmomentum.boundary.header import TOLD, Header
from tf_blockmomentum.boundary.measuring import Measuring
from tf_blockmomentum.boundary.nonfinite import first_bad
from tf_blockmomentum.boundary.packing import members, pack
from tf_blockmomentum.variables import MEAN, Rules


class Sending(Compiling):
    """The part of a `Boundary` that leaves: how far the replica has moved, as it travels.

    Args:
        optimizers: the BlockMomentum optimizers, whose blocks end together.
        strategy: of which the replicas are.
        rules: what becomes of the variables that are none of the optimizers'.
        jit: whether XLA compiles what does not communicate, however small.
        skip_nonfinite: whether a replica that is not finite goes on from the anchor.
    """

    def __init__(
        self,
        optimizers: list[Any],
        strategy: tf.distribute.Strategy,
        rules: Rules,
        jit: bool,
        skip_nonfinite: bool,
    ) -> None:
        compression = getattr(strategy, "compression", None)
        super().__init__(optimizers, jit, compression in BITS)
        self._strategy = strategy
        self._rules = rules
        self._skip_nonfinite = skip_nonfinite
        self._overlap = optimizers[0].overlap
        self.header = Header(strategy.num_replicas_in_sync)
        self._float16 = (
            HalfFeedback(strategy.num_replicas_in_sync) if compression == "float16" else None
        )
        # What int8 and int4 have.
        self._feedback: Feedback | None = None
        if compression in BITS:
            self._feedback = Feedback(compression, strategy, self._compiled, self._overlap)
        self.measuring = Measuring(optimizers, strategy)
        with strategy.scope():
            # Steps this replica took in this block.
            self.steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="block_steps")
            # Of the block whose deltas were sent last: whether they are in the mean, whether to
            # stop, steps, and the number of the first tensor not finite.
            self._sent_counts = tf.Variable([0] * 4, dtype=tf.int64, trainable=False, name="sent")
            self._sent_square = tf.Variable(0.0, trainable=False, name="sent_square")
            # With `overlap` and a schedule: K of the present block, and of the one in flight; 0
            # for what the schedule says now.
            self.periods = tf.Variable([0] * 2, dtype=tf.int64, trainable=False, name="periods")

    def ready(self) -> None:
        """Makes what depends on the rules, once they are known."""
        with self._strategy.scope():
            self._rules.follow()
            kept_back = self._feedback or self._float16
            if kept_back:
                kept_back.ready(self.trained)

    @property
    def variables(self) -> list[Any]:
        """Its state."""
        return [*self.of_this_block, *self.parts, *self._rules.starts, *self._rules.changed]

    @property
    def of_this_block(self) -> list[Any]:
        """The part of its state that is about the present block of this replica."""
        sent = [self._sent_counts, self._sent_square, self.periods]
        kept_back = self._feedback or self._float16
        return [self.steps, *sent, *(kept_back.of_this_block if kept_back else [])]

    @property
    def parts(self) -> list[Any]:
        """The part of its state that has another shape with another number of replicas."""
        return [self._feedback.part] if self._feedback else []

    @property
    def layout(self) -> Any:
        """How they are laid out."""
        return self._feedback.layout if self._feedback else None

    @property
    def limited(self) -> bool:
        """Whether a delta may be too large for what it travels as."""
        return self._float16 is not None

    @property
    def travelling(self) -> list[Any]:
        """The variables that a boundary averages, in the order in which they travel."""
        return [*self.trained, *self.statistics]

    @property
    def statistics(self) -> list[Any]:
        """What is averaged at a boundary besides the weights."""
        slots = [v for optimizer in self._optimizers for v in optimizer.averaged_state]
        return [*self._rules.of(MEAN), *slots]

    def leave(self, told: tf.Tensor, under_way: bool = False) -> list[tf.Tensor]:
        """Ends this replica's block. Returns what it sends, packed: its deltas and statistics,
        as zeros if it is left out; then the header.

        Args:
            told: what the host has to say, by `TOLD`.
            under_way: whether the block before has not landed yet.
        """
        steps = tf.convert_to_tensor(self.steps)
        self.steps.assign(tf.zeros_like(self.steps))
        if self._overlap:
            self._keep(steps, under_way)
        packs, codes, groups, scales = self._packs(), [], [], None
        tested = packs
        if self._feedback:
            groups = self._groups()
            scales = self._feedback.scales_of(groups)
            tested = [*packs, scales]
        finite = tf.reduce_all([True, *(tf.reduce_all(tf.math.is_finite(p)) for p in tested)])
        if not self._overlap:  # with it statistics travel from a replica without steps too
            finite = tf.logical_or(finite, steps == 0)
        first = tf.cond(finite, lambda: 0, lambda: self._first_not_finite(packs, groups))
        taking_part = tf.logical_and(steps > 0, finite)
        # Not by multiplying: a replica that is left out may hold anything.
        some = finite if self._overlap else taking_part
        packs = tf.cond(some, lambda: packs, lambda: [no_values(p, some) for p in packs])
        if self._feedback:
            message, spec = self._feedback.message, self._feedback.message_spec
            codes = [tf.cond(some, lambda: message(groups, scales), lambda: no_values(spec, some))]
        square = tf.constant(0.0)
        if self._optimizers[0].measures_drift or self.measuring.on:
            if self._optimizers[0].measures_drift:
                measure = self._compiled(lambda *args: square_norm(self._coded(*args)[0]))
                square = measure(*codes)
            else:
                wanted = told[TOLD.index("measuring")] > 0
                measure = tf.function(lambda *a: square_sum(self._coded(*a)[0]), autograph=False)
                square = tf.cond(wanted, lambda: measure(*codes), lambda: 0.0)
            square = tf.where(taking_part, square, 0.0)
            self._sent_square.assign(square)
        if self._feedback:
            keep_back = self._feedback.keep_back
            tf.cond(taking_part, lambda: keep_back(groups, scales), lambda: None)
            if self._feedback.scales is not None:
                self._feedback.scales.assign(tf.where(some, scales, 0.0))
        elif self._float16:  # not one function with the next: XLA would copy before it overwrites
            self._compiled(self._settle_residuals)(taking_part)
        if self._overlap and self._feedback:
            self._settle_sent(taking_part, *codes)
        elif self._overlap:
            as_it_was = tf.logical_and(finite, not self._float16)
            settle = self._compiled(self._settle_sent)
            tf.cond(as_it_was, lambda: None, lambda: settle(taking_part))
        counts = (taking_part, told[TOLD.index("stopping")], steps, first)
        self._sent_counts.assign(tf.stack([tf.cast(x, tf.int64) for x in counts]))
        header = self._header(told, taking_part, steps, first, square)
        return [*codes, *self.header.attach(packs, header)]

    def _packs(self) -> list[tf.Tensor]:
        """What a replica sends but for the header and codes, should all be finite."""

        def packed() -> list[tf.Tensor]:
            return [*self._weight_packs(), *pack(list(map(tf.convert_to_tensor, self.statistics)))]

        return (self._compiled(packed) if self._float16 or self._jit else packed)()

    def _weight_packs(self) -> list[tf.Tensor]:
        """The deltas, packed; with `overlap` and without XLA parts of the variables that have
        them, no copies. With codes there are none."""
        if self._feedback:
            return []
        as_they_are = all(wire_dtype(v.dtype) == tf.as_dtype(v.dtype) for v in self.trained)
        if self._overlap or self._float16 or not as_they_are:
            return pack(self._coded()[0])
        # First packed, then subtracted: each delta has a buffer of its own, which takes the sum.
        weights = list(map(tf.convert_to_tensor, self.trained))
        anchors = [tf.convert_to_tensor(x) for o in self._optimizers for x in o.anchors]
        return [w - x for w, x in zip(pack(weights), pack(anchors), strict=True)]

    def _groups(self) -> list[tf.Tensor]:
        """What is to be sent as codes, in blocks."""
        if self._overlap:
            return self.layout.join(self._kept())
        large, small = self.layout.large, self.layout.small

        def blocks() -> list[tf.Tensor]:
            return [self.layout.group([x]) for x in self._wanted(large)]

        groups = self._compiled(blocks)() if large else []
        return [*groups, self.layout.group(self._wanted(small))] if small else groups

    def _wanted(self, which: Sequence[int] | None = None) -> list[tf.Tensor]:
        """Without `overlap`: this replica's deltas and what has been kept back of them; of some
        variables, by their numbers, or of all."""
        trained, residuals = self.trained, self._residuals
        numbers = range(len(trained)) if which is None else which
        with only({id(trained[i]) for i in numbers}):
            return self._plus_kept_back([residuals[i] for i in numbers])

    @property
    def _residuals(self) -> list[Any]:
        """What is kept back of each of `trained`; None of those of which nothing is."""
        kept_back = self._feedback or self._float16
        return list(kept_back.residuals) if kept_back else [None] * len(self.trained)

    def _plus_kept_back(
        self, residuals: list[Any], under_way: bool | None = None
    ) -> list[tf.Tensor]:
        """This replica's deltas, and what has been kept back of them."""
        deltas = [x for optimizer in self._optimizers for x in optimizer.deltas(under_way)]
        pairs = zip(deltas, residuals, strict=True)
        return [x if r is None else tf.cast(x, r.dtype) + r for x, r in pairs]

    def _keep(self, steps: tf.Tensor, under_way: bool) -> None:
        """With `overlap`: the deltas are in variables from now on; 0 if it took no step."""

        def keep(residuals: list[Any], some: tf.Tensor) -> None:
            deltas = [zero_unless(some, x) for x in self._plus_kept_back(residuals, under_way)]
            for optimizer, own in self._by_optimizer(deltas):
                optimizer.keep_deltas(own)

        residuals = [r if r is None else tf.convert_to_tensor(r) for r in self._residuals]
        self._in_parts(keep, residuals, steps > 0)

    def _kept(self) -> list[tf.Tensor]:
        """As `_wanted`, from variables if it is there."""
        if self._overlap:
            sent = [x for optimizer in self._optimizers for x in optimizer.sent]
            sent = list(map(tf.convert_to_tensor, sent))
            if not (self._float16 or self._feedback):
                return sent
            return [tf.cast(x, wide(x.dtype)) for x in sent]
        return self._wanted()

    def _coded(self, *codes: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """What this replica sends as deltas, and what float16 would keep back."""
        if self._feedback and codes:
            return self._feedback.values(codes[0]), []
        wanted = self._kept()
        return self._float16.split(wanted) if self._float16 else (wanted, [])

    def _first_not_finite(self, packs: list[tf.Tensor], groups: list[tf.Tensor]) -> tf.Tensor:
        """The number, from 1, of the first of `travelling` that is not, or that codes do not
        hold."""
        weights, count = self._packed_weights, len(self.trained)
        statistics = members(self._packed_statistics)
        return first_bad(
            [*(tf.reshape(fitting(g), [-1]) for g in groups), *map(tf.math.is_finite, packs)],
            [
                *(self.layout.members if groups else members(weights)),
                *(([i + count for i in numbers], ends) for numbers, ends in statistics),
            ],
        )

    @property
    def _packed_weights(self) -> list[tf.TensorSpec]:
        """Of the deltas as they are packed, shapes and dtypes."""
        half = tf.float16 if self._float16 else None
        return [tf.TensorSpec(v.shape, half or tf.as_dtype(v.dtype)) for v in self.trained]

    @property
    def _packed_statistics(self) -> list[tf.TensorSpec]:
        """Of the statistics."""
        return [tf.TensorSpec(v.shape, tf.as_dtype(v.dtype)) for v in self.statistics]

    def _settle_residuals(self, taking_part: tf.Tensor) -> None:
        """What has been sent is kept back no longer."""
        assert self._float16
        self._float16.keep_back(self._coded()[1], taking_part)

    def _settle_sent(self, taking_part: tf.Tensor, *codes: tf.Tensor) -> None:
        """With `overlap`: what has been sent is what is in flight."""
        for optimizer, values in self._by_optimizer(self._coded(*codes)[0]):
            for x, value in zip(optimizer.sent, values, strict=True):
                value = tf.cast(value, x.dtype)
                if not codes:  # which are zeros then
                    value = zero_unless(taking_part, value)
                x.assign(value)

    def _sent_again(self) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """With `overlap`: the message of codes, or the deltas, that are in flight."""
        sent = [x for optimizer in self._optimizers for x in optimizer.sent]
        if not self._feedback:
            return [], sent
        scales = tf.convert_to_tensor(self._feedback.scales)
        return [self._feedback.message(self.layout.join(sent), scales)], []

    def _header(
        self, told: tf.Tensor, taking_part: Any, steps: Any, first: Any, square: Any
    ) -> Any:
        numbers = dict(zip(TOLD, tf.unstack(told), strict=True))
        numbers |= {
            "active": taking_part,
            "steps": tf.where(taking_part, steps, 0),
            "nonfinite": first,
            "finite": first == 0,
            "square": square,
        }
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return self.header.write(replica, numbers)


def no_values(like: Any, some: tf.Tensor) -> tf.Tensor:
    """What a replica sends that is left out: zeros of a shape and dtype.

    Args:
        like: a tensor or its spec.
        some: whether it is not left out; where this is called it is False, so the zeros are made
            of it. Of a constant TensorFlow's graph optimizer would make a constant of the
            model's size, and keep it.
    """
    return tf.fill(like.shape, tf.cast(some, like.dtype))
