"""Workers on one machine with a link of a given speed between them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

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
    set. Returns the JSON lines that worker 0 prints."""
    ports = []
    for _ in places:
        with socket.socket() as s:
            s.bind(("", 0))
            ports.append(s.getsockname()[1])
    addresses = [f"{address}:{port}" for (_, address), port in zip(places, ports, strict=True)]
    processes = []
    cores = sorted(os.sched_getaffinity(0))
    for i, (prefix, _) in enumerate(places):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "TF_CPP_MIN_LOG_LEVEL": "2"}
        environment["CUDA_VISIBLE_DEVICES"] = str(i) if gpu else ""
        pinned = [] if gpu else ["taskset", "-c", str(cores[i % len(cores)])]
        command = [*prefix, *pinned, str(python), str(script), *arguments]
        pipe = subprocess.DEVNULL if i else subprocess.PIPE
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=pipe, stderr=pipe, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
    try:
        printed, errors = processes[0].communicate(timeout=limit)
        for process in processes[1:]:
            process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        printed, errors = "", f"not done after {limit} s"
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    if not rows:
        raise OSError((errors.strip().splitlines() or ["no output"])[-1])
    return rows


def bytes_sent():
    """By this worker: what its network interface has counted (on loopback, by all)."""
    device = DEVICE if Path("/sys/class/net", DEVICE).exists() else "lo"
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())
