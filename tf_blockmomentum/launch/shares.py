"""What each worker of one machine gets: its share of the cores and of the GPUs.

Left alone, every TensorFlow process starts threads for all cores and takes all GPUs.
"""

import functools
import os
import re
import subprocess

from tf_blockmomentum import process

# Intra-op, inter-op, and what NumPy's BLAS and other OpenMP libraries go by.
THREADS = ("TF_NUM_INTRAOP_THREADS", process.INTEROP, "OMP_NUM_THREADS")
VISIBLE = "CUDA_VISIBLE_DEVICES"
GROWTH = "TF_FORCE_GPU_ALLOW_GROWTH"


def share_out(
    workers: int, threads: int | None = None, gpus_per_worker: int | None = None
) -> tuple[list[dict[str, str]], str]:
    """Shares this machine's cores and GPUs out.

    Args:
        workers: how many.
        threads: of each worker; None: cores divided by workers, at least one.
        gpus_per_worker: None: GPUs divided by workers; 0: none.

    Returns:
        Environment variables of each worker, without those the user has set, and a line that
        says who got what ("" for one worker that gets everything, as it would anyway).

    Raises:
        ValueError: there are fewer GPUs than are needed.
    """
    own_gpus, left = _split(_gpus(gpus_per_worker), workers, gpus_per_worker)
    if workers == 1 and threads is None and gpus_per_worker is None:
        return [{}], ""
    available = cores()
    each = threads or max(1, available // workers)
    wanted = dict.fromkeys(THREADS, str(each))
    # Messages do not wait for steps; and each GPU of a worker is a replica, which may block a
    # thread while it waits for another.
    wanted[process.INTEROP] = str(max(each, process.LEAST_INTEROP, len(own_gpus[0])))
    given = [f"{name}={os.environ[name]}" for name in THREADS if name in os.environ]
    common = {name: value for name, value in wanted.items() if name not in os.environ}
    says_threads = bool(common)
    common |= process.memory_settings(os.environ, each)
    said = f"{_count(workers, 'worker')} on {_count(available, 'core')}"
    if says_threads:
        said += f", {_count(each, 'thread')} each"
    if given:
        said += f" (as you set: {', '.join(given)})"
    if own_gpus[0]:
        said += "; GPUs " + " | ".join(",".join(own) for own in own_gpus)
        said += f" ({_count(left, 'GPU')} left over)" if left else ""
        if GROWTH not in os.environ:
            common[GROWTH] = "true"
    elif gpus_per_worker == 0:
        said += "; no GPUs"
    shared = [dict(common) for _ in range(workers)]
    for environment, own in zip(shared, own_gpus, strict=True):
        if own or gpus_per_worker == 0:
            environment[VISIBLE] = ",".join(own) or "-1"
    return shared, said


def cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota rounded up."""
    count, quota = process.schedulable_cores(), _quota()
    return max(1, min(count, -(-quota[0] // quota[1]))) if quota else count


def _quota() -> tuple[int, int] | None:
    """The smallest limit of processor time of the control groups around this process, as
    microseconds in every so many; None: there is none."""
    files: list[tuple[str, ...]] = [
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    ]
    inside = next(
        (line[3:] for line in _read("/proc/self/cgroup").splitlines() if line[:3] == "0::"), "/"
    )
    while True:  # of this group and of those that it is in
        files.append((f"/sys/fs/cgroup{inside.rstrip('/')}/cpu.max",))
        if inside in ("", "/"):
            break
        inside = os.path.dirname(inside)
    found = [re.findall(r"-?\d+", " ".join(_read(path) for path in paths)) for paths in files]
    quotas = [(int(pair[0]), int(pair[1])) for pair in found if len(pair) == 2]  # not "max"
    return min((q for q in quotas if min(q) > 0), key=lambda q: q[0] / q[1], default=None)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _gpus(gpus_per_worker: int | None) -> list[str]:
    """The GPUs there are to share, by the names that CUDA takes."""
    if gpus_per_worker == 0:
        return []
    given = os.environ.get(VISIBLE)
    if given is None:
        return list(_found_gpus())
    names = [name.strip() for name in given.split(",")]
    # As CUDA reads it: what follows the first one that is none does not count.
    end = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return names[:end]


@functools.cache
def _found_gpus() -> tuple[str, ...]:
    """Numbers of the GPUs, or names of their MIG instances, as nvidia-smi lists them."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if done.returncode:
        return ()
    instances = re.findall(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)", done.stdout, flags=re.M)
    return tuple(instances or re.findall(r"^GPU (\d+):", done.stdout, flags=re.M))


def _split(gpus: list[str], workers: int, each: int | None) -> tuple[list[list[str]], int]:
    """Each worker's GPUs, in order, and how many are left over."""
    if each is None:
        if not gpus:
            return [[]] * workers, 0
        each = len(gpus) // workers
        problem = each == 0
    else:
        problem = each * workers > len(gpus)
    if problem:
        raise ValueError(
            f"{_count(workers, 'worker')} with {_count(max(each, 1), 'GPU')} each need "
            f"{max(each, 1) * workers}. Received: {_count(len(gpus), 'GPU')}"
            f"{' (' + ','.join(gpus) + ')' if gpus else ''}, "
            f"{VISIBLE}={os.environ.get(VISIBLE, 'not set')}. Start fewer workers, as in "
            f"--workers {max(1, len(gpus) // max(each, 1))}, or train on the cores: "
            "--gpus-per-worker 0."
        )
    return [gpus[i * each : (i + 1) * each] for i in range(workers)], len(gpus) - each * workers


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
