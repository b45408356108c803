"""Starts a training script on several workers of this machine.

    python -m tf_blockmomentum.launch --workers 4 train.py --epochs 10

starts four processes of `train.py --epochs 10`, each with the `TF_CONFIG` that
makes it one worker of a cluster on free local ports; `MultiWorkerBlockStrategy`
reads it. Every line a worker writes is shown with its number in front. As soon as
one worker fails, the others are ended and its exit status becomes this command's
(128 + n for signal n). Ctrl-C and SIGTERM end all workers.

Ports are bound to the loopback address. TensorFlow's gRPC has no authentication:
do not expose it beyond a private network.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 1.0  # between SIGTERM, which TensorFlow may ignore, and SIGKILL


def main(arguments=None):
    """Runs the command; returns its exit status."""
    options = _parse(arguments)
    return run(
        [sys.executable, options.script, *options.arguments],
        environments(free_ports(options.workers)),
    )


def environments(ports):
    """Returns each worker's environment variables, for workers on these local ports."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return [
        {
            "TF_CONFIG": json.dumps(
                {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            ),
            "PYTHONUNBUFFERED": "1",
        }
        for index in range(len(ports))
    ]


def free_ports(count):
    """Returns `count` different ports that are free on the loopback address."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:  # all bound at once, so that all differ
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def run(command, worker_environments):
    """Runs one process per environment to the end; returns the exit status of the whole."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    workers, readers = [], []
    try:
        for index, environment in enumerate(worker_environments):
            worker = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a process group of its own, ended as a whole
            )
            workers.append(worker)
            for source, target in ((worker.stdout, sys.stdout), (worker.stderr, sys.stderr)):
                reader = threading.Thread(target=_copy, args=(index, source, target), daemon=True)
                reader.start()
                readers.append(reader)
        return _wait(workers)
    except KeyboardInterrupt:
        _say("interrupted; ending all workers")
        return 128 + signal.SIGINT
    finally:
        _end(workers)
        for reader in readers:
            reader.join(timeout=GRACE_SECONDS)
        signal.signal(signal.SIGTERM, before)


def _wait(workers):
    running = dict(enumerate(workers))
    while running:
        for index, worker in list(running.items()):
            status = worker.poll()
            if status is None:
                continue
            del running[index]
            if status:
                how = f"exit status {status}" if status > 0 else _signal_name(-status)
                _say(f"worker {index} failed with {how}; ending the others")
                return status if status > 0 else 128 - status
        time.sleep(0.02)
    return 0


def _end(workers):
    """Ends what is left of every worker's process group."""
    deadline = time.monotonic() + GRACE_SECONDS
    for sig in (signal.SIGTERM, signal.SIGKILL):
        for worker in workers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, sig)
        while sig == signal.SIGTERM and time.monotonic() < deadline:
            if all(worker.poll() is not None for worker in workers):
                break
            time.sleep(0.02)
    for worker in workers:
        worker.wait()


def _copy(index, source, target):
    for line in source:
        target.write(f"[worker {index}] {line.rstrip()}\n")
        target.flush()


def _say(text):
    print(f"tfbm-launch: {text}", file=sys.stderr, flush=True)


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _interrupt(*_):
    raise KeyboardInterrupt


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="tfbm-launch", description="Starts a training script on several local workers."
    )
    parser.add_argument("--workers", type=int, required=True, help="number of processes")
    parser.add_argument("script", help="the Python script every worker runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1. Received: {options.workers}.")
    if not os.path.isfile(options.script):
        parser.error(
            f"there is no script to run. Received: {options.script!r}, which is not a file in "
            f"{os.getcwd()}. Give its path after the launcher's own options."
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
