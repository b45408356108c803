"""What travels as codes: what is kept back of it for the next block, and sums of it."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_blockmomentum.boundary import codes
from tf_blockmomentum.boundary.exchange import exchange_parts, join_parts

_AT_ONCE = 8  # replicas whose codes are added up in one expression


class HalfFeedback:
    """Error feedback of float16: what rounding takes from a replica's deltas is in its residuals,
    and is wanted with the next block.

    Args:
        replicas: how many add up what they send.
    """

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._residuals: dict[int, tf.Variable] = {}
        self.residuals: list[tf.Variable] = []

    def ready(self, trained: Sequence[Any]) -> None:
        """Makes the variables, in the strategy's scope, that are not made yet."""
        for v in trained:
            if id(v) not in self._residuals:
                zeros = tf.zeros(v.shape, wide(v.dtype))
                residual = tf.Variable(zeros, trainable=False, name="residual")
                self._residuals[id(v)] = residual
        self.residuals = [self._residuals[id(v)] for v in trained]

    @property
    def of_this_block(self) -> list[Any]:
        """All its variables."""
        return list(self._residuals.values())

    def split(self, wanted: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """What travels, and what it lacks."""
        return codes.float16(wanted, self._replicas)

    def keep_back(self, rests: list[tf.Tensor], taking_part: tf.Tensor) -> None:
        """What has been sent is kept back no longer; what it lacks is."""
        for residual, rest in zip(self.residuals, rests, strict=True):
            residual.assign(tf.where(taking_part, rest, residual))


class Feedback:
    """Error feedback at the sender and at the owner of each part of a sum.

    What rounding takes from a replica's deltas is in its residuals, and is wanted with the next
    block. The codes go to the replicas that own them, 1/P each. An owner adds up what it gets and
    what it has kept back itself, codes the sum, keeps back what that rounding takes, and all
    gather the codes of all parts: what every replica decodes is the same.

    Args:
        compression: "int8" or "int4".
        strategy: of which the replicas are.
        compiled: makes a function of the boundary that does not communicate.
        overlap: whether what has been sent may have to be sent again.

    Source: error feedback at both ends is DeepSpeed's (Tang et al., "1-bit Adam", arXiv
    2102.02888); at the sender it is Seide et al.'s ("1-Bit Stochastic Gradient Descent",
    Interspeech 2014), and Karimireddy et al. (arXiv 1901.09847) say why it converges.
    """

    def __init__(
        self,
        compression: str,
        strategy: tf.distribute.Strategy,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
        overlap: bool,
    ) -> None:
        self._bits = codes.BITS[compression]
        self._strategy = strategy
        self._compiled = compiled
        self._overlap = overlap
        self._shapes: list[tuple[int, tuple[int, ...]]] | None = None
        self.layout: Any = None
        self.residuals: list[tf.Variable] = []
        self.scales: tf.Variable | None = None  # of the codes sent last
        self.part: Any = None  # what this replica keeps back of the sum's part that it owns

    def ready(self, trained: Sequence[Any]) -> None:
        """Makes the variables, in the strategy's scope; anew if others are trained now."""
        shapes = [(id(v), tuple(v.shape)) for v in trained]
        if shapes == self._shapes:
            return
        self._shapes = shapes
        self.layout = codes.Layout(trained, self._bits, self._strategy.num_replicas_in_sync)

        def zeros(shape: Any, dtype: Any, name: str) -> tf.Variable:
            return tf.Variable(tf.zeros(shape, dtype), trainable=False, name=name)

        self.residuals = [zeros(v.shape, wide(v.dtype), "residual") for v in trained]
        # Flat, so that a backup may hold another number of replicas' parts.
        self.part = zeros([self.layout.part * codes.BLOCK], tf.float32, "owned_residual")
        if self._overlap:
            self.scales = zeros([self.layout.blocks], tf.float32, "sent_scales")

    @property
    def of_this_block(self) -> list[Any]:
        """The variables whose shapes do not depend on the number of replicas."""
        return [*self.residuals, *([] if self.scales is None else [self.scales])]

    # -- the sender ---------------------------------------------------------------------------

    def scales_of(self, groups: list[tf.Tensor]) -> tf.Tensor:
        """The scales of all blocks; not finite where values are not, or do not fit."""
        # Of two functions: in one, XLA would search for a maximum again and again.
        largest = self._compiled(lambda x: [codes.magnitudes(g) for g in x])(groups)
        return self._compiled(self._scales)(largest)

    def _scales(self, largest: list[tf.Tensor]) -> tf.Tensor:
        return tf.concat([codes.scales_of(x, self._bits) for x in largest], axis=0)

    def message(self, groups: list[tf.Tensor], scales: tf.Tensor) -> tf.Tensor:
        """What travels in place of the groups."""

        def encode(groups: list[tf.Tensor], scales: tf.Tensor) -> list[tf.Tensor]:
            inverses = self.layout.of_groups(codes.reciprocals(scales))
            pairs = zip(groups, inverses, strict=True)
            return [codes.encode(x, inverse, self._bits) for x, inverse in pairs]

        return self._compiled(self.layout.write)(self._compiled(encode)(groups, scales), scales)

    @property
    def message_spec(self) -> tf.TensorSpec:
        """The shape and dtype of a message."""
        return tf.TensorSpec([self.layout.replicas * self.layout.message], tf.int32)

    def keep_back(self, groups: list[tf.Tensor], scales: tf.Tensor) -> None:
        """What has been sent is kept back no longer; what it lacks is."""
        large, small = self.layout.large, self.layout.small

        def keep(numbers: list[int], blocks: tf.Tensor) -> None:
            for i, rest in zip(numbers, self.layout.cut(numbers, blocks), strict=True):
                self.residuals[i].assign(tf.cast(rest, self.residuals[i].dtype))

        def settle(groups: list[tf.Tensor], scales: tf.Tensor) -> list[tf.Tensor]:
            own = self.layout.of_groups(scales)
            inverses = self.layout.of_groups(codes.reciprocals(scales))
            triples = zip(groups, own, inverses, strict=True)
            rests = [codes.rest(*triple) for triple in triples]
            for i, rest in zip(large, rests, strict=False):  # in place
                keep([i], rest)
            return rests[len(large) :]

        for rest in self._compiled(settle)(groups, scales):  # of the small ones, which share it
            keep(small, rest)

    def values(self, message: tf.Tensor) -> list[tf.Tensor]:
        """The tensors that a message holds, float32."""
        return self.layout.split(self._compiled(self.layout.decode)(message))

    # -- the owner ----------------------------------------------------------------------------

    def sum(self, message: tf.Tensor) -> list[tf.Tensor]:
        """Sums messages over the replicas, in replica context. Returns the message of the sums,
        the same on every replica, and what this one keeps back of its part: to be put into
        `part` when the sum has landed, since until then it may have to be sent again."""
        received = exchange_parts(message, self.layout.replicas)
        # Of several functions, as in `message`: XLA reads what it cuts, and fills what it
        # concatenates, number by number.
        read = self._compiled(self.layout.read)(received)
        # By XLA in any case: TensorFlow's graph optimizer would add up in an order of its own.
        add = tf.function(self._add, jit_compile=True, autograph=False)
        total = add(*read, tf.convert_to_tensor(self.part))
        largest = self._compiled(codes.magnitudes)(total)
        scales = self._compiled(lambda x: codes.scales_of(x, self._bits))(largest)

        def encode(total: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
            return codes.encode(total, codes.reciprocals(scales), self._bits)

        def rest(total: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
            kept = codes.rest(total, scales, codes.reciprocals(scales))
            finite = tf.math.is_finite(scales)[:, tf.newaxis]  # else it would stay so
            return tf.reshape(tf.where(finite, kept, 0.0), [-1])

        words = self._compiled(encode)(total, scales)
        own = self._compiled(self.layout.write_part)(words, scales)
        return [join_parts(own, self.layout.replicas), self._compiled(rest)(total, scales)]

    def _add(self, words: tf.Tensor, scales: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
        count = self.layout.replicas
        total = codes.apart(tf.reshape(kept, [-1, codes.BLOCK]), self._bits)

        def add(i: Any, total: list[tf.Tensor]) -> list[tf.Tensor]:
            row = codes.decode_apart(words[i], scales[i], self._bits)
            return [x + y for x, y in zip(total, row, strict=True)]

        if count <= _AT_ONCE:
            for i in range(count):
                total = add(i, total)
            return codes.together(total)
        _, total = tf.while_loop(
            lambda i, _: i < count,
            lambda i, total: (i + 1, add(i, total)),
            (tf.constant(0), total),
            maximum_iterations=count,
        )
        return codes.together(total)


def wide(dtype: Any) -> tf.DType:
    """The dtype in which what is kept back of a variable adds up."""
    return tf.float64 if tf.as_dtype(dtype) == tf.float64 else tf.float32
