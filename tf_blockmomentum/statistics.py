"""Moving statistics estimated anew at the anchor.

BatchNormalization's moving mean and variance are those of where the replicas have been in the
last steps. The outer step moves the anchor on from there, and what is validated and saved is the
anchor. So at the end of an epoch the last batches pass through the step function once more, at
the anchor: it calls its layers as it does in training, and its optimizers' updates are left out.
What the layers would have made of their moving statistics is caught on the way, and all other
state that the step has assigned is put back.
"""

import contextlib
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_blockmomentum import progress
from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum._private.tensorflow import variables_made, variables_written
from tf_blockmomentum._private.trainer import training_of
from tf_blockmomentum.boundary.exchange import gather
from tf_blockmomentum.boundary.header import crc
from tf_blockmomentum.optimizer import check_strategy
from tf_blockmomentum.steps import LocalSteps, explaining_xla, next_batch, on_host, resolve_jit
from tf_blockmomentum.strategy import BlockStrategy, check_number, meeting, replicas_of

DEFAULT = 16  # batches; docs/your_script.md has what was measured


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

    jit = resolve_jit(jit_compile) and all(layer.supports_jit for layer in _keras.layers_of(model))
    refresh = Refresh(forward, strategy, jit, layers=_keras.layers_of(model))
    with any_batch(strategy):
        refresh(_distributed(dataset, strategy))
    return model


def check_refresh_statistics(batches: int) -> int:
    """Returns a number of batches, 0 for never."""
    expected = "a whole number of batches, 0 for never"
    check_number("refresh_statistics", batches, numbers.Integral, expected, 0)
    return int(batches)


def with_statistics(layers: Iterable[Any]) -> list[Any]:
    """Of some layers, those that keep moving statistics as BatchNormalization does."""

    def keeps(layer: Any) -> bool:
        variables = [getattr(layer, name, None) for name in ("moving_mean", "moving_variance")]
        return all(isinstance(v, keras.Variable) for v in variables) and isinstance(
            getattr(layer, "momentum", None), numbers.Real
        )

    return list({id(layer): layer for layer in layers if keeps(layer)}.values())


class LastBatches:
    """The last batches of an epoch that this worker has trained on.

    They are kept where they are, not copied: what is taken is their memory, until the epoch ends.
    A queue, because it is filled from within the compiled loop of local steps.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        with on_host():
            self._queue = tf.queue.FIFOQueue(count, [tf.variant, tf.int32], shapes=[(), ()])
        self._specs: list[Any] = []  # of Optionals; a fit may have other data than the last

    def add(self, batch: Any) -> None:
        """Keeps an Optional of a batch, in a graph or eagerly; the oldest leaves."""
        spec = tf.type_spec_from_value(batch)
        if spec not in self._specs:
            self._specs.append(spec)
        (variant,) = tf.nest.flatten(batch, expand_composites=True)

        def drop() -> tf.Tensor:
            self._queue.dequeue()
            return tf.constant(True)

        with on_host():
            full = self._queue.size() >= self._count
            with tf.control_dependencies([tf.cond(full, drop, lambda: tf.constant(False))]):
                self._queue.enqueue([variant, tf.constant(self._specs.index(spec))])

    def take(self) -> list[Any]:
        """The batches, the oldest first, which are not kept any longer."""
        batches = []
        while self._queue.size() > 0:
            variant, spec = self._queue.dequeue()
            optional = tf.nest.pack_sequence_as(
                self._specs[int(spec)], [variant], expand_composites=True
            )
            batches.append(optional.get_value())
        return batches

    def arrays(self) -> dict[str, np.ndarray]:
        """The batches for a backup: an array of bytes for each tensor."""
        batches = self.take()
        for batch in batches:
            self.add(tf.experimental.Optional.from_value(batch))
        return {
            f"kept/{i}/{j}": np.frombuffer(tf.io.serialize_tensor(tensor).numpy(), np.uint8)
            for i, batch in enumerate(batches)
            for j, tensor in enumerate(tf.nest.flatten(batch, expand_composites=True))
        }

    def restore(self, arrays: Mapping[str, np.ndarray], element_spec: Any) -> None:
        """The reverse of `arrays`, of batches of `element_spec`."""
        self.take()
        specs = tf.nest.flatten(element_spec, expand_composites=True)
        for i in range(self._count):
            if f"kept/{i}/0" not in arrays:
                return
            tensors = [
                tf.io.parse_tensor(arrays[f"kept/{i}/{j}"].tobytes(), spec.dtype)
                for j, spec in enumerate(specs)
            ]
            batch = tf.nest.pack_sequence_as(element_spec, tensors, expand_composites=True)
            self.add(tf.experimental.Optional.from_value(batch))


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
        step_fn: Callable,
        strategy: tf.distribute.Strategy,
        jit: bool,
        optimizers: Sequence[Any] = (),
        layers: Iterable[Any] | None = None,
        local_step: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self._step_fn, self._strategy, self._jit = step_fn, strategy, jit
        self._optimizers, self._local_step = list(optimizers), local_step
        self._layers: list[_Statistics] | None = None
        self._saved: dict[int, tuple[Any, tf.Tensor]] = {}  # what an eager step has assigned
        self._written: list[Any] | None = None  # TensorFlow's variables that a compiled one does
        if layers is not None:
            self._follow(layers)

    def _follow(self, layers: Iterable[Any]) -> None:
        with self._strategy.scope():
            self._layers = [_Statistics(layer) for layer in with_statistics(layers)]
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
        examples = tf.cast(_examples(data), tf.float64)
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


class _Statistics:
    """A layer with moving statistics, and the sums that its new ones are made of."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.mean, self.variance = layer.moving_mean, layer.moving_variance
        self.size = int(np.prod(self.mean.shape))
        # Examples; and over them, sums of means, of their squares, and of variances. In float64:
        # the mean's square is taken away from what may be little more.
        self.sums = tf.Variable(np.zeros(1 + 3 * self.size), trainable=False, name="statistics")

    @property
    def variables(self) -> list[Any]:
        stddev = getattr(self._layer, "moving_stddev", None)  # with renormalization
        return [self.mean, self.variance, *([] if stddev is None else [stddev])]

    @contextlib.contextmanager
    def of_a_batch(self) -> Iterator[None]:
        """Inside, what the layer assigns to its statistics is a batch's alone."""
        before, self._layer.momentum = self._layer.momentum, 0.0
        try:
            yield
        finally:
            self._layer.momentum = before

    def add(self, variable: Any, value: Any, examples: tf.Tensor) -> None:
        """Adds what the layer makes of a batch to the sums, in replica context."""
        value = tf.cast(tf.reshape(value, [-1]), tf.float64)
        zeros = tf.zeros_like(value)
        if variable is self.mean:
            parts = [tf.ones([1], tf.float64), value, value**2, zeros]
        else:
            parts = [tf.zeros([1], tf.float64), zeros, zeros, value]
        self.sums.assign_add(examples * tf.concat(parts, axis=0))

    def values(self, mean: np.ndarray, variance: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
        """Its variables with their new values."""
        new = [mean, variance, np.sqrt(variance + getattr(self._layer, "epsilon", 0))]
        yield from zip(self.variables, new, strict=False)


def any_batch(strategy: tf.distribute.Strategy) -> contextlib.AbstractContextManager:
    """As `BlockStrategy.any_batch`; nothing for other strategies."""
    known = isinstance(strategy, BlockStrategy)
    return strategy.any_batch() if known else contextlib.nullcontext()


def batches_of(data: Any, strategy: tf.distribute.Strategy) -> Iterator[Any]:
    """This worker's batches of a distributed dataset, of an iterator over one (those left), or of
    an iterable of batches, without communication."""
    if isinstance(data, tf.data.Dataset | tf.distribute.DistributedDataset):
        data = iter(data)
    if not isinstance(data, tf.data.Iterator | tf.distribute.DistributedIterator):
        yield from data
        return
    while (following := next_batch(data, strategy)).has_value():
        yield following.get_value()


def _distributed(dataset: Any, strategy: tf.distribute.Strategy) -> Iterator[Any]:
    if not isinstance(dataset, tf.data.Dataset | tf.distribute.DistributedDataset):
        raise TypeError(
            "refresh_statistics takes a tf.data dataset in batches, or a distributed one. "
            f"Received: {type(dataset).__name__}. For arrays: "
            "tf.data.Dataset.from_tensor_slices(x).batch(32)."
        )
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "The dataset has to have an end. Received: a dataset that repeats for ever. Use "
            "dataset.take(16)."
        )
    if isinstance(strategy, BlockStrategy) and isinstance(dataset, tf.data.Dataset):
        dataset = strategy.experimental_distribute_dataset(dataset)
    return batches_of(dataset, strategy)


def _one() -> tf.Tensor:
    return tf.constant(1)


def _examples(data: Any) -> Any:
    """How many examples a batch has; 1 if it has no such number."""
    for leaf in tf.nest.flatten(data):
        if isinstance(leaf, tf.Tensor) and leaf.shape.rank:
            return tf.shape(leaf)[0]
        if isinstance(leaf, tf.RaggedTensor):
            return leaf.nrows()
        if isinstance(leaf, tf.SparseTensor):
            return leaf.dense_shape[0]
    return 1
