"""What becomes of each variable at a boundary.

| the variable | its rule |
|---|---|
| its `aggregation` is set, and the step changes it | that: `MEAN`, `SUM` or `FIRST` |
| an optimizer's update goes through it | `MOMENTUM` |
| so it does, and its layer assigns it too (SpectralNormalization) | `MEAN` |
| the step assigns it the larger (smaller) of itself and something | `MAXIMUM` (`MINIMUM`) |
| the step computes it, element by element, from variables | `MEAN` |
| the step assigns it anything else, or it is no floating point number | `FIRST` |
| nothing changes it | none: it is not sent |

"Assigns" means `variable.assign` and its like within a local step, outside the optimizer: moving
statistics, a moving-average copy of a network, a feature queue, a counter. A weight that is
trained and that a train_step clips or decays besides is a trained one. Metrics, seed generators
and optimizers' own variables are none of it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum._private import keras as _keras
from tf_blockmomentum._private.tensorflow import assigned_in, variables_made

MOMENTUM, MEAN, SUM, FIRST = "momentum", "mean", "sum", "first"
MAXIMUM, MINIMUM, ROUNDED = "maximum", "minimum", "rounded mean"  # the mean of whole numbers
_AGGREGATIONS = {"mean": MEAN, "sum": SUM, "only_first_replica": FIRST}

# Operations of which each element of the result comes from the elements at its place.
_ELEMENTWISE = {
    *("Identity", "Cast", "ReadVariableOp", "StopGradient", "Snapshot"),
    *("Add", "AddV2", "AddN", "Sub", "Mul", "MulNoNan", "RealDiv", "Div", "DivNoNan", "Neg"),
    *("Square", "Sqrt", "Rsqrt", "Pow", "Exp", "Log", "Abs", "Reciprocal", "Inv", "Xdivy"),
    *("Maximum", "Minimum", "ClipByValue", "Select", "SelectV2"),
    *("Reshape", "ExpandDims", "Squeeze", "BroadcastTo"),
}
_AS_IT_IS = {"Identity", "Cast", "StopGradient", "Snapshot", "Reshape", "ExpandDims", "Squeeze"}


class Rules:
    """The rules of the variables that a step function changes, found out from the step.

    Args:
        optimizers: the step's BlockMomentum optimizers.
        wrappers: the optimizers as the user has them, perhaps with loss scaling around them.
        averaged: variables whose rule is `MEAN` whatever the step does with them.
    """

    def __init__(
        self, optimizers: list[Any], wrappers: Iterable[Any], averaged: Iterable[Any]
    ) -> None:
        self._optimizers = optimizers
        self._wrappers = list(wrappers)
        self._assigned: dict[int, tuple[Any, str]] = {id(v): (v, _mean_of(v)) for v in averaged}
        self._held = set(self._assigned)  # of them, those that an update alone does not decide
        self._starts: dict[int, Any] = {}
        self._seen: set[int] = set()  # TensorFlow's variables of those Keras variables

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around a local step, traced or run: notes what it assigns."""
        eagerly = tf.executing_eagerly()
        before = self._plain_values() if eagerly else []
        with _keras.assignments_told_to(self._note):
            yield
        if eagerly:
            self._note_changed(before)
        else:
            self._note_plain_variables()

    def _known(self) -> set[int]:
        """TensorFlow's variables of which Keras, or an optimizer, tells."""
        optimizers = [o for o in self._wrappers if o.built]
        own = [v for o in optimizers for v in o.variables]
        own += [v for o in self._optimizers if o.built for v in o.built_variables]
        return self._seen | {id(v.value) for v in own} | set(self._assigned)

    def _plain_values(self) -> list[tuple[Any, np.ndarray]]:
        """What may be plain variables, and their values in this replica, before a step."""
        known, made = self._known(), variables_made(tf.distribute.get_strategy())
        return [
            (v, tf.convert_to_tensor(v).numpy())
            for v in made
            if id(v) not in known and (v.dtype.is_floating or v.dtype.is_integer)
        ]

    def _note_changed(self, before: list[tuple[Any, np.ndarray]]) -> None:
        """As `_note_plain_variables`, of a step that ran eagerly: by the values alone."""
        known = self._known()
        for variable, value in before:
            now = tf.convert_to_tensor(variable).numpy()
            if id(variable) not in known and now.tobytes() != value.tobytes():
                self._assigned[id(variable)] = variable, _rule_by_value(variable, value)

    def _note_plain_variables(self) -> None:
        """Those of TensorFlow's that are no Keras variable's, such as `tf.Variable(...)` of the
        user's own, which Keras does not know."""
        known = self._known()
        for variable, operation in assigned_in(tf.compat.v1.get_default_graph()):
            if id(variable) in known or id(variable) in self._assigned:
                continue
            floating, source = variable.dtype.is_floating, operation.inputs[-1]
            adds = operation.type in ("AssignAddVariableOp", "AssignSubVariableOp")
            linear = adds or _from_variables(source.op, variable.shape)
            self._assigned[id(variable)] = variable, MEAN if floating and linear else FIRST

    def _note(self, variable: Any, value: Any) -> None:
        self._seen.add(id(variable.value))
        if id(variable) in self._assigned or any(o.updating for o in self._optimizers):
            return
        own = {id(v) for optimizer in self._wrappers for v in optimizer.variables}
        if id(variable) in own or not _keras.is_plain_state(variable):
            return
        rule = _AGGREGATIONS.get(variable.aggregation) or _default_rule(variable, value)
        rule = _mean_of(variable) if rule == MEAN else rule
        self._assigned[id(variable)] = variable, rule
        if variable.aggregation in _AGGREGATIONS or _keras.in_a_layer():
            self._held.add(id(variable))
        if rule == SUM and tf.executing_eagerly():
            self._starts[id(variable)] = tf.identity(variable)

    def of(self, *rules: str) -> list[Any]:
        """The variables with one of these rules, besides `MOMENTUM`."""
        updated = {id(v) for o in self._optimizers for v in o.updated} - self._held
        found = self._assigned.items()
        return [v for key, (v, rule) in found if rule in rules and key not in updated]

    def follow(self) -> int:
        """Takes note of what the optimizers have updated so far, and tells them for which of
        their variables block momentum is. Returns the number of variables with a rule, which
        grows when the step turns out to change more."""
        for optimizer in self._optimizers:
            for v in optimizer.overwritten:  # a gradient that is the new value (float8's scales)
                self._hold(v, MEAN)
            for v in optimizer.updated:
                if v.aggregation in _AGGREGATIONS:
                    self._hold(v, _AGGREGATIONS[v.aggregation])
            optimizer.without_momentum = self._held
        for v in self.of(SUM):
            if not isinstance(self._starts.get(id(v)), tf.Variable):
                start = self._starts.get(id(v))
                self._starts[id(v)] = tf.Variable(v if start is None else start, trainable=False)
        return len(self._assigned) + sum(len(o.updated) for o in self._optimizers)

    def _hold(self, variable: Any, rule: str) -> None:
        self._assigned.setdefault(id(variable), (variable, rule))
        self._held.add(id(variable))

    @property
    def changed(self) -> list[Any]:
        """All variables with a rule besides `MOMENTUM`. Some are in no model: a recurrent layer's
        state, variables of TensorFlow's."""
        return [v for v, _ in self._assigned.values()]

    @property
    def starts(self) -> list[tf.Variable]:
        """What the variables with `SUM` were when it was last taken, in their order."""
        return [self._starts[id(v)] for v in self.of(SUM)]


def _mean_of(variable: Any) -> str:
    return MEAN if tf.as_dtype(variable.dtype).is_floating else ROUNDED


def _default_rule(variable: Any, value: Any) -> str:
    floating = tf.as_dtype(variable.dtype).is_floating
    operation = _operation(value)
    if operation is None:
        return _rule_by_value(variable, tf.convert_to_tensor(variable).numpy())
    extremum = _through(operation, _AS_IT_IS)
    if extremum.type in ("Maximum", "Minimum") and _reads(extremum, variable):
        return MAXIMUM if extremum.type == "Maximum" else MINIMUM
    return MEAN if floating and _from_variables(operation, value.shape) else FIRST


def _rule_by_value(variable: Any, before: np.ndarray) -> str:
    """In a step that runs eagerly only the value tells, here the one before an assignment."""
    if not tf.as_dtype(variable.dtype).is_floating:
        return FIRST
    if np.all(np.isinf(before)) and np.unique(np.sign(before)).size == 1:
        return MINIMUM if before.flat[0] > 0 else MAXIMUM
    return MEAN


def _operation(value: Any) -> Any:
    """What a value comes from; None if it was computed eagerly."""
    return None if tf.executing_eagerly() else tf.convert_to_tensor(value).op


def _through(operation: Any, types: set[str]) -> Any:
    while operation.type in types:
        operation = operation.inputs[0].op
    return operation


def _reads(operation: Any, variable: Any) -> bool:
    """Whether one of an operation's inputs is this variable's value."""
    own = _through(tf.convert_to_tensor(variable).op, _AS_IT_IS)
    found = [_through(x.op, _AS_IT_IS) for x in operation.inputs]
    return any(
        op.type == "ReadVariableOp" == own.type and op.inputs[0] is own.inputs[0] for op in found
    )


def _from_variables(operation: Any, shape: tf.TensorShape) -> bool:
    """Whether a value is computed element by element from variables of its own shape."""
    seen, waiting = set(), [operation]
    while waiting:
        op = waiting.pop()
        if op.name in seen or op.type not in _ELEMENTWISE:
            continue
        seen.add(op.name)
        if op.type == "ReadVariableOp":
            if op.outputs[0].shape == shape:
                return True
            continue
        waiting += [x.op for x in op.inputs]
    return False
