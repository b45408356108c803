"""The launcher: arguments to environments, then real processes that end, fail and are ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tf_blockmomentum import launch

COMMAND = [sys.executable, "-m", "tf_blockmomentum.launch"]


def write(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text("import json, os, signal, sys, time\n" + text)
    return str(script)


def run(*arguments, limit=60):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_environments():
    made = launch.environments([5001, 5002])
    assert [json.loads(e["TF_CONFIG"])["task"]["index"] for e in made] == [0, 1]
    for environment in made:
        cluster = json.loads(environment["TF_CONFIG"])["cluster"]
        assert cluster == {"worker": ["127.0.0.1:5001", "127.0.0.1:5002"]}


def test_free_ports_differ_and_are_free():
    ports = launch.free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        with socket.socket() as s:
            s.bind(("127.0.0.1", port))


def test_output_arguments_and_config_of_every_worker(tmp_path):
    script = write(
        tmp_path,
        """
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]
print("args", sys.argv[1:], len(config["cluster"]["worker"]))
print("oops", index, file=sys.stderr)
""",
    )
    done = run("--workers", 3, script, "--epochs", "2", "--workers", "9")
    assert done.returncode == 0
    for index in range(3):
        assert f"[worker {index}] args ['--epochs', '2', '--workers', '9'] 3\n" in done.stdout
        assert f"[worker {index}] oops {index}\n" in done.stderr


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("sys.exit(7)", 7, "exit status 7"),
        ("raise KeyError('lost')", 1, "exit status 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
    ],
)
def test_the_first_failure_ends_the_others(tmp_path, how, status, said):
    """The other worker would sleep for an hour, deaf to SIGTERM as TensorFlow can be, and has
    a child of its own."""
    script = write(
        tmp_path,
        f"""
import subprocess
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
ready = {str(tmp_path / "ready")!r}
if index == 1:
    while not os.path.exists(ready):
        time.sleep(0.02)
    {how}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
with open(ready + ".tmp", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
os.rename(ready + ".tmp", ready)
time.sleep(3600)
""",
    )
    begin = time.monotonic()
    done = run("--workers", 2, script)
    assert done.returncode == status
    assert f"worker 1 failed with {said}" in done.stderr
    assert time.monotonic() - begin < 30
    pids = [int(pid) for pid in (tmp_path / "ready").read_text().split()]
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_all(tmp_path, sig):
    script = write(
        tmp_path,
        f"""
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
signal.signal(signal.SIGTERM, signal.SIG_IGN)
path = os.path.join({str(tmp_path)!r}, f"pid{{index}}")
with open(path + ".tmp", "w") as file:
    file.write(str(os.getpid()))
os.rename(path + ".tmp", path)
time.sleep(3600)
""",
    )
    launcher = subprocess.Popen([*COMMAND, "--workers", "2", script], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        files = [tmp_path / "pid0", tmp_path / "pid1"]
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.send_signal(sig)
        begin = time.monotonic()
        _, said = launcher.communicate(timeout=20)
        assert time.monotonic() - begin < 5
    finally:
        launcher.kill()
    assert launcher.returncode == 128 + sig
    assert b"interrupted" in said
    assert not any(alive(int(file.read_text())) for file in files)


def test_bad_arguments(tmp_path):
    done = run("--workers", 2, tmp_path / "missing.py")
    assert done.returncode == 2
    assert "there is no script to run. Received: " in done.stderr
    assert "missing.py" in done.stderr
    done = run("--workers", 0, write(tmp_path, ""))
    assert done.returncode == 2
    assert "--workers must be at least 1. Received: 0." in done.stderr


def test_both_commands_and_neither_imports_tensorflow(tmp_path):
    """The workers need seconds for TensorFlow; the launcher starts them at once."""
    script = write(tmp_path, "print('ok')")
    console = os.path.join(os.path.dirname(sys.executable), "tfbm-launch")
    for command in (COMMAND, [console]):
        environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
        done = subprocess.run([*command, "--workers", "1", script], capture_output=True,
                              text=True, timeout=60, check=False, env=environment)  # fmt: skip
        assert done.stdout == "[worker 0] ok\n"
        own = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        assert any("tf_blockmomentum" in line for line in own)
        assert not any("tensorflow" in line for line in own)
