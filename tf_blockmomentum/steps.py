"""The compiled local steps."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tf_blockmomentum._private import models as _models
from tf_blockmomentum.feed import Feed, Next, batch_of, if_any, next_batch, on_host, shapes_of
from tf_blockmomentum.inputs import examples_of, none_for_marks
from tf_blockmomentum.local import NotBuilt
from tf_blockmomentum.optimizer import find
from tf_blockmomentum.strategy import BlockStrategy, replicas_of


class LocalSteps:
    """Local steps of a step function: no communication, no retracing.

    Args:
        step_fn: function of one replica's batch.
        strategy: where it runs.
        jit_compile: whether XLA compiles it.
        after_step: called in the replica after each step, outside XLA.
        optimizers: what the step may apply.
    """

    def __init__(
        self,
        step_fn: Callable[..., Any],
        strategy: tf.distribute.Strategy,
        jit_compile: bool,
        after_step: Callable[[], Any] | None = None,
        optimizers: Sequence[Any] = (),
    ) -> None:
        self._optimizers = optimizers
        self._strategy = strategy
        self._step_fn = functools.partial(_as_one_replica, strategy, step_fn)
        self._jit = jit_compile
        self._after_step = after_step
        self.feed = Feed(strategy)
        self.specs: Any = None  # of what a step returns, once one has been traced
        self._loops = False  # whether an execution has been of several steps
        self._make()

    def _make(self) -> None:
        """What is compiled; anew after a trace that was broken off, which leaves it unusable."""
        self._step = tf.function(self._step_fn, jit_compile=self._jit, autograph=False)
        make = functools.partial(tf.function, reduce_retracing=True, autograph=False)
        self._one_step = make(self._take_one_step)
        self._from_iterator = make(self._loop_from_iterator)
        self._from_first = make(self._loop)
        self._once_from_iterator = make(self._take_once_from_iterator)
        self._once_from_first = make(self._take_once)

    def __call__(
        self, iterator: Any, count: int, first: Any = None, peek: bool = False
    ) -> tuple[int, Any, Any]:
        """Takes up to `count` batches, first of all the `Next` of an execution before, if given.

        Returns:
            The number of batches this worker had, an int; the last outputs of `step_fn`, averaged
            over this worker's replicas; and with `peek` the next batch, a `Next`.
        """
        if not isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            # train_on_batch: the batch is this worker's, and each of its replicas takes it.
            outputs, _ = self.one_step(next(iterator))
            return 1, outputs, None
        if tf.config.functions_run_eagerly():
            return self._eagerly(iterator, count, first, peek)
        # A loop costs time at each step. Where there was one there will be more, and of a block
        # whose last execution is one step, that step needs no functions of its own.
        self._loops = self._loops or count > 1
        self.feed.begin(iterator, first, peek)
        if self._loops:
            with on_host():
                counted = tf.constant(count)
            if first is None:
                taken, *rest = self._from_iterator(iterator, counted, peek)
            else:
                taken, *rest = self._from_first(iterator, counted, first, peek)
        elif first is None:
            taken, *rest = self._once_from_iterator(iterator, peek)
        else:
            taken, *rest = self._once_from_first(iterator, first, peek)
        return int(taken), *rest

    @property
    def traces(self) -> int:
        """How often its functions have been traced."""
        functions = (
            self._one_step,
            self._from_iterator,
            self._from_first,
            self._once_from_iterator,
            self._once_from_first,
        )
        return sum(function.experimental_get_tracing_count() for function in functions)

    def trace(self, iterator: Any, peek: bool = False) -> None:
        """Traces a step without taking it, so that all that can be known of it is known."""
        self._building(lambda: self._once_from_iterator.get_concrete_function(iterator, peek))

    def trace_spec(self, element_spec: Any) -> None:
        """As `trace`, where there is no iterator yet."""
        self.specs = self.traced(element_spec).structured_outputs[0]

    def traced(self, data: Any) -> Any:
        """The function that takes a step on a batch, or on batches of a spec."""
        return self._building(lambda: self._one_step.get_concrete_function(data))

    def one_step(self, data: Any) -> tuple[Any, tf.Tensor]:
        """One step on a batch of this worker: outputs, and whether it was not empty."""
        return self._building(lambda: self._one_step(data))

    def _building(self, trace: Callable[[], Any]) -> Any:
        """Calls a function that takes or traces a step, again for every optimizer that the step
        turns out to apply and nobody has built: only the step knows to which variables."""
        while True:
            try:
                return trace()
            except NotBuilt as error:
                wrapper = next(o for o in self._optimizers if find(o) is error.optimizer)
                variables = error.variables
            except RuntimeError as error:
                if "merge_call" not in str(error):
                    raise
                raise ValueError(
                    "A local step cannot communicate between replicas, and this train_step does: "
                    "it applies an optimizer that is not wrapped in tfbm.BlockMomentum, or calls "
                    "merge_call or all_reduce. Wrap all optimizers that it applies (several end "
                    "their blocks together), and leave averaging to the boundary."
                ) from error
            if variables is None:
                raise ValueError(
                    "The optimizer must be built before the first step, or be told its "
                    "variables. Received: optimizer.apply(gradients) of "
                    f"{wrapper.name!r}. Call optimizer.build(model.trainable_variables), inside "
                    "strategy.scope(), or optimizer.apply(gradients, variables)."
                )
            if not all(part.is_initialized() for v in variables
                       for part in replicas_of(v, self._strategy)):  # fmt: skip
                raise ValueError(
                    "The step makes variables: layers that it is the first to call. Received: "
                    f"{', '.join(sorted(v.path for v in variables)[:3])} without a value. Build "
                    "the model before the first step: call it once on a batch, or model.build()."
                )
            with self._strategy.scope():
                wrapper.build(list(variables))
            self._make()

    def _replica_step(self, data: Any) -> tuple[Any, tf.Tensor]:
        # A plain function around the compiled one: strategy.run would lift a bare
        # tf.function out over all devices, and XLA refuses other devices' variables
        # (tensorflow issue 53140).
        data = _models.none_for_optional(none_for_marks(data))

        def take() -> Any:
            outputs = self._step(data)
            if self._after_step is not None:
                self._after_step()
            return outputs

        def skip() -> Any:  # the other replicas share out a last, smaller batch
            specs = self._step.get_concrete_function(data).structured_outputs
            return tf.nest.map_structure(_zeros, specs)

        examples = examples_of(data)
        if isinstance(examples, int):
            outputs = take()
            with on_host():
                return outputs, tf.constant(True)
        if tf.executing_eagerly():
            return (take() if examples > 0 else skip()), examples > 0
        return if_any(tf.minimum(examples, 1), take, skip), examples > 0

    def _take_one_step(self, data: Any) -> tuple[Any, tf.Tensor]:
        strategy = self._strategy
        outputs, taken = strategy.run(self._replica_step, args=(data,))
        taken = strategy.experimental_local_results(taken)

        def combine(output: Any) -> Any:
            parts = strategy.experimental_local_results(output)
            if output is None or len(parts) == 1:
                return parts[0]
            parts = [tf.convert_to_tensor(part) for part in parts]  # eagerly they may be floats
            if not parts[0].dtype.is_floating:
                return parts[0]
            kept = [tf.where(t, p, tf.zeros_like(p)) for t, p in zip(taken, parts, strict=True)]
            count = tf.add_n([tf.cast(t, tf.int32) for t in taken])
            return tf.add_n(kept) / tf.cast(tf.maximum(count, 1), parts[0].dtype)

        outputs = tf.nest.map_structure(combine, outputs)
        with on_host():
            return outputs, taken[0] if len(taken) == 1 else tf.reduce_any(taken)

    def _learn_specs(self, spec: Any) -> list[Any]:
        """A first look at one step, on a batch of this spec, tells what it returns, which branches
        and loops have to know; the specs of that in a row."""
        self.specs, _ = self._one_step.get_concrete_function(spec).structured_outputs
        return [spec for spec in tf.nest.flatten(self.specs) if spec is not None]

    def _step_on(self, batch: Any) -> tuple[list[Any], tf.Tensor]:
        """One step: what it returns, in a row, and whether that counts."""
        outputs, taken = self._one_step(batch)
        return [tensor for tensor in tf.nest.flatten(outputs) if tensor is not None], taken

    def _in_order(self, outputs: Any) -> Any:
        """What was in a row, as a step returns it."""
        found = iter(outputs)
        return tf.nest.map_structure(lambda s: None if s is None else next(found), self.specs)

    def _take_once(self, iterator: Any, first: Next, peek: bool) -> tuple[tf.Tensor, Any, Any]:
        spec = self.feed.spec(iterator, first)
        zeros = [_zeros(spec) for spec in self._learn_specs(spec)]
        some = self.feed.note(first)
        following = self.feed.ask(iterator) if peek else None  # before the step is launched

        def step() -> Any:
            outputs, taken = self._step_on(self.feed.batch(first, spec))
            return tf.cond(taken, lambda: outputs, lambda: zeros) if outputs else []

        # What failed for want of data would be late: a step may count before it uses its batch.
        outputs = if_any(some, step, lambda: zeros)
        with on_host():
            return tf.identity(some), self._in_order(outputs), following

    def _take_once_from_iterator(self, iterator: Any, peek: bool) -> tuple[tf.Tensor, Any, Any]:
        return self._take_once(iterator, self.feed.ask(iterator), peek)

    def _loop(
        self, iterator: Any, count: tf.Tensor, first: Next, peek: bool
    ) -> tuple[tf.Tensor, Any, Any]:
        feed, spec = self.feed, self.feed.spec(iterator, first)
        specs = self._learn_specs(spec)
        ahead = peek and feed.copies(iterator)  # the last step asks for the next execution's batch

        def more(i: Any, coming: Any, _: Any) -> tf.Tensor:
            with on_host():
                return tf.logical_and(i < count, coming[0] > 0)

        def body(i: Any, coming: Any, outputs: Any) -> Any:
            if ahead:
                feed.note(coming)
                following = list(feed.ask(iterator))
            else:
                following = feed.take(iterator, spec, i + 1 < count)
            new, taken = self._step_on(batch_of(spec, coming[1:]))
            outputs = tf.cond(taken, lambda: new, lambda: outputs) if new else outputs
            return i + 1, following, outputs

        taken, following, outputs = tf.while_loop(
            more,
            body,
            (
                tf.constant(0),
                list(first) if ahead else feed.open(iterator, first),
                [_zeros(spec) for spec in specs],
            ),
            shape_invariants=(
                tf.TensorShape([]),
                shapes_of(spec),
                [spec.shape for spec in specs],
            ),
        )
        if not ahead:
            following = feed.ask(iterator) if peek else None
        with on_host():
            return tf.identity(taken), self._in_order(outputs), following

    def _loop_from_iterator(
        self, iterator: Any, count: tf.Tensor, peek: bool
    ) -> tuple[tf.Tensor, Any, Any]:
        return self._loop(iterator, count, self.feed.ask(iterator), peek)

    def _eagerly(self, iterator: Any, count: int, first: Any, peek: bool) -> tuple[int, Any, Any]:
        """`_loop` in Python: with `run_eagerly` a step sees values."""
        following = next_batch(iterator, self._strategy) if first is None else first[0]
        taken, outputs = 0, None
        while taken < count and following.has_value():
            if self.feed.kept is not None:
                self.feed.kept.add(following)
            new, some = self.one_step(following.get_value())
            outputs = new if some or outputs is None else outputs
            taken += 1
            if peek or taken < count:
                following = next_batch(iterator, self._strategy)
        return taken, outputs, (following,) if peek else None


def _as_one_replica(
    strategy: tf.distribute.Strategy, step_fn: Callable[..., Any], data: Any
) -> Any:
    if not isinstance(strategy, BlockStrategy):
        return step_fn(data)
    with strategy.one_replica():
        return step_fn(data)


def resolve_jit(jit_compile: bool | str) -> bool:
    """Turns "auto" into whether a GPU is present."""
    if jit_compile == "auto":
        return bool(tf.config.list_physical_devices("GPU"))
    if jit_compile is True or jit_compile is False:
        return jit_compile
    raise ValueError(
        f'`jit_compile` must be True, False or "auto". Received: jit_compile={jit_compile!r}.'
    )


@contextlib.contextmanager
def explaining_xla(jit_compile: bool) -> Iterator[None]:
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


def _zeros(spec: Any) -> Any:
    return None if spec is None else tf.zeros([d or 0 for d in spec.shape], spec.dtype)


@contextlib.contextmanager
def eagerly(run_eagerly: bool) -> Iterator[None]:
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(before or run_eagerly)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
