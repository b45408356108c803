"""What a process of `tfbm.spawn` runs; started by its path, with a folder as its argument."""

import linecache
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any


def main(folder: str) -> None:
    """Runs the task in the folder, and leaves there what came of it."""
    with open(os.path.join(folder, "task"), "rb") as file:
        sys.path[:], sources = pickle.load(file)
        for name, lines in sources.items():  # for tracebacks and AutoGraph
            linecache.cache[name] = sum(map(len, lines)), None, lines, name
        import cloudpickle  # on that path

        index = _index()
        try:
            function, args = pickle.load(file)
            result = function(*args)
            if index == 0:
                _write(os.path.join(folder, "result"), _pickled(result, cloudpickle.dumps))
        except Exception as error:
            text = traceback.format_exc()
            try:
                pickled = cloudpickle.dumps(error)
            except Exception:  # it holds what cannot travel
                pickled = b""
            _write(os.path.join(folder, f"error-{index}"), pickle.dumps((text, pickled)))
            sys.excepthook(*sys.exc_info())  # that of tf_blockmomentum.progress, if it is there
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)  # TensorFlow's own way out waits for the other workers


def _index() -> int:
    import json

    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]


def _pickled(result: Any, dumps: Callable[[Any], bytes]) -> bytes:
    try:
        return dumps(result)
    except Exception as error:
        raise RuntimeError(
            f"Worker 0's result must travel back. Received: {type(result).__name__}, and {error}. "
            "Return numbers, arrays, `history.history`, `model.get_weights()` or a path."
        ) from error


def _write(path: str, data: bytes) -> None:
    with open(path + ".part", "wb") as file:
        file.write(data)
    os.replace(path + ".part", path)


if __name__ == "__main__":
    main(sys.argv[1])
