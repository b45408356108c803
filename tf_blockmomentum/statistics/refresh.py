"""The estimate: batches pass through the step function, and what layers make of them is summed."""

import contextlib
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum._private import models as _models
from tf_blockmomentum._private.tensorflow import variables_made, variables_written
from tf_blockmomentum._private.trainer import training_of
from tf_blockmomentum.boundary.exchange import gather
from tf_blockmomentum.boundary.header import crc
from tf_blockmomentum.checks import check_number
from tf_blockmomentum.inputs import examples_of
from tf_blockmomentum.statistics.batches import distributed
from tf_blockmomentum.statistics.layers import Statistics, with_statistics
from tf_blockmomentum.steps import LocalSteps, explaining_xla, resolve_jit
from tf_blockmomentum.strategy import any_batch, check_strategy, meeting, replicas_of

DEFAULT = 16  # batches; docs/measured.md has why


def refresh_statistics(
    model: keras.Model, dataset: Any, jit_compile: bool | str = "auto"
) -> keras.Model:
    r"""Estimates a model's moving statistics anew, at the weights that it has.

    Each batch passes through `model(x, training=True)`. For every BatchNormalization that this
    updates (layers with `trainable=False` are left alone), with the batches' means $m_i$,
    variances $v_i$ and numbers of examples $n_i$, over all batches and replicas,

    $$\mu = \frac{\sum_i n_i m_i}{\sum_i n_i}, \qquad
      \sigma^2 = \frac{\sum_i n_i (v_i + m_i^2)}{\sum_i n_i} - \mu^2,$$

    which is the variance of all examples together (the law of total variance). The same for
    layers of your own that have `moving_mean`, `moving_variance` and `momentum` and update them
    as Keras does. Nothing else changes: dropout's seeds are put back, no gradient is taken.

    For a model whose weights were averaged or set by other means than fit in blocks, which does
    this by itself (`BlockTraining(refresh_statistics=...)`). Under a block strategy all workers
    call it alike.

    Args:
        model: a built Keras model, with `call`.
        dataset: a tf.data dataset of what `fit` takes (inputs, or a tuple that begins with
            them), in batches, which a block strategy shards; or one that it has distributed
            already. Some ten batches are enough.
        jit_compile: as in `BlockTraining`.

    Returns:
        The model.

    Raises:
        ValueError: the dataset has no end, or the model is not built or has another strategy
            than a block strategy.
        TypeError: `dataset` is not a dataset.

    Cost: a forward pass a batch; memory: three numbers a channel and replica.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization"
    (arXiv 1803.05407), section 3.2.

    Example:

    >>> norm = keras.layers.BatchNormalization()
    >>> model = keras.Sequential([keras.Input([1]), norm])
    >>> data = tf.data.Dataset.from_tensor_slices([[1.0], [3.0], [5.0], [7.0]]).batch(2)
    >>> model = tfbm.refresh_statistics(model, data)
    >>> norm.moving_mean.numpy().tolist(), norm.moving_variance.numpy().tolist()
    ([4.0], [5.0])
    """
    strategy = model.distribute_strategy or tf.distribute.get_strategy()
    check_strategy(strategy)
    training = training_of(model)
    if training is not None:
        training.flush()
    if not model.built:
        raise ValueError(
            f"The model has to be built. Received: {model.name!r}, without weights. Call it once "
            "on a batch, or model.build(input_shape)."
        )

    def forward(data: Any) -> None:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        model(x, training=True)

    jit = resolve_jit(jit_compile) and all(
        layer.supports_jit for layer in _models.layers_of(model)
    )
    refresh = Refresh(forward, strategy, jit, layers=_models.layers_of(model))
    with any_batch(strategy):
        refresh(distributed(dataset, strategy))
    return model


def check_refresh_statistics(batches: int) -> int:
    """Returns a number of batches, 0 for never."""
    expected = "a whole number of batches, 0 for never"
    check_number("refresh_statistics", batches, numbers.Integral, expected, 0)
    return int(batches)


class Refresh:
    """Estimates the moving statistics anew that a step function updates.

    Args:
        step_fn: function of one replica's batch, which calls its layers as in training.
        strategy: where it runs.
        jit: whether XLA compiles it.
        optimizers: whose updates are left out.
        layers: in which to look for such with moving statistics, the same on all workers; None:
            in those that the step calls.
        local_step: the context in which the step is run.
    """

    def __init__(
        self,
        step_fn: Callable[..., Any],
        strategy: tf.distribute.Strategy,
        jit: bool,
        optimizers: Sequence[Any] = (),
        layers: Iterable[Any] | None = None,
        local_step: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._step_fn, self._strategy, self._jit = step_fn, strategy, jit
        self._optimizers, self._local_step = list(optimizers), local_step
        self._layers: list[Statistics] | None = None
        self._saved: dict[int, tuple[Any, tf.Tensor]] = {}  # what an eager step has assigned
        self._written: list[Any] | None = None  # TensorFlow's variables that a compiled one does
        if layers is not None:
            self._follow(layers)

    def _follow(self, layers: Iterable[Any]) -> None:
        with self._strategy.scope():
            self._layers = [Statistics(layer) for layer in with_statistics(layers)]
        self._steps = LocalSteps(self._step, self._strategy, self._jit)

    def __call__(self, batches: Iterable[Any], element_spec: Any = None) -> None:
        """Estimates them from batches of this worker, called by all workers alike.

        Args:
            batches: any number of them, also none.
            element_spec: of a batch, if the layers are not known and there may be no batch.
        """
        progress.note("estimates statistics anew")
        with self._putting_back():
            for batch in batches:
                self._take(batch)
            if self._layers is None and element_spec is not None:
                self._find_layers(element_spec)
        self._check_alike()
        if self._layers:
            self._assign(self._sum_over_workers())
        progress.note("has estimated statistics anew")

    # -- on this worker ---------------------------------------------------------------------------

    def _take(self, batch: Any) -> None:
        if self._layers is None:
            self._find_layers(batch)
        if not self._layers:
            return
        if self._written is None and not tf.config.functions_run_eagerly():
            self._written = variables_written(self._steps.traced(batch))
            self._save(self._written)
        with explaining_xla(self._jit):
            self._steps.one_step(batch)

    def _find_layers(self, batch: Any) -> None:
        """From a trace of the step, or a step that is taken: of layers that are not in a model
        one knows only that they are called."""
        called: list[Any] = []

        def note(variable: Any, value: Any) -> None:
            called.extend(_keras.layers_being_called())

        def step(data: Any) -> None:
            with self._in_step(note):
                self._step_fn(data)

        steps = LocalSteps(step, self._strategy, False)
        if tf.config.functions_run_eagerly():
            steps.one_step(batch)
        else:
            steps.traced(batch)
        self._follow(called)

    def _step(self, data: Any) -> None:
        """The step on one replica's batch, of which the layers' statistics are noted."""
        layers = self._layers or []
        examples = tf.cast(examples_of(data), tf.float64)
        places = {id(v): layer for layer in layers for v in (layer.mean, layer.variance)}
        before = [(v, tf.identity(v)) for layer in layers for v in layer.variables]

        def note(variable: Any, value: Any) -> None:
            layer = places.get(id(variable))
            if layer is not None:
                layer.add(variable, value, examples)

        with self._in_step(note), contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.of_a_batch())
            self._step_fn(data)
            places.clear()
            # Renormalization reads them, which is to find the same with every batch.
            for variable, value in before:
                variable.assign(value)

    @contextlib.contextmanager
    def _in_step(self, note: Callable[[Any, Any], None]) -> Iterator[None]:
        """Around the step, traced or run: no updates, and `note` hears of assignments."""

        def heard(variable: Any, value: Any) -> None:
            if tf.executing_eagerly():
                self._save([_keras.replica_part(variable)])
            note(variable, value)

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._local_step())
            for optimizer in self._optimizers:
                stack.enter_context(_keras.without_updates(optimizer))
            stack.enter_context(_keras.assignments_told_to(heard))
            yield

    def _save(self, variables: Iterable[Any]) -> None:
        for v in variables:
            if id(v) not in self._saved:
                self._saved[id(v)] = v, tf.identity(v)

    @contextlib.contextmanager
    def _putting_back(self) -> Iterator[None]:
        """Around steps: what they assign, the layers' statistics included, is put back."""
        if tf.config.functions_run_eagerly():  # plain variables, which tell nobody
            made = variables_made(self._strategy)
            known = {id(v.value) for o in self._optimizers for v in o.variables}
            plain = [v for v in made if id(v) not in known]
            self._save(part for v in plain for part in replicas_of(v, self._strategy))
        elif self._written is not None:
            self._save(self._written)
        try:
            yield
        finally:
            sums = {
                id(part)
                for layer in self._layers or []
                for part in replicas_of(layer.sums, self._strategy)
            }
            for variable, value in self._saved.values():
                if id(variable) not in sums:
                    variable.assign(value)
            self._saved = {}

    # -- with the others --------------------------------------------------------------------------

    def _check_alike(self) -> None:
        """Where steps run eagerly, a worker without a batch may not know of the layers."""
        if not tf.config.functions_run_eagerly() or self._strategy.num_replicas_in_sync == 1:
            return
        told = crc([np.array(layer.mean.shape) for layer in self._layers or []])
        with meeting(self._strategy, "an estimate of statistics"):
            found = gather(self._strategy, [[told]] * self._local_replicas)
        if len(set(found[:, 0].tolist())) > 1:
            raise RuntimeError(
                "With functions run eagerly, only a batch tells which layers a step calls, and "
                "the workers have found unlike ones. Received: batches of which some worker has "
                "none. Give every worker a batch, or let functions be compiled."
            )

    @property
    def _local_replicas(self) -> int:
        return len(self._strategy.experimental_local_results(self._strategy.run(_one)))

    def _sum_over_workers(self) -> np.ndarray:
        layers, strategy = self._layers or [], self._strategy
        parts = [[part.numpy() for part in replicas_of(s.sums, strategy)] for s in layers]
        for layer in layers:
            for part in replicas_of(layer.sums, strategy):
                part.assign(tf.zeros_like(part))
        rows = [np.concatenate(row) for row in zip(*parts, strict=True)]
        if strategy.num_replicas_in_sync == 1:
            return rows[0]
        own = iter(rows)
        values = strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(next(own), tf.float64)
        )
        with meeting(strategy, "an estimate of statistics"):
            return strategy.reduce("SUM", values, axis=None).numpy()

    def _assign(self, sums: np.ndarray) -> None:
        """The same values on all replicas; a layer that nobody's step has updated, or whose
        inputs were not finite, keeps what it has."""
        for layer in self._layers or []:
            size = 1 + 3 * layer.size
            (count, *_), numbers_ = sums[:1], sums[1:size]
            sums = sums[size:]
            if count > 0 and np.all(np.isfinite(numbers_)):
                mean, square, variance = np.split(numbers_ / count, 3)
                variance = np.maximum(variance + square - mean**2, 0)
                for variable, value in layer.values(mean, variance):
                    for part in replicas_of(variable, self._strategy):
                        part.assign(tf.cast(tf.reshape(value, part.shape), part.dtype))


def _one() -> tf.Tensor:
    return tf.constant(1)
