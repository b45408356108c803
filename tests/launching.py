"""What the launcher's tests share: scripts that need no TensorFlow, and processes that end."""

import contextlib
import fcntl
import functools
import os
import pathlib
import pty
import select
import subprocess
import sys
import termios
import time

ROOT = pathlib.Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "tf_blockmomentum.launch"]
# The module alone, without TensorFlow, as `import tf_blockmomentum` would install it.
PROGRESS = f"""
sys.path.insert(0, {str(ROOT / "tf_blockmomentum")!r})
import progress
progress.install()
"""
HEAD = """
import json, os, pathlib, signal, sys, time
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]
addresses = config["cluster"]["worker"]
here = pathlib.Path(__file__).parent
"""
_SET = ("TF_NUM_", "OMP_NUM_", "TF_CPP_", "CUDA_VISIBLE", "TF_CONFIG")


def environment(**given):
    """This process's environment without what the launcher looks at, and `given`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_SET)}
    own = {name: value for name, value in own.items() if not name.lower().endswith("_proxy")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**own, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **given}


def write(folder, text, name="script.py", head=HEAD):
    """Writes a worker's script; returns its path."""
    script = folder / name
    script.write_text(head + text)
    return str(script)


def start(*arguments, command=COMMAND, env=None, **popen):
    """Starts the launcher, its stderr with its stdout."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    own = environment(**(env or {}))
    return subprocess.Popen([*command, *map(str, arguments)], env=own, **{**streams, **popen})


def run(*arguments, limit=60, **popen):
    """Runs the launcher to its end; returns its status and streams, apart."""
    process = start(*arguments, **{"stderr": subprocess.PIPE, **popen})
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_in_terminal(*arguments, limit=60, env=None, **popen):
    """Runs the launcher on a terminal of its own, without a line of the launcher's unless `env`
    has a TERM; returns its status and what came on the screen, raw."""
    screen, own = pty.openpty()
    termios.tcsetwinsize(own, (24, 100))
    streams = {"stdin": own, "stdout": own, "stderr": own, "text": False, **popen}
    take = functools.partial(fcntl.ioctl, own, termios.TIOCSCTTY, 0)
    env = {"TERM": "dumb", **(env or {})}
    process = start(*arguments, env=env, start_new_session=True, preexec_fn=take, **streams)
    os.close(own)
    seen, deadline = b"", time.monotonic() + limit
    try:
        while time.monotonic() < deadline:
            if select.select([screen], [], [], 0.1)[0]:
                try:
                    data = os.read(screen, 1 << 16)
                except OSError:  # the last process has closed it
                    break
                if not data:
                    break
                seen += data
        return process.wait(timeout=5), seen
    finally:
        end(process)
        os.close(screen)


def end(process):
    """Ends a launcher, which ends its workers, unless it has ended."""
    for action in (process.terminate, process.kill):
        if process.poll() is None:
            action()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=35)


def wait_for(*files, limit=30):
    """Waits until workers have made these files."""
    deadline = time.monotonic() + limit
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"missing: {[f.name for f in files if not f.exists()]}"
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
