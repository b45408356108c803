"""Where the workers are: on a terminal's last line, and for whoever asks with `--status`."""

import os
import re
import signal
import subprocess
import time

import pytest
from launching import COMMAND, PROGRESS, end, environment, run, run_in_terminal, start, wait_for
from launching import write as write_script

TERMINAL = {"TERM": "xterm"}
# Worker 1 is late for the second block, of which worker 0 has a half-drawn bar on the screen.
LATE = """
print("begins", flush=True)
for epoch in (1, 2):
    progress.note_epoch(epoch, 2)
    sys.stdout.write(f"\\rbar of {epoch}")
    sys.stdout.flush()
    if index == 1 and epoch == 2:
        time.sleep(3.5)
    progress.note("waits in a boundary")
    if index == 0 and epoch == 2:
        time.sleep(3.5)
    progress.note_block(lambda: 40 + epoch)
sys.stdout.write("\\rdone    \\n")
sys.stdout.flush()
time.sleep(2.8)
"""
DOWN, BACK = "\x1b7\x1b[B", "\x1b8"
SHOWN = "\r\x1b[2m{}\x1b[0m\x1b[K"
ERASED = "\r\x1b[2K"


def write(tmp_path, text):
    return write_script(tmp_path, PROGRESS + text)


def status(*arguments, **env):
    command = [*COMMAND, "--status", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(**env), capture_output=True, text=True, timeout=30, check=False
    )


def test_the_line_on_a_silent_terminal(tmp_path):
    """Below a bar that has stopped, and gone without a trace when the bar goes on."""
    code, seen = run_in_terminal("--workers", 2, write(tmp_path, LATE), env=TERMINAL)
    assert code == 0
    text = seen.decode().replace("\r\n", "\n").partition("\n")[2]
    line = re.compile(
        r"(\x1bD\x1b\[A)?(\x1b7\x1b\[B|)\r\x1b\[2m([^\x1b]*)\x1b\[0m\x1b\[K(\x1b8|\r)"
    )
    lines = line.findall(text)
    assert all((down == DOWN) == (back == BACK) for _, down, _, back in lines)
    below = [said for _, down, said, _ in lines if down]
    assert len(below) >= 2
    assert [bool(opened) for opened, down, _, _ in lines if down] == [True] + [False] * (
        len(below) - 1
    )
    for said in below:
        assert re.fullmatch(
            r"epoch 2/2, block 41 \| 0: waits in a boundary( \(\d\.\d s\))? "
            r"\| 1: began epoch 2( \(\d\.\d s\))?",
            said,
        ), said
    last = [said for _, down, said, _ in lines if not down]
    assert re.fullmatch(r"epoch 2/2, block 42, 3\.\d s a block \| all: trains.*", last[-1])
    # What is left is what worker 0 wrote, with the line taken away where it went on.
    left = line.sub("", text)
    bars = f"begins\n\rbar of 1\rbar of 2{DOWN}{ERASED}{BACK}\rdone    \n{ERASED}\r"
    assert left == bars


@pytest.mark.parametrize(
    ("env", "popen"),
    [
        ({"TERM": "dumb"}, {}),
        pytest.param(TERMINAL, {"stderr": subprocess.DEVNULL}, marks=pytest.mark.slow),
    ],
)
def test_no_line_where_it_cannot_be(tmp_path, env, popen):
    script = write(tmp_path, "print('begins')\ntime.sleep(2.8)")
    code, seen = run_in_terminal("--workers", 2, script, env=env, **popen)
    assert code == 0
    assert seen.decode().replace("\r\n", "\n").endswith("begins\n")
    assert b"\x1b" not in seen


def test_status_of_a_job(tmp_path):
    """A table for whoever asks: by process id, by log directory, or all; from any folder."""
    script = write(
        tmp_path,
        """
progress.note_epoch(3, 10)
for i in range(4 if index < 2 else 0):
    time.sleep(0.2 if index else 0.05)
    progress.note("waits in a boundary")
    time.sleep(0.15 * (1 - index))
    progress.note_block(lambda: 410 + i)
if index == 0:
    progress.note("writes a backup")
(here / f"began-{index}").touch()
time.sleep(60 if index < 2 else 0)
""",
    )
    env = {"TMPDIR": str(tmp_path)}
    options = ["--workers", 3, "--log-dir", tmp_path / "logs"]
    launcher = start(*options, script, "a b", env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(*(tmp_path / f"began-{i}" for i in range(3)))
        time.sleep(0.3)  # worker 2 has ended
        shown = status(**env)
        assert shown.returncode == 0, shown.stderr
        head, since, titles, *rows = shown.stdout.splitlines()
        assert re.fullmatch(rf"job {launcher.pid}: python\S* -m .* {script} 'a b'", head)
        pattern = r"started \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, \d+\.\d s ago; output in "
        assert re.fullmatch(pattern + re.escape(str(tmp_path / "logs")), since)
        assert titles.split("  ")[-1] == "last word"
        first = r" +0 +3/10 +413 +0\.2\d\d +[67]\d %  writes a backup, \d\.\d s ago"
        assert re.fullmatch(first, rows[0]), rows
        assert re.fullmatch(r" +1 +3/10 +413 +0\.2\d\d +[0-9] %  ended a block, .*", rows[1])
        assert re.fullmatch(r" +2 +- +- +- +-  has ended", rows[2])

        for which in (launcher.pid, tmp_path / "logs"):
            assert status(which, **env).stdout.splitlines()[0] == head
        wrong = status(1, **env)
        assert wrong.returncode == 1
        assert f"Received: '1'. Launchers in {tmp_path}" in wrong.stderr
        assert wrong.stderr.endswith(f": {launcher.pid}.\n")
        elsewhere = status(TMPDIR=str(tmp_path / "logs"))
        assert elsewhere.returncode == 1
        assert "no job of yours runs on this machine" in elsewhere.stderr

        os.kill(launcher.pid, signal.SIGKILL)  # its folder stays
        launcher.wait()
        assert status(**env).returncode == 1
    finally:
        end(launcher)


def test_status_of_one_host_of_several(tmp_path):
    script = write(tmp_path, "(here / f'began-{index}').touch()\ntime.sleep(60)")
    env = {"TMPDIR": str(tmp_path)}
    options = ["--hosts", "a:1,127.0.0.1:2", "--index", 1]
    launcher = start(*options, script, env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "began-1")
        lines = status(**env).stdout.splitlines()
    finally:
        end(launcher)
    assert lines[1].endswith(" ago; 1 of its 2 workers are on this machine")
    assert re.fullmatch(r" +1 +- +- +- +-  starting, \d\.\d s ago", lines[-1])


def test_status_stands_alone(tmp_path):
    for arguments in (["--workers", 2, "--status"], ["--status", "1", "script.py"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert "--status stands alone" in done.stderr
