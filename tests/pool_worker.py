"""One worker process of a pool (pool.py): `pool_worker.py DESCRIPTOR`, its end of the pipe.

It joins the others, says so, and then answers one call after the other until pytest ends.
"""

import faulthandler
import gc
import multiprocessing.connection
import os
import pathlib
import pickle
import signal
import sys
import threading
import time
import tomllib
import warnings

from _pytest.config import parse_warning_filter
from helpers import forget_keras_state
from pool import Raised

import tf_blockmomentum as tfbm

PROJECT = pathlib.Path(__file__).parent.parent / "pyproject.toml"


def main() -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # for the stacks of a worker that hangs
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    connection = multiprocessing.connection.Connection(int(sys.argv[1]))
    options = tomllib.loads(PROJECT.read_text())["tool"]["pytest"]["ini_options"]
    filters = [parse_warning_filter(line, escape=False) for line in options["filterwarnings"]]
    strategy = tfbm.MultiWorkerBlockStrategy()
    compression = strategy.compression
    gc.collect()
    gc.freeze()  # what was imported need not be looked through after each call
    connection.send(None)
    while True:
        try:
            call = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # TensorFlow's way out would wait for the others
        answer = run(call, strategy, filters)
        strategy.compression = compression
        forget_keras_state()
        gc.collect()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        connection.send_bytes(answer)


def run(call: bytes, strategy: tfbm.MultiWorkerBlockStrategy, filters) -> bytes:
    """The pickled result, or `Raised`."""
    with warnings.catch_warnings():
        for arguments in filters:
            warnings.filterwarnings(*arguments)
        try:
            function, args, kwargs = pickle.loads(call)
            return pickle.dumps(function(strategy, *args, **kwargs))
        except BaseException as error:  # SystemExit too
            return pickle.dumps(Raised.from_exception(error))


def end_with(parent: int) -> None:
    """A pytest that was killed cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
