"""The models of the fuzz's programs: layers, functional, sequential and subclassed models, and
models with a train_step of their own."""

import keras
import tensorflow as tf

CLASSES, FEATURES, LENGTH, WORDS, SIDE = 3, 6, 5, 11, 6
L, R = keras.layers, keras.regularizers


class Residual(L.Layer):
    """A layer of layers."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.inner, self.norm = L.Dense(units, "tanh"), L.LayerNormalization()

    def build(self, shape):
        self.inner.build(shape)
        self.norm.build((*shape[:-1], self.units))

    def call(self, x):
        return self.norm(self.inner(x)) + x

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class AddLoss(L.Layer):
    def call(self, x):
        self.add_loss(0.01 * keras.ops.mean(keras.ops.square(x)))
        return x


class RunningState(L.Layer):
    """Adds a small multiple of a recurrent state that the step assigns."""

    def build(self, shape):
        self.state = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, x, training=False):
        if training:
            self.state.assign(0.9 * self.state + 0.1 * keras.ops.mean(x, axis=0))
        return x + 0.1 * keras.ops.cast(self.state, x.dtype)


def layers_for(kind, name, regularizer):
    """Of a name drawn: a list of Keras layers.

    What stands before a BatchNormalization has no bias: its gradient would be rounding errors
    alone, which Adam and its like turn into steps.
    """
    width = {"features": 8, "image": 4, "tokens": 6}[kind]
    regular = {"kernel_regularizer": R.L2(0.01)} if regularizer else {}

    def unbiased():
        if kind == "image":
            return L.Conv2D(width, 3, padding="same", use_bias=False)
        return L.Dense(width, use_bias=False)

    make = {
        "dense": lambda: [L.Dense(width, activation="tanh", **regular)],
        "batch norm": lambda: [unbiased(), L.BatchNormalization(momentum=0.8)],
        "layer norm": lambda: [L.LayerNormalization()],
        "group norm": lambda: [L.GroupNormalization(groups=2)],
        "unit norm": lambda: [L.Dense(width), L.UnitNormalization()],
        "spectral": lambda: [L.SpectralNormalization(L.Dense(width, activation="tanh"))],
        "residual": lambda: [L.Dense(width, **regular), Residual(width)],
        "activity": lambda: [L.Dense(width, activity_regularizer=R.L2(0.01))],
        "dense constraint": lambda: [
            L.Dense(width, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.8))
        ],
        "frozen": lambda: [L.Dense(width, activation="tanh", trainable=False)],
        "add_loss": lambda: [AddLoss()],
        "gru state": lambda: [RunningState()],
        "dropout": lambda: [L.Dropout(0.3)],
        "no dropout": lambda: [L.Dropout(0.0)],
        "alpha dropout": lambda: [L.AlphaDropout(0.2)],
        "spatial dropout": lambda: [L.SpatialDropout2D(0.3)],
        "noise": lambda: [L.GaussianNoise(0.1)],
        "flip": lambda: [L.RandomFlip()],
        "conv": lambda: [L.Conv2D(width, 3, padding="same", activation="tanh", **regular)],
        "depthwise": lambda: [L.DepthwiseConv2D(3, padding="same", activation="tanh")],
        "separable": lambda: [L.SeparableConv2D(width, 3, padding="same", activation="tanh")],
        "pool": lambda: [L.AveragePooling2D(2, padding="same")],
        "gru": lambda: [L.GRU(width, return_sequences=True)],
        "lstm": lambda: [L.LSTM(width, return_sequences=True)],
        "bidirectional": lambda: [
            L.Bidirectional(L.GRU(width // 2, return_sequences=True)),
        ],
        "conv1d": lambda: [L.Conv1D(width, 3, padding="same", activation="tanh", **regular)],
        "attention": lambda: [Attention(width)],
        "recurrent dropout": lambda: [L.LSTM(width, dropout=0.2, return_sequences=True)],
    }
    return make[name]()


class Attention(L.Layer):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.attention = L.MultiHeadAttention(2, width // 2)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return x + self.attention(x, x)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


CUSTOM = {c.__name__: c for c in (Residual, AddLoss, RunningState, Attention)}


def trunk(what, kind, data):
    """From the input of one kind to a vector for each example."""
    regularizer = what["regularizer"]
    layers = []
    if kind == "features" and what["normalization"]:
        normalization = L.Normalization()
        normalization.adapt(data["features"])
        layers.append(normalization)
    if kind == "features":
        layers.append(L.Dense(8, use_bias=False))
    elif kind == "image":
        layers.append(L.Conv2D(4, 3, padding="same", use_bias=False))
    else:
        layers.append(L.Embedding(WORDS, 6, mask_zero=what["seed"] % 3 == 0))
    for name in what["layers"][kind]:
        layers += layers_for(kind, name, regularizer)
    if kind == "image":
        layers.append(L.Flatten() if what["seed"] % 2 else L.GlobalAveragePooling2D())
    elif kind == "tokens":
        layers.append(L.GlobalAveragePooling1D() if what["seed"] % 2 else L.GRU(5))
    return layers


SHAPES = {"features": [FEATURES], "image": [SIDE, SIDE, 2], "tokens": [LENGTH]}


def build(what, data):
    heads = [L.Dense(CLASSES, activation="softmax", dtype=_head_dtype(), name="a")]
    if what["outputs"] == 2:
        heads.append(L.Dense(1, dtype=_head_dtype(), name="b"))
    kinds = list(what["layers"])
    stacks = [trunk(what, kind, data) for kind in kinds]
    if what["build"] in ("sequential", "unbuilt"):
        before = [keras.Input(SHAPES[kinds[0]])] if what["build"] == "sequential" else []
        return keras.Sequential([*before, *stacks[0], *heads])
    if what["build"] == "subclass":
        return Subclass([*stacks[0], *heads])
    inputs = {kind: keras.Input(SHAPES[kind], name=kind) for kind in kinds}
    ends = []
    for kind, layers in zip(kinds, stacks, strict=True):
        x = inputs[kind]
        for layer in layers:
            x = layer(x)
        ends.append(x)
    x = L.Concatenate()(ends) if len(ends) > 1 else ends[0]
    outputs = {head.name: head(x) for head in heads}
    if what["outputs"] == 1:
        outputs = outputs["a"]
    cls = {"keras": keras.Model, "compute_loss": OwnStep, "by hand": ByHand}[what["step"]]
    return cls(inputs if len(kinds) > 1 else inputs[kinds[0]], outputs)


def _head_dtype():
    return "float64" if keras.config.floatx() == "float64" else "float32"


class Subclass(keras.Model):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, x, training=False):
        for part in self.parts:
            x = part(x, training=training) if _takes_training(part) else part(x)
        return x


def _takes_training(layer):
    return layer._call_has_training_arg


class OwnStep(keras.Model):
    """Keras's guide's train_step."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        next(m for m in self.metrics if m.name == "loss").update_state(loss)
        return self.compute_metrics(x, y, y_pred, sample_weight)


class ByHand(keras.Model):
    """A train_step with a loss, a clipping and a tracker of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tracker = keras.metrics.Mean(name="own")

    @property
    def metrics(self):
        return [self.tracker]

    def _loss(self, x, y, training):
        outputs = self(x, training=training)
        outputs = outputs if isinstance(outputs, dict) else {"a": outputs}
        y = y if isinstance(y, dict) else {"a": y}
        loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y["a"], outputs["a"]))
        if "b" in outputs:
            loss += keras.ops.mean(keras.losses.mean_squared_error(y["b"], outputs["b"]))
        return keras.ops.cast(loss, "float32") + sum(
            keras.ops.cast(one, "float32") for one in self.losses
        )

    def train_step(self, data):
        x, y = data[:2]
        with tf.GradientTape() as tape:
            loss = self._loss(x, y, training=True)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, [v.value for v in self.trainable_variables])
        self.optimizer.apply(gradients, self.trainable_variables)
        self.tracker.update_state(loss)
        return {"own": self.tracker.result()}

    def test_step(self, data):
        x, y = data[:2]
        self.tracker.update_state(self._loss(x, y, training=False))
        return {"own": self.tracker.result()}
