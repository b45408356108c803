"""Workers on one machine with a link of a given speed between them."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

from tf_blockmomentum.launch import free_ports

DEVICE = "tfbm0"  # a worker's end of the link, in its namespace


@contextlib.contextmanager
def link(rate, workers):
    """Yields (command prefix, address) for each worker; `rate` as tc writes it, or None."""
    if rate is None:
        yield [([], "127.0.0.1")] * workers
        return
    names = [f"tfbm{os.getpid()}-{i}" for i in range(workers)]
    bridge = f"{names[0]}-b"
    try:
        run("ip", "netns", "add", bridge)
        inside(bridge, "ip link add name bridge0 type bridge")
        inside(bridge, "ip link set bridge0 up")
        for i, name in enumerate(names):
            run("ip", "netns", "add", name)
            inside(name, f"ip link add name {DEVICE} type veth peer name port{i} netns {bridge}")
            inside(bridge, f"ip link set port{i} master bridge0 up")
            inside(name, f"ip addr add 10.77.0.{i + 1}/24 dev {DEVICE}")
            inside(name, f"ip link set {DEVICE} up")
            inside(name, "ip link set lo up")
            inside(name, f"tc qdisc add dev {DEVICE} root tbf rate {rate} burst 1mb latency 50ms")
        yield [(["ip", "netns", "exec", n], f"10.77.0.{i + 1}") for i, n in enumerate(names)]
    finally:
        for name in (*names, bridge):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def inside(name, command):
    run("ip", "netns", "exec", name, *command.split())


def launch(places, python, script, arguments, limit, gpu=False):
    """Runs a script on one worker per place, each on a core (or a GPU) of its own, with TF_CONFIG
    set. Returns the JSON lines that worker 0 prints; what went wrong after some is printed.
    Raises OSError if there are none."""
    cores = sorted(os.sched_getaffinity(0))
    commands, changes = [], []
    for i, (prefix, _) in enumerate(places):
        pinned = [] if gpu else ["taskset", "-c", str(cores[i % len(cores)])]
        commands.append([*prefix, *pinned, str(python), str(script), *arguments])
        changes.append({"CUDA_VISIBLE_DEVICES": str(i) if gpu else ""})
    rows, error = finished(start(commands, changes, [address for _, address in places]), limit)
    if not rows:
        raise OSError(error or "no output")
    if error:
        print(f"after its results: {error}", flush=True)
    return rows


def start(commands, changes, addresses=()):
    """Starts a worker for each command, which has its output read if it is the first.

    Args:
        commands: each a list.
        changes: for each, what is to be set in its environment.
        addresses: for each, of the machine it is on; none: each is alone, without TF_CONFIG.
    """
    ports = free_ports(len(addresses))
    workers = [f"{address}:{port}" for address, port in zip(addresses, ports, strict=True)]
    processes = []
    for i, (command, change) in enumerate(zip(commands, changes, strict=True)):
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, **change}
        if workers:
            task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}
            environment["TF_CONFIG"] = json.dumps(task)
        pipe = subprocess.DEVNULL if i else subprocess.PIPE
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=pipe, stderr=pipe, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
    return processes


def finished(processes, limit):
    """Waits for workers for some seconds, and ends those that are left. Returns the JSON lines
    that the first has printed, and what went wrong with it, or None."""
    error = None
    try:
        printed, complaints = processes[0].communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        error = f"not done after {limit:.0f} s"
        end(processes)
        printed, complaints = processes[0].communicate()
    else:
        end(processes[1:], patience=30)
    if error is None and processes[0].returncode:
        error = f"exit status {processes[0].returncode}"
    if error:
        error += ": " + "\n".join(complaints.strip().splitlines()[-25:])
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")], error


def end(processes, patience=0):
    """Ends processes, and those that they have started, after some seconds each."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def bytes_sent():
    """By this worker: what its network interface has counted (on loopback, by all)."""
    device = DEVICE if Path("/sys/class/net", DEVICE).exists() else "lo"
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())
