"""A function on several new worker processes: for notebooks, and scripts that are not launched."""

import collections
import io
import linecache
import os
import pickle
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle

from tf_blockmomentum.launch.command import local_environments
from tf_blockmomentum.launch.launcher import Launcher


class _Pickler(cloudpickle.CloudPickler):
    """cloudpickle, which also says where code comes from.

    Tracebacks show the code's lines, and AutoGraph, which compiles Python's `if` and `for` in
    functions of tf.data and tf.function, reads them. cloudpickle leaves them out.

    Attributes:
        sources: lines of the code that is in no file, such as a notebook's cells, by the name
            that Python gives it.
    """

    def __init__(self, file: io.BytesIO) -> None:
        self.sources: dict[str, list[str]] = {}
        own = {types.CodeType: self._reduce_code}
        self.dispatch_table = collections.ChainMap(own, cloudpickle.CloudPickler.dispatch_table)
        super().__init__(file)  # which looks at the table

    def _reduce_code(self, code: types.CodeType) -> tuple[Any, ...]:
        name = code.co_filename
        if not os.path.exists(name):
            self.sources[name] = linecache.getlines(name)
        make, arguments = cloudpickle.CloudPickler.dispatch_table[types.CodeType](code)
        return make, tuple(name if a == "<dynamic-code>" else a for a in arguments)


class RemoteTraceback(Exception):
    """The traceback of another process, as the cause of the exception that is raised here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def spawn(function: Callable[..., Any], workers: int = 2, args: Sequence[Any] = ()) -> Any:
    """Runs a function on several new worker processes of this machine, and returns its result.

    Each worker calls `function(*args)` with the `TF_CONFIG` that makes it one of a cluster, so
    the function begins with `strategy = tfbm.MultiWorkerBlockStrategy()` and makes its model and
    data itself. Worker 0's output is shown here as it comes; the workers share this machine's
    cores and GPUs as with `tfbm-launch`. Interrupting (a notebook's stop button, Ctrl-C) ends
    all workers in order, a second time at once.

    The function, also one that a notebook's cell defines, its arguments and worker 0's result
    travel by cloudpickle: give numbers, arrays and paths; what belongs to a process (a model, a
    dataset, a strategy) is made in the function. Trained weights come back as
    `model.get_weights()`, or in a file. A new process imports TensorFlow, which takes seconds.

    Not for long trainings: nothing is started again, and everything ends with this process. And
    a GPU's memory that this process holds is not there for the workers.

    Args:
        function: what every worker runs.
        workers: how many processes.
        args: the function's arguments, the same for every worker.

    Returns:
        What the function returned on worker 0.

    Raises:
        Exception: what the first worker that failed raised, with that worker's traceback as its
            cause.
        RuntimeError: a worker ended without an exception (killed, `sys.exit`), or worker 0's
            result cannot be pickled.
        TypeError: `function` or `args` are not what they should be or cannot be pickled.
        ValueError: `workers` is not a positive number, this is a worker itself, or there are
            fewer GPUs than workers.

    Example:

    >>> import os
    >>> def task(factor):
    ...     import json, os
    ...     return factor * len(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"])
    >>> tfbm.spawn(task, workers=2, args=(10,))
    20
    """
    if not callable(function):
        raise TypeError(f"`function` must be callable. Received: function={function!r}.")
    if not isinstance(args, tuple | list):
        raise TypeError(f"`args` must be a tuple of arguments. Received: args={args!r}.")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"`workers` must be at least 1. Received: workers={workers!r}.")
    if os.environ.get("TF_CONFIG"):
        raise ValueError(
            "TF_CONFIG is set already, so this process is a worker itself. Received: "
            f"TF_CONFIG={os.environ['TF_CONFIG']!r}. Call the function directly, or unset it."
        )
    task = io.BytesIO()
    pickler = _Pickler(task)
    try:
        pickler.dump((function, tuple(args)))
    except Exception as error:
        raise TypeError(
            f"The function and its arguments must travel to new processes. Received: {error}. "
            "Make models, datasets and strategies inside the function."
        ) from error
    with tempfile.TemporaryDirectory(prefix="tfbm-spawn-") as folder:
        first = pickle.dumps((sys.path, pickler.sources))
        Path(folder, "task").write_bytes(first + task.getvalue())
        launcher = Launcher(
            [sys.executable, str(Path(__file__).with_name("spawned.py")), folder],
            output="first",
            quiet=True,
        )
        status = launcher.run(local_environments(say=lambda line: None), workers)
        if launcher.interrupted == signal.SIGINT:
            raise KeyboardInterrupt
        if launcher.interrupted is not None:
            signal.raise_signal(launcher.interrupted)  # as it would have been without workers
        if status:
            _raise(launcher, Path(folder))
        return pickle.loads(Path(folder, "result").read_bytes())


def _raise(launcher: Launcher, folder: Path) -> None:
    """Raises what the first worker that failed raised."""
    failure = launcher.failures[0]
    ended = RuntimeError(
        "\n  ".join([f"{failure}. The last lines of its output:", *failure.last_lines])
    )
    logs = ", ".join(launcher.logs)
    try:
        text, pickled = pickle.loads((folder / f"error-{failure.worker}").read_bytes())
        error = pickle.loads(pickled)
    except FileNotFoundError:
        text, error = "", ended
    except Exception:  # the exception's class can do anything when it is made again
        error = ended
    error.add_note(f"(in worker {failure.worker} of tfbm.spawn; all output: {logs})")
    raise error from (RemoteTraceback(text) if text else None)
