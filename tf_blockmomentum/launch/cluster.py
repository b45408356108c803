"""Who the workers are: addresses, `TF_CONFIG`, and what must not come between them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def environments(
    ports: Iterable[int], extra: Mapping[str, str] | Iterable[tuple[str, str]] = ()
) -> list[dict[str, str]]:
    """Returns each worker's environment variables, for workers on these local ports."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return [
        {"TF_CONFIG": json.dumps(config(addresses, index)), **dict(extra)}
        for index in range(len(addresses))
    ]


def config(addresses: list[str], index: int) -> dict[str, Any]:
    """What `TF_CONFIG` says to one of the workers."""
    return {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}


def free_ports(count: int) -> list[int]:
    """Returns `count` different ports that are free on the loopback address."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:  # all bound at once, so that all differ
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def is_taken(address: str) -> bool:
    """Whether somebody listens on this local address."""
    host, port = split(address)
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has ended does not count
        try:
            s.bind((host, port))
        except OSError:
            return True
    return False


def answers(address: str, timeout: float = 2.0) -> bool:
    """Whether a connection to this address can be opened."""
    try:
        with socket.create_connection(split(address), timeout):
            return True
    except OSError:
        return False


def split(address: str) -> tuple[str, int]:
    """Host (an IPv6 address without brackets) and port; port 0 if there is none."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else 0


def is_address(text: str) -> bool:
    """Whether this is HOST:PORT, an IPv6 address in brackets."""
    host, _, port = text.rpartition(":")
    in_brackets = host.startswith("[") and host.endswith("]")
    return bool(host.strip("[]")) and port.isdigit() and (in_brackets or ":" not in host)


def members(tf_config: str) -> tuple[tuple[str, int], dict[tuple[str, int], str]]:
    """This task and the addresses of all tasks, from `TF_CONFIG`."""
    given = json.loads(tf_config)
    task = given.get("task") or {}
    cluster = given.get("cluster") or {}
    addresses = {(k, i): str(a) for k, those in cluster.items() for i, a in enumerate(those)}
    return (task.get("type", "worker"), task.get("index", 0)), addresses


def without_proxy(addresses: Iterable[str]) -> dict[str, str]:
    """Environment variables that keep a proxy from between these addresses, and only these.

    gRPC sends even what goes to the loopback address through `http_proxy`, which then waits
    for ever. It reads `no_grpc_proxy` or else `no_proxy`, and knows no "*".
    """
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return {}
    hosts: list[str] = []
    for host in (split(address)[0] for address in addresses):
        hosts += [host, f"[{host}]"] if ":" in host else [host]
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""

    def add(given: str) -> str:
        return ",".join(dict.fromkeys([*filter(None, given.split(",")), *hosts]))

    own = os.environ.get("no_grpc_proxy")  # noqa: SIM112
    made = {"no_grpc_proxy": add(own or before)}
    if before != "*":
        made |= {"no_proxy": add(before), "NO_PROXY": add(before)}
    return made


def slurm_config() -> dict[str, Any]:
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
