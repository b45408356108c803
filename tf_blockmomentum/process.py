"""What a process is told before TensorFlow has threads: to keep memory, and how many of them.

Under a strategy TensorFlow's steps on a CPU free and allocate the same large buffers again and
again on threads of its own. glibc returns such memory to the system at once, and every step pays
for fresh pages: up to a quarter of a step of ResNet50. One arena that keeps what it has pays once.

A process with one core gets one inter-op thread, on which all operations run in turn: what arrives
from other workers waits until the operation of a local step is over, some milliseconds for each
message, and the link waits too. A second thread lets it through (docs/measured.md: by how much).
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping

# Its options, from <malloc.h>, with the variables that set the same in the environment.
_SETTINGS = {
    "MALLOC_ARENA_MAX": (-8, 1),  # other arenas unmap whole heaps, whatever the thresholds say
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),  # the largest that all versions of glibc accept
    "MALLOC_TRIM_THRESHOLD_": (-1, (1 << 31) - 1),
    "MALLOC_TOP_PAD_": (-2, 64 << 20),
}
_MOST_CORES = 8  # threads of more would wait for one another
INTEROP = "TF_NUM_INTEROP_THREADS"
LEAST_INTEROP = 2  # one for steps, and one for messages


def memory_settings(environment: Mapping[str, str], cores: int) -> dict[str, str]:
    """What a new process may be told in its environment; nothing if that says something of
    malloc already (or brings another one), or for many cores."""
    told = any(name in environment for name in (*_SETTINGS, "GLIBC_TUNABLES", "LD_PRELOAD"))
    if told or cores > _MOST_CORES or not sys.platform.startswith("linux"):
        return {}
    return {name: str(value) for name, (_, value) in _SETTINGS.items()}


def keep_memory() -> None:
    """The same for this process, from now on."""
    if not memory_settings(os.environ, schedulable_cores()):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for option, value in _SETTINGS.values():
            mallopt(option, value)


def let_messages_through() -> None:
    """At least two inter-op threads, unless the user has said how many."""
    from tensorflow.config import threading  # not above: the launcher has no use for it

    said = INTEROP in os.environ or threading.get_inter_op_parallelism_threads()
    if said or schedulable_cores() > 1:
        return
    with contextlib.suppress(RuntimeError):  # TensorFlow has its threads already
        threading.set_inter_op_parallelism_threads(LEAST_INTEROP)


def schedulable_cores() -> int:
    """Those that this process may use by its affinity, as TensorFlow counts them too."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
