"""A local step: the inner optimizer's update of one replica's variables."""

import concurrent.futures
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum.algorithm import Blocks


class NotBuilt(Exception):
    """A step applied an optimizer that is not built yet; to which variables."""

    def __init__(self, optimizer: Any, variables: Sequence[Any] | None) -> None:
        super().__init__(optimizer.name)
        self.optimizer, self.variables = optimizer, variables


class Local(Blocks):
    """The part of `BlockMomentum` that a step function applies."""

    # Made by BlockMomentum.
    build: Any
    updating: bool  # whether the inner optimizer is
    _stepping: bool
    _overwritten: set[int]

    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None
    ) -> None:
        """One local step: the inner optimizer's update of this replica's variables.

        The gradients are this replica's own, of a loss that is not divided by the number of
        replicas.

        Raises:
            RuntimeError: not called from `BlockTraining` or `BlockLoop`, which end
                the blocks.
        """
        with self._updates(grads, trainable_variables):
            self.inner_optimizer.apply(grads, trainable_variables)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> Any:
        """As `apply`, of pairs; an inner optimizer may have an `apply_gradients` of its own."""
        grads_and_vars = list(grads_and_vars)
        with self._updates(*zip(*grads_and_vars, strict=True)):
            return self.inner_optimizer.apply_gradients(grads_and_vars)

    @contextlib.contextmanager
    def _updates(
        self, grads: Sequence[Any] = (), variables: Sequence[Any] | None = None
    ) -> Iterator[None]:
        """Around the inner optimizer's update: notes through which variables it goes."""
        if not self._stepping:
            raise RuntimeError(
                "BlockMomentum.apply() was called outside a block, so replicas would train "
                "without ever being averaged. With model.fit, pass "
                "callbacks=[tfbm.BlockTraining()]; in a custom loop, run the step through "
                "tfbm.BlockLoop. model.train_on_batch needs neither."
            )
        if not self.built:
            self._build_for_step(variables)
        built_with = self.built_variables
        for g, v in zip(grads, built_with if variables is None else variables, strict=False):
            if g is not None and _keras.knows(self, v):
                v = built_with[_keras.index_of(self, v)]
                (self._overwritten if v.overwrite_with_gradient else self._updated).add(id(v))
        self.updating = True
        try:
            yield
        finally:
            self.updating = False

    def _build_for_step(self, variables: Sequence[Any] | None) -> None:
        """Builds for a step that is the first to say to which variables. A step that is traced is
        broken off and traced again; one that is taken cannot be, and waits for another thread,
        which is in no replica and may make variables."""
        if not tf.executing_eagerly() or variables is None:
            raise NotBuilt(self, variables)

        def build() -> None:
            with _keras.strategy_of(self).scope():
                self.build(list(variables))

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            stepping, self._stepping = self._stepping, False
            thread.submit(build).result()
            self._stepping = stepping

    @property
    def overwritten(self) -> list[Any]:
        """Variables whose "gradients" are their new values (float8's scales)."""
        return [v for v in self.built_variables if id(v) in self._overwritten]

    @contextlib.contextmanager
    def local_step(self) -> Iterator[None]:
        """Inside, `apply` is allowed: the caller ends the blocks."""
        before, self._stepping = self._stepping, True
        try:
            yield
        finally:
            self._stepping = before
