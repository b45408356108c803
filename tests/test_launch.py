"""The launcher: arguments to environments, then real processes that end, fail and are ended."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from launching import COMMAND, PROGRESS, alive, end, run, start, wait_for, write

from tf_blockmomentum import launch

AS_LAUNCHER = "import sys; sys.argv[0] = 'tfbm-launch'\n"  # which needs no TensorFlow


def test_environments():
    made = launch.environments([5001, 5002])
    assert [json.loads(e["TF_CONFIG"])["task"]["index"] for e in made] == [0, 1]
    for own in made:
        cluster = json.loads(own["TF_CONFIG"])["cluster"]
        assert cluster == {"worker": ["127.0.0.1:5001", "127.0.0.1:5002"]}


def test_free_ports_differ_and_are_free():
    ports = launch.free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        with socket.socket() as s:
            s.bind(("127.0.0.1", port))


# -- arguments ------------------------------------------------------------------------------------


def test_what_follows_the_script_is_the_scripts(tmp_path):
    script = write(tmp_path, "print(sys.argv[1:], len(addresses))\nprint(index, file=sys.stderr)")
    given = ["--h", "--", "-1", "", "--workers", "9", "-m", "x", "--output=all", "--help", "--"]
    for own in (["--workers", 2], ["--workers=2", "--output", "all", "--"]):
        done = run(*own, script, *given)
        assert done.returncode == 0, done.stderr
        for index in range(2):
            assert f"[worker {index}] {given} 2\n" in done.stdout
            assert f"[worker {index}] {index}\n" in done.stderr


def test_a_module(tmp_path):
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "data.py").write_text("SIZE = 7")
    (package / "train.py").write_text(
        "import sys\nfrom .data import SIZE\nprint(SIZE, sys.argv[1:])"
    )
    done = run("--workers", 2, "-m", "trainer.train", "-m", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[worker {i}] 7 ['-m', '1']" for i in (0, 1)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--workers", "2", "missing.py"],
            r"no script to run. Received: 'missing.py', which is no",
        ),
        (["--workers", "2"], "no script to run. Give its path, or -m MODULE"),
        (["--workers", "2", "-m"], "no script to run. Give its path, or -m MODULE"),
        (["--workers", "0", __file__], "--workers must be at least 1. Received: 0."),
        (["--worker", "2", __file__], "unrecognized arguments: --worker 2"),
        (["--workers", "2", "--grace", "0", __file__], "--grace must be above 0. Received: 0."),
        (["--workers", "2", "--preempt-signal", "USR9", __file__], "Received: 'USR9'"),
        (["--workers", "2", "--preempt-signal", "KILL", __file__], "can be caught"),
        (["--elastic", "1:2", "--preempt-signal", "USR1", __file__], "such as USR2"),
        (["--workers", "2", "--output", "some", __file__], "invalid choice: 'some'"),
        (["--hosts", "::1:1,b:2", "--index", "0", __file__], "Received: '::1:1,b:2'"),
        (["--slurm", "--threads-per-worker", "2", __file__], "whoever starts the tasks"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, problem):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(SystemExit) as e:
        launch.main(arguments)
    assert e.value.code == 2
    assert problem in capsys.readouterr().err


def test_both_commands_and_neither_imports_tensorflow(tmp_path):
    """The workers need seconds for TensorFlow; the launcher starts them at once."""
    script = write(tmp_path, "print('ok')")
    console = os.path.join(os.path.dirname(sys.executable), "tfbm-launch")
    for command in (COMMAND, [console]):
        process = start("--workers", 1, script, "tf_blockmomentum.launch", command=command,
                        stderr=subprocess.PIPE, env={"PYTHONPROFILEIMPORTTIME": "1"})  # fmt: skip
        out, err = process.communicate(timeout=60)
        assert out == "[worker 0] ok\n"
        own = [line for line in err.splitlines() if line.startswith("import time:")]
        assert any("tf_blockmomentum" in line for line in own)
        assert not any("tensorflow" in line for line in own)


# -- the end --------------------------------------------------------------------------------------


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
if index == 1:
    while not (here / "ready").exists():
        time.sleep(0.02)
    {how}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
(here / "part").write_text(f"{{os.getpid()}} {{child.pid}}")
(here / "part").rename(here / "ready")
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


DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(here / f"part-{index}").write_text(str(os.getpid()))
(here / f"part-{index}").rename(here / f"began-{index}")
time.sleep(3600)
"""
SAVES = """
def save(*_):
    time.sleep(1.5)
    (here / f"saved-{index}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
(here / f"part-{index}").write_text(str(os.getpid()))
(here / f"part-{index}").rename(here / f"began-{index}")
time.sleep(3600)
"""


def began(folder, count=2):
    """Waits until the workers have begun; returns their process ids."""
    files = [folder / f"began-{i}" for i in range(count)]
    wait_for(*files)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_deaf_workers_are_gone_within_the_grace(tmp_path, sig):
    launcher = start("--workers", 2, "--grace", 2, write(tmp_path, DEAF))
    try:
        pids = began(tmp_path)
        launcher.send_signal(sig)
        begin = time.monotonic()
        said = launcher.communicate(timeout=20)[0]
        assert 1 < time.monotonic() - begin < 2.5
    finally:
        end(launcher)
    assert launcher.returncode == 128 + sig
    assert f"interrupted by {sig.name}; ended all workers" in said
    assert "go on with: python" in said
    assert not any(alive(pid) for pid in pids)


def test_workers_that_wait_to_begin_do_not_need_the_grace(tmp_path):
    """TensorFlow hears no SIGTERM then, and there is nothing to save."""
    script = write(tmp_path, PROGRESS + "progress.note(progress.JOINING)\n" + DEAF)
    launcher = start("--workers", 2, script)
    try:
        pids = began(tmp_path)
        begin = time.monotonic()
        launcher.terminate()
        launcher.communicate(timeout=20)
        assert time.monotonic() - begin < 5
    finally:
        end(launcher)
    assert launcher.returncode == 143
    assert not any(alive(pid) for pid in pids)


def test_a_second_ctrl_c_kills_at_once(tmp_path):
    launcher = start("--workers", 2, write(tmp_path, DEAF))
    try:
        pids = began(tmp_path)
        launcher.send_signal(signal.SIGINT)
        assert (
            "the workers have 30 s to end; Ctrl-C ends them at once"
            in [launcher.stdout.readline() for _ in range(2)][1]
        )
        time.sleep(0.5)
        assert launcher.poll() is None
        begin = time.monotonic()
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=20)
        assert time.monotonic() - begin < 3
    finally:
        end(launcher)
    assert launcher.returncode == 130
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("options", "number", "to", "restarts"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ([], signal.SIGTERM, "launcher", 0),
                ([], signal.SIGTERM, 1, 0),
                (["--preempt-signal", "usr1"], signal.SIGUSR1, "launcher", 0),
            )
        ),
        (["--preempt-signal", "SIGUSR2"], signal.SIGUSR2, 1, 0),
        (["--max-restarts", 3], signal.SIGTERM, "launcher", 0),
        (["--max-restarts", 1], signal.SIGTERM, 1, 1),
    ],
)
def test_preempted(tmp_path, options, number, to, restarts):
    """Whoever is told, all workers are, and have the time that their own handlers take."""
    saves = SAVES if to == "launcher" else SAVES.replace("exit(0)", "exit(143)")
    launcher = start("--workers", 2, *options, write(tmp_path, PROGRESS + saves))
    try:
        pids = began(tmp_path)
        for time_told in range(1 + restarts):
            os.kill(launcher.pid if to == "launcher" else pids[to], number)
            if time_told < restarts:
                wait_for(tmp_path / "saved-0", tmp_path / "saved-1")
                for name in ("saved-0", "saved-1", "began-0", "began-1"):
                    (tmp_path / name).unlink()
                pids = began(tmp_path)
        said = launcher.communicate(timeout=20)[0]
    finally:
        end(launcher)
    assert launcher.returncode == 143, said
    assert said.count("tfbm-launch: restart") == restarts
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(("ignored", "status"), [(True, 0), (False, 128 + signal.SIGHUP)])
def test_a_terminal_that_closes(tmp_path, ignored, status):
    """What nohup asks to ignore stays ignored."""
    script = write(
        tmp_path,
        "(here / f'part-{index}').write_text('0')\n"
        "(here / f'part-{index}').rename(here / f'began-{index}')\n"
        "time.sleep(1)\n(here / 'done').touch()",
    )
    nohup = ["nohup"] if ignored else []
    launcher = start("--workers", 2, script, command=[*nohup, *COMMAND])
    try:
        began(tmp_path)
        launcher.send_signal(signal.SIGHUP)
        said = launcher.communicate(timeout=20)[0]
    finally:
        end(launcher)
    assert launcher.returncode == status, said
    assert (tmp_path / "done").exists() == ignored


@pytest.mark.timeout(120)
def test_sigterm_under_tensorflow(tmp_path):
    """TensorFlow's cluster puts its own handler, which ends nothing, in place of the script's."""
    script = write(
        tmp_path,
        """
import tf_blockmomentum as tfbm

def save(*_):
    (here / "saved").touch()
    sys.exit(0)

if index == 0:
    signal.signal(signal.SIGTERM, save)
tfbm.MultiWorkerBlockStrategy()
(here / f"began-{index}").write_text(str(os.getpid()))
time.sleep(3600)
""",
    )
    # A script may name the launcher, and is not taken for it.
    launcher = start("--workers", 2, script, "-m", "tf_blockmomentum.launch")
    try:
        wait_for(tmp_path / "began-0", tmp_path / "began-1", limit=60)
        begin = time.monotonic()
        launcher.terminate()
        launcher.communicate(timeout=40)
    finally:
        end(launcher)
    assert launcher.returncode == 143
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - begin < 10


def test_restarts_are_renewed_by_progress(tmp_path):
    """Three failures, one restart: each start made progress for longer than is asked."""
    script = write(
        tmp_path,
        PROGRESS
        + """
with open(here / "starts", "a") as file:
    file.write("x")
count = len((here / "starts").read_text())
for _ in range(8 if count < 4 else 0):
    progress.note("ended a block")
    time.sleep(0.1)
sys.exit(3 if count < 4 or sys.argv[1] == "always" else 0)
""",
    )
    code = AS_LAUNCHER + (
        "from tf_blockmomentum.launch import Launcher, environments, free_ports\n"
        "job = Launcher([sys.executable, *sys.argv[1:]], max_restarts=1, renew_seconds=0.5)\n"
        "sys.exit(job.run(lambda count: environments(free_ports(count))))"
    )
    command = [sys.executable, "-c", code, script]
    for how, status, starts in (("sometimes", 0, 4), ("always", 3, 2)):
        process = start(how, command=command)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == status, said
        assert said.count("restart 1 of 1") == (3 if how == "sometimes" else 1)
        assert "restart 2" not in said
        assert len((tmp_path / "starts").read_text()) == starts + (4 if how == "always" else 0)


# -- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        (["--workers", 1], {}, [None] * 3),
        (["--workers", 1], {"http_proxy": "http://a:1"}, ["127.0.0.1"] * 3),
        (
            ["--workers", 1],
            {"all_proxy": "http://a:1", "NO_PROXY": "x.org"},
            ["x.org,127.0.0.1"] * 3,
        ),
        (
            ["--hosts", "host-a:1,[fd00::2]:1", "--index", 0],
            {"https_proxy": "http://a:1", "no_proxy": "host-a", "no_grpc_proxy": "y"},
            ["y,host-a,fd00::2,[fd00::2]", *["host-a,fd00::2,[fd00::2]"] * 2],
        ),
        (
            ["--workers", 1],
            {"http_proxy": "http://a:1", "no_proxy": "*"},
            ["*,127.0.0.1", "*", None],
        ),
    ],
)
def test_no_proxy_comes_between_workers(tmp_path, options, given, expected):
    names = ["no_grpc_proxy", "no_proxy", "NO_PROXY"]
    script = write(tmp_path, f"print(json.dumps([os.environ.get(n) for n in {names}]))")
    done = run("--output", "first", *options, script, env=given)
    assert json.loads(done.stdout) == expected


@pytest.mark.timeout(120)
def test_two_hosts_by_ipv6_behind_a_proxy(tmp_path):
    """Real workers under two launchers, which are two machines but for the address."""
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    script = write(
        tmp_path,
        "import tf_blockmomentum as tfbm\n"
        "print('replicas', tfbm.MultiWorkerBlockStrategy().num_replicas_in_sync)",
    )
    hosts = ",".join(f"[::1]:{port}" for port in launch.free_ports(2))
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    jobs = [start("--hosts", hosts, "--index", i, script, env=proxy) for i in range(2)]
    try:
        for i, job in enumerate(jobs):
            said = job.communicate(timeout=60)[0]
            assert job.returncode == 0, said
            assert f"[worker {i}] replicas 2" in said
    finally:
        for job in jobs:
            end(job)


def test_a_port_that_was_taken_costs_no_restart(tmp_path):
    """Another program has worker 1's port by the time that this wants it."""
    script = write(
        tmp_path,
        """
import socket, subprocess
port = int(addresses[1].rpartition(":")[2])
thief = (
    f"import socket, time; s = socket.socket(); s.bind(('127.0.0.1', {port})); s.listen();"
    "print(flush=True); time.sleep(20)"
)
first = not (here / "thief").exists()
if index == 0:
    (here / "began").touch()
    time.sleep(60 if first else 0)
elif first:
    while not (here / "began").exists():
        time.sleep(0.02)
    other = subprocess.Popen(
        [sys.executable, "-c", thief], stdout=subprocess.PIPE, start_new_session=True
    )
    other.stdout.readline()
    (here / "thief").write_text(str(other.pid))
    with socket.socket() as s:
        s.bind(("127.0.0.1", port))
print("ended well")
""",
    )
    try:
        done = run("--workers", 2, script)
    finally:
        os.kill(int((tmp_path / "thief").read_text()), signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    assert "Address already in use" in done.stderr
    assert re.search(r"127.0.0.1:\d+ was taken meanwhile; choosing other ports", done.stderr)
    assert done.stdout.count("ended well") == 2
    assert "restart" not in done.stderr


def test_who_is_waited_for(tmp_path):
    """Half a minute is made a second here; worker 2 has ended, the host `gone` is not there."""
    script = write(
        tmp_path,
        PROGRESS
        + """
if index == 1:
    progress.note("ended a block")
if index != 2:
    progress.note(["waits in a boundary", "writes a backup"][index])
    time.sleep(3)
""",
    )
    code = AS_LAUNCHER + (
        "from tf_blockmomentum.launch import main, patience\n"
        "patience.WAIT_SECONDS = 1.0; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code]
    process = start("--workers", 3, script, command=command)
    said = process.communicate(timeout=30)[0]
    found = re.findall(
        r"worker 0 waited for 1 s for worker 1 \((\S+)\), whose last word is: (.*)", said
    )
    assert len(found) == 1, said
    assert found[0][1].startswith("writes a backup; worker 2 (127.0.0.1:")
    assert found[0][1].endswith("), which has ended")

    here, gone = (f"127.0.0.1:{port}" for port in launch.free_ports(2))
    process = start("--hosts", f"{here},{gone}", "--index", 0, script, command=command)
    said = process.communicate(timeout=30)[0]
    assert f"worker 0 waited for 1 s for worker 1 ({gone}), which does not answer\n" in said
