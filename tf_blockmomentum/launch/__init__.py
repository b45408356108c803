"""Starts a training script on several workers, watches them, and starts them again.

    python -m tf_blockmomentum.launch --workers 4 train.py --epochs 10

starts four processes of `train.py --epochs 10` on this machine, each with the `TF_CONFIG` that
makes it one worker of a cluster on free local ports; `MultiWorkerBlockStrategy` reads it. Every
line a worker writes is shown with its number in front (`--log-dir`: in a file per worker too).
As soon as one worker fails, the others are ended and its exit status becomes this command's
(128 + n for signal n). Ctrl-C and SIGTERM end all workers.

Started again: with `--max-restarts N` the whole job is, up to N times; a script that uses
`tfbm.BlockBackup` goes on from its last complete backup. `--hang-timeout SECONDS` also ends a
job whose workers all stopped making progress (no block, validation batch or backup finished;
it has to be longer than start, compilation and the longest block), names the worker the others
wait for and prints its Python stack. `--elastic MIN:MAX` goes on with one worker fewer when the
same one fails first twice in a row, and with MAX again when this process gets SIGUSR1 (the work
since the last backup is done again). `--heartbeat SECONDS` is how soon TensorFlow notices that
a machine is gone; a process that ends on this machine is noticed at once.

Several machines, this command on each:

    tfbm-launch --hosts a:2222,b:2222 --index 0 train.py    # on a; --index 1 on b
    srun tfbm-launch --slurm train.py                       # TensorFlow's SlurmClusterResolver
    tfbm-launch train.py                                    # TF_CONFIG is set already

Local workers bind to the loopback address. TensorFlow's gRPC has no authentication and no
encryption: whoever reaches a worker's port can run code there, so give `--hosts` only
addresses on a private network.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from tf_blockmomentum import progress

GRACE_SECONDS = 1.0  # between SIGTERM, which TensorFlow may ignore, and SIGKILL
SETTLE_SECONDS = 0.3  # after the first failure, for others of the same moment
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HEARTBEAT = "TFBM_HEARTBEAT"  # read by MultiWorkerBlockStrategy


def main(arguments=None):
    """Runs the command; returns its exit status."""
    options = _parse(arguments)
    launcher = Launcher(
        [sys.executable, options.script, *options.arguments],
        max_restarts=options.max_restarts,
        hang_timeout=options.hang_timeout,
        log_dir=options.log_dir,
    )
    extra = {} if options.heartbeat is None else {HEARTBEAT: str(options.heartbeat)}
    if options.workers:
        least, most = options.elastic or (options.workers, options.workers)
        return launcher.run(
            lambda count: environments(free_ports(count), extra), options.workers, least, most
        )
    if options.hosts:
        config = {
            "cluster": {"worker": options.hosts},
            "task": {"type": "worker", "index": options.index},
        }
    else:
        config = _slurm_config() if options.slurm else json.loads(os.environ["TF_CONFIG"])
    return launcher.run(lambda _: [{"TF_CONFIG": json.dumps(config), **extra}])


def environments(ports, extra=()):
    """Returns each worker's environment variables, for workers on these local ports."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return [
        {
            "TF_CONFIG": json.dumps(
                {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            ),
            **dict(extra),
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


class Launcher:
    """Runs a job to its end, starting it again as often as allowed.

    Args:
        command: list of strings, what every worker runs.
        max_restarts: how often to start the job again after a failure.
        hang_timeout: seconds without progress of any worker after which it has failed; None:
            never.
        log_dir: directory for `worker-I.log`; None: no files.
    """

    def __init__(self, command, max_restarts=0, hang_timeout=None, log_dir=None):
        self._command = command
        self._max_restarts = max_restarts
        self._hang_timeout = hang_timeout
        self._log_dir = log_dir
        self._signal = None  # handlers only note it, so that nothing is left half done

    def run(self, make_environments, count=1, least=1, most=1):
        """Runs the job; returns the exit status of the whole.

        Args:
            make_environments: function from a number of workers to the environment variables
                of those to start here; called for every start, since ports may be in use.
            count: how many workers to begin with, from `least` to `most`.
            least: never go on with fewer.
            most: how many SIGUSR1 asks for.
        """
        numbers = (*_ENDING, signal.SIGUSR1)
        before = {number: signal.signal(number, self._note_signal) for number in numbers}
        try:
            return self._run(make_environments, count, least, most)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, make_environments, count, least, most):
        restarts, culprit = 0, None
        while True:
            job = _Job(self._command, make_environments(count), self._log_dir)
            try:
                job.start()
                failures = job.wait(self._hang_timeout, lambda: self._signal)
            finally:
                job.end()
            number, self._signal = self._signal, None
            if number in _ENDING:
                _say(f"interrupted by {signal.Signals(number).name}; ended all workers")
                return 128 + number
            for worker, _, reason in failures:
                _say(f"worker {worker} {reason}")
            if number == signal.SIGUSR1:
                count, culprit = most, None
                _say(f"starting again as asked, workers: {count}")
                continue
            if not failures:
                return 0
            first, status, _ = failures[0]
            if restarts == self._max_restarts:
                _say(f"ended all workers, restarts: {restarts}")
                return status
            restarts += 1
            if first == culprit and count > least:
                count, first = count - 1, None
            culprit = first
            _say(f"restart {restarts} of {self._max_restarts}, workers: {count}")

    def _note_signal(self, number, _):
        if self._signal not in _ENDING:
            self._signal = number


class _Job:
    """The workers of one start."""

    def __init__(self, command, worker_environments, log_dir):
        self._command = command
        self._environments = worker_environments
        self._log_dir = log_dir
        self._processes = {}
        self._readers = []
        self._folder = tempfile.TemporaryDirectory(prefix="tfbm-launch-")

    def start(self):
        for environment in self._environments:
            index = json.loads(environment["TF_CONFIG"]).get("task", {}).get("index", 0)
            worker = subprocess.Popen(
                self._command,
                env={
                    **os.environ,
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONFAULTHANDLER": "1",  # SIGABRT then prints the Python stack
                    progress.VARIABLE: self._status(index),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a process group of its own, ended as a whole
            )
            self._processes[index] = worker
            log = os.devnull
            if self._log_dir:
                os.makedirs(self._log_dir, exist_ok=True)
                log = os.path.join(self._log_dir, f"worker-{index}.log")
            for source, target in ((worker.stdout, sys.stdout), (worker.stderr, sys.stderr)):
                reader = threading.Thread(
                    target=_copy, args=(index, source, target, log), daemon=True
                )
                reader.start()
                self._readers.append(reader)

    def wait(self, hang_timeout, interrupted):
        """Returns the failures, as (worker, exit status, reason); none if all is done."""
        last, since = None, time.monotonic()
        while True:
            failures = self._failures()
            if failures:
                time.sleep(SETTLE_SECONDS)
                known = {failure[0] for failure in failures}
                failures += [f for f in self._failures() if f[0] not in known]
                return self._stopped() or sorted(failures, key=_is_a_consequence)
            if interrupted() or all(p.returncode == 0 for p in self._processes.values()):
                return []
            now = {index: progress.read(self._status(index)) for index in self._processes}
            if now != last:
                last, since = now, time.monotonic()
            elif hang_timeout and time.monotonic() - since > hang_timeout:
                return self._hung(now, hang_timeout)
            time.sleep(0.02)

    def _failures(self):
        """Those that have ended badly, or are about to."""
        found = []
        for index, process in self._processes.items():
            status = process.poll()
            _, text = progress.read(self._status(index))
            error = text.removeprefix(progress.FAILED) if text.startswith(progress.FAILED) else ""
            if status is None and error:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=SETTLE_SECONDS)
                status = status or 1
            if status:
                how = f"exit status {status}" if status > 0 else _signal_name(-status)
                reason = f"failed with {how}" + (f" ({error})" if error else "")
                found.append((index, status if status > 0 else 128 - status, reason))
        return found

    def _stopped(self):
        """Workers that others take for dead because they are stopped."""
        return [
            (index, 128 + signal.SIGSTOP, "is stopped (SIGSTOP)")
            for index, process in self._processes.items()
            if process.poll() is None and _is_stopped(process.pid)
        ]

    def _hung(self, now, hang_timeout):
        running = [i for i, process in self._processes.items() if process.poll() is None]
        stuck = [i for i in running if not now[i][1].startswith("waits")] or running
        failures = []
        for index in stuck:
            process = self._processes[index]
            stopped = _is_stopped(process.pid)
            what = "it is stopped (SIGSTOP)" if stopped else f"its last word: {now[index][1]}"
            reason = f"is stuck: no progress in {hang_timeout:g} s, {what}"
            failures.append((index, 128 + signal.SIGABRT, reason))
            _say(f"worker {index} is stuck; its Python stack:")
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
                os.kill(process.pid, signal.SIGABRT)
                os.kill(process.pid, signal.SIGCONT)  # one that is stopped has to wake for it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=2 * GRACE_SECONDS)
        return failures

    def end(self):
        """Ends what is left of every worker's process group."""
        deadline = time.monotonic() + GRACE_SECONDS
        processes = self._processes.values()
        for sig in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, sig)
            while sig == signal.SIGTERM and time.monotonic() < deadline:
                if all(process.poll() is not None for process in processes):
                    break
                time.sleep(0.02)
        for process in processes:
            process.wait()
        for reader in self._readers:
            reader.join(timeout=GRACE_SECONDS)
        self._folder.cleanup()

    def _status(self, index):
        return os.path.join(self._folder.name, f"worker-{index}")


def _copy(index, source, target, path):
    with source, open(path, "a", buffering=1) as log:
        for line in source:
            target.write(f"[worker {index}] {line.rstrip()}\n")
            target.flush()
            log.write(line)


def _say(text):
    print(f"tfbm-launch: {text}", file=sys.stderr, flush=True)


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _is_a_consequence(failure):
    """Whether a worker failed because another one had ended: the sort key of failures."""
    _, status, reason = failure
    names = ("Unavailable", "DeadlineExceeded", "Aborted", "Cancelled")
    # One that was killed or crashed had no part in the others' end. TensorFlow aborts, though,
    # where it loses the others.
    killed = status - 128 in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)
    return not killed, any(f"({name}Error" in reason for name in names)


def _is_stopped(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:  # not Linux, or gone
        return False


def _slurm_config():
    """`TF_CONFIG` of this Slurm task, from TensorFlow's resolver, in a process of its own."""
    code = (
        "import json, os, tensorflow as tf\n"
        # The resolver leaves out tasks for which a node has no GPU, and knows the task's number
        # only after cluster_spec(). Which GPUs a task sees is left to Slurm (--gpus-per-task).
        "r = tf.distribute.cluster_resolver.SlurmClusterResolver(\n"
        "    gpus_per_node=10**6, gpus_per_task=1, auto_set_gpu=False)\n"
        "cluster = r.cluster_spec().as_dict()\n"
        "kind, index = r.get_task_info()\n"
        "print(json.dumps({'cluster': cluster,"
        " 'task': {'type': kind, 'index': index}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(
            f"tfbm-launch: --slurm works inside a Slurm step. Received: {last}. Start it with "
            "srun, as in `srun --ntasks=4 tfbm-launch --slurm train.py`."
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="tfbm-launch", description="Starts a training script on several workers."
    )
    where = parser.add_argument_group("which workers (none of these: TF_CONFIG as it is)")
    where.add_argument("--workers", type=int, help="number of processes on this machine")
    where.add_argument("--elastic", metavar="MIN:MAX", help="bounds for their number")
    where.add_argument("--hosts", metavar="A:PORT,B:PORT", help="all workers' addresses")
    where.add_argument("--index", type=int, help="which of the hosts this one is, from 0")
    where.add_argument("--slurm", action="store_true", help="this task of a Slurm step")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N")
    parser.add_argument("--hang-timeout", type=float, metavar="SECONDS")
    parser.add_argument("--heartbeat", type=float, metavar="SECONDS")
    parser.add_argument("--log-dir", help="directory for each worker's output")
    parser.add_argument("script", help="the Python script every worker runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments")
    options = parser.parse_args(arguments)

    if options.elastic:
        least, colon, most = options.elastic.partition(":")
        if not (colon and least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most)):
            parser.error(
                "--elastic takes MIN:MAX, whole numbers with 1 <= MIN <= MAX, as in 2:4. "
                f"Received: {options.elastic!r}."
            )
        options.elastic = int(least), int(most)
        options.workers = options.elastic[1] if options.workers is None else options.workers
        if not options.elastic[0] <= options.workers <= options.elastic[1]:
            parser.error(
                f"--workers must be within --elastic. Received: --workers {options.workers} "
                f"--elastic {least}:{most}."
            )
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1. Received: {options.workers}.")
    if options.max_restarts < 0:
        parser.error(f"--max-restarts must be at least 0. Received: {options.max_restarts}.")
    for name in ("hang_timeout", "heartbeat"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0. Received: {value:g}.")
    ways = [options.workers is not None, options.hosts is not None, options.slurm]
    tf_config = os.environ.get("TF_CONFIG")
    if sum(ways) > 1:
        parser.error("--workers, --hosts and --slurm exclude each other. Give one of them.")
    if any(ways) and tf_config:
        parser.error(
            "TF_CONFIG is set already, so something else starts the workers here. Received: "
            f"TF_CONFIG={tf_config!r}. Leave out --workers, --elastic, --hosts and --slurm to "
            "use it, or unset it."
        )
    if not any(ways) and not tf_config:
        parser.error("--workers is missing: the number of processes on this machine, such as 2.")
    if not any(ways):
        try:
            usable = isinstance(json.loads(tf_config or ""), dict)
        except json.JSONDecodeError:
            usable = False
        if not usable:
            parser.error(f"TF_CONFIG is not a JSON object. Received: TF_CONFIG={tf_config!r}.")
    if options.hosts is not None:
        options.hosts = options.hosts.split(",")
        if not all(
            host and port.isdigit()
            for host, _, port in (address.rpartition(":") for address in options.hosts)
        ):
            parser.error(
                "--hosts takes the address of every worker, as in a:2222,b:2222. Received: "
                f"{','.join(options.hosts)!r}."
            )
        if options.index is None or not 0 <= options.index < len(options.hosts):
            parser.error(
                f"--index must be from 0 to {len(options.hosts) - 1}, which of the --hosts this "
                f"machine is. Received: {options.index}."
            )
    if not os.path.isfile(options.script):
        parser.error(
            f"there is no script to run. Received: {options.script!r}, which is not a file in "
            f"{os.getcwd()}. Give its path after the launcher's own options."
        )
    return options
