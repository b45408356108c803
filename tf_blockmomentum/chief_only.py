"""ChiefOnly: callbacks that write files, on one worker."""

from collections.abc import Callable
from typing import Any

import keras

from tf_blockmomentum.strategy import worker_of


class ChiefOnly(keras.callbacks.Callback):
    """Runs a callback that writes files on the first worker only.

    For ModelCheckpoint, CSVLogger, TensorBoard and the like, whose copies on several workers
    would write to the same path at the same time. They read weights without communication,
    so the first worker may do so alone, and at the end of an epoch all replicas have the
    same. A callback that evaluates the model or stops training must run on all workers, as
    EarlyStopping, ReduceLROnPlateau and TerminateOnNaN do: not for this.

    Args:
        callback: a Keras callback; on other workers none of its methods is called.

    Example:

    >>> checkpoint = tfbm.ChiefOnly(keras.callbacks.ModelCheckpoint("best.keras"))
    """

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        super().__init__()
        if getattr(callback, "on_all_workers", False):
            raise ValueError(
                f"{type(callback).__name__} has to run on all workers, which tell each other what "
                f"it needs. Received: ChiefOnly({type(callback).__name__}(...)). Leave ChiefOnly "
                "out: what it writes for all it writes on the chief alone."
            )
        self.callback = callback
        self._calls = False  # until the model tells which worker this is

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._calls = worker_of(model.distribute_strategy)[0] == 0
        if self._calls:
            self.callback.set_model(model)
            self.callback.set_params(self.params)

    def set_params(self, params: dict[str, Any]) -> None:
        """Passes them on, if the model came first, as in Keras's CallbackList."""
        super().set_params(params)
        if self._calls:
            self.callback.set_params(params)


def _passed_on(hook: str) -> Callable[..., None]:
    def method(self: ChiefOnly, *args: Any, **kwargs: Any) -> None:
        if self._calls:
            getattr(self.callback, hook)(*args, **kwargs)

    method.__doc__ = f"The callback's own `{hook}`, on the first worker."
    return method


for _hook in dir(keras.callbacks.Callback):
    if _hook.startswith("on_"):
        setattr(ChiefOnly, _hook, _passed_on(_hook))
