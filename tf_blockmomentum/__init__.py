"""Block momentum for Keras 3 on TensorFlow: local training that communicates K times less."""

import importlib as _importlib
import os as _os
import sys as _sys
import typing as _typing

__version__ = "0.1.0"

# The launcher only starts processes, plan and report only draw: they need not wait seconds for
# TensorFlow. While Python looks for the module of -m, it stands where the script's name will.
_program = _sys.argv[0] if _sys.argv else ""
if _program == "-m":
    _program = _sys.orig_argv[-len(_sys.argv)].removeprefix("-m")
_COMMANDS = ("launch", "plan", "report")
if _os.path.basename(_program) in (
    *(f"tf_blockmomentum.{command}" for command in _COMMANDS),
    *(f"tfbm-{command}" for command in _COMMANDS),
):
    __all__ = []
else:
    try:
        import keras as _keras
    except ImportError:  # of the library that another backend stands on
        _backend = _os.environ.get("KERAS_BACKEND", "tensorflow")
        if _backend == "tensorflow":
            raise
    else:
        _backend = _keras.config.backend()
    if _backend != "tensorflow":
        raise ImportError(
            "tf_blockmomentum needs Keras's TensorFlow backend. Received: the "
            f"{_backend} backend. Set KERAS_BACKEND=tensorflow in the environment (or in "
            "~/.keras/keras.json) before keras is imported."
        )

    from tf_blockmomentum import progress as _progress
    from tf_blockmomentum import schedules
    from tf_blockmomentum.backup import BlockBackup
    from tf_blockmomentum.callback import BlockTraining
    from tf_blockmomentum.chief_only import ChiefOnly
    from tf_blockmomentum.launch.spawn import spawn
    from tf_blockmomentum.loop import BlockLoop
    from tf_blockmomentum.optimizer import BlockMomentum
    from tf_blockmomentum.outer import SlowMo
    from tf_blockmomentum.report.callback import BlockReport
    from tf_blockmomentum.statistics.refresh import refresh_statistics
    from tf_blockmomentum.strategy import MultiDeviceBlockStrategy, MultiWorkerBlockStrategy

    _progress.install()

    __all__ = [
        "BlockBackup",
        "BlockLoop",
        "BlockMomentum",
        "BlockReport",
        "BlockTraining",
        "ChiefOnly",
        "MultiDeviceBlockStrategy",
        "MultiWorkerBlockStrategy",
        "SlowMo",
        "refresh_statistics",
        "schedules",
        "spawn",
    ]


if _typing.TYPE_CHECKING:  # which would take any name for one that is there, from __getattr__
    from tf_blockmomentum import tuner as tuner
else:

    def __getattr__(name: str) -> _typing.Any:
        if name == "tuner":  # only now: it imports keras_tuner, which not everybody has
            return _importlib.import_module("tf_blockmomentum.tuner")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
