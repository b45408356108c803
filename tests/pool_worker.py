"""One worker process of a pool (pool.py): `pool_worker.py DESCRIPTOR`, its end of the pipe.

It joins the others, says so, and then answers one call after the other until pytest ends.
"""

import faulthandler
import gc
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings

from _pytest.config import parse_warning_filter
from helpers import forget_keras_state
from pool import Raised

import tf_blockmomentum as tfbm


def main() -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # for the stacks of a worker that hangs
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    connection = multiprocessing.connection.Connection(int(sys.argv[1]))
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
        answer = run(call, strategy)
        strategy.compression = compression
        forget_keras_state()
        gc.collect()
        gc.freeze()  # as above
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        connection.send_bytes(answer)


def run(call: bytes, strategy: tfbm.MultiWorkerBlockStrategy) -> bytes:
    """The pickled result, or `Raised`."""
    with warnings.catch_warnings():
        try:
            function, args, kwargs, filters = pickle.loads(call)
            for line in filters:
                warnings.filterwarnings(*parse_warning_filter(line, escape=False))
            return pickle.dumps(function(strategy, *args, **kwargs))
        except BaseException as error:  # SystemExit too
            return pickle.dumps(Raised.from_exception(error))


def end_with(parent: int) -> None:
    """A pytest that was killed cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once, as above
