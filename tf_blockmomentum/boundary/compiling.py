"""What of a boundary XLA compiles."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_blockmomentum.algorithm import only

# Weights from which compiling pays: it takes half a second, and with codes two, and saves, of a
# million weights, a third of a block's milliseconds, and with codes more than half.
_LARGE, _LARGE_CODED = 500_000, 250_000
# And elements of one of their variables: each takes 10 to 20 ms to compile in each function.
_LARGE_ALONE = 1 << 16


class Compiling:
    """The part of a `Boundary` that decides what XLA compiles.

    Args:
        optimizers: the BlockMomentum optimizers, whose blocks end together.
        jit: whether XLA compiles what does not communicate, however small.
        codes: whether codes of few bits are sent.
    """

    def __init__(self, optimizers: list[Any], jit: bool, codes: bool) -> None:
        self._optimizers = optimizers
        self._jit = jit
        self._codes = codes

    @property
    def trained(self) -> list[Any]:
        """The variables with block momentum."""
        return [v for optimizer in self._optimizers for v in optimizer.trained_variables]

    def _by_optimizer(self, tensors: list[tf.Tensor]) -> list[tuple[Any, list[tf.Tensor]]]:
        """Each optimizer with its part of a list with one for each trained variable."""
        rest = iter(tensors)
        return [(o, [next(rest) for _ in o.trained_variables]) for o in self._optimizers]

    def _compiled(self, replica_fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the boundary that does not communicate, and is several operations for each
        variable. For large models XLA compiles it, whatever `jit_compile` is: each output takes
        one pass over what it depends on."""
        weights = sum(v.shape.num_elements() for v in self.trained)
        jit = self._jit or weights >= (_LARGE_CODED if self._codes else _LARGE)
        return tf.function(replica_fn, jit_compile=jit, autograph=False)

    def _unless_fused(self, replica_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The same for the outer step, if something is gained by it."""
        fused = all(optimizer.fused for optimizer in self._optimizers)
        return replica_fn if fused and not self._jit else self._compiled(replica_fn)

    def _in_parts(
        self, replica_fn: Callable[..., Any], values: list[Any] | None = None, *args: Any
    ) -> None:
        """Calls a function that does the same to each of `trained`: compiled for the large ones,
        while for the small ones, of which there may be hundreds, nothing is gained by it.

        Args:
            replica_fn: function of `values`, if given, and `args`.
            values: one for each of `trained`; it is given those of its own.
            args: for both.
        """
        sizes = {id(v): v.shape.num_elements() for v in self.trained}
        large = {key for key, count in sizes.items() if count >= _LARGE_ALONE}
        compiled = self._compiled(replica_fn)
        again = any(optimizer.inner_state == "reset" for optimizer in self._optimizers)
        if self._jit or again or not large:
            parts = [(set(sizes), compiled)]
        else:
            parts = [(large, compiled), (set(sizes) - large, replica_fn)]
        for part, function in parts:
            own = [x for key, x in zip(sizes, values or sizes, strict=True) if key in part]
            if not own:
                continue
            with only(part):
                function(*([] if values is None else [own]), *args)
