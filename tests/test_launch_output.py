"""What comes on the screen and into files, from real workers."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import COMMAND, PROGRESS, environment, run, run_in_terminal, write

BAR = r"""
colour, end = "\x1b[32m", "\x1b[0m"
print("is a terminal:", sys.stdout.isatty(), flush=True)
for i in range(3):
    time.sleep(0.1)
    sys.stdout.write(f"\r{colour}{'=' * i}{end} {i} of {index}")
    sys.stdout.flush()
print()
print("err", index, file=sys.stderr)
"""
SHOWN = "".join(f"\r\x1b[32m{'=' * i}\x1b[0m {i} of 0" for i in range(3)) + "\n"


def logs_named(text):
    return [Path(p) for p in re.findall(r"/\S*tfbm-launch-\w+/worker-\d\.log", text)]


def test_the_first_workers_output_is_as_it_writes_it(tmp_path):
    done = run("--workers", 2, "--output", "first", "--log-dir", tmp_path, write(tmp_path, BAR))
    assert done.returncode == 0
    assert done.stdout == "is a terminal: False\n" + SHOWN.replace("\r", "\n")  # text=True
    assert [line for line in done.stderr.splitlines() if not line.startswith("tfbm")] == ["err 0"]
    for index in range(2):
        log = (tmp_path / f"worker-{index}.log").read_bytes().decode()
        assert SHOWN.replace("of 0", f"of {index}") in log  # carriage returns too
        assert f"err {index}\n" in log


def test_a_terminal_gets_a_bar_that_moves(tmp_path):
    """On a terminal "first" is the default, and worker 0 sees one."""
    status, seen = run_in_terminal("--workers", 2, write(tmp_path, BAR))
    assert status == 0
    text = seen.decode().replace("\r\n", "\n")
    line = r"tfbm-launch: 2 workers on \d+ cores?, \d+ threads? each\n"
    assert re.fullmatch(rf"{line}is a terminal: True\n{re.escape(SHOWN)}err 0\n", text), text


def test_all_is_one_line_for_a_line(tmp_path):
    done = run("--workers", 2, write(tmp_path, BAR))  # the default for a pipe
    lines = done.stdout.splitlines()
    for index in range(2):
        own = [line for line in lines if line.startswith(f"[worker {index}] ")]
        # A bar that was drawn anew is a line each time; the carriage return comes first.
        assert [re.sub(r"\x1b\[\d+m", "", line) for line in own] == [
            f"[worker {index}] is a terminal: False",
            *([f"[worker {index}] "] if len(own) == 5 else []),
            *(f"[worker {index}] {'=' * i} {i} of {index}" for i in range(3)),
        ]
    assert sorted(re.findall(r"\[worker \d\] err \d\n", done.stderr)) == [
        "[worker 0] err 0\n",
        "[worker 1] err 1\n",
    ]


FIT = """
import tf_blockmomentum as tfbm
strategy = tfbm.MultiWorkerBlockStrategy()
import keras, subprocess, numpy as np
with strategy.scope():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.01), sync_period=2), "mse")
class Ask(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 8 and optimizer.blocks > 20 and index == 0:
            with open(here / "status", "w") as file:
                command = [sys.executable, "-m", "tf_blockmomentum.launch", "--status"]
                subprocess.run(command, stdout=file)
optimizer = model.optimizer
x = np.ones([320, 3], "float32")
model.fit(x, x[:, :1], batch_size=8, epochs=2, callbacks=[tfbm.BlockTraining(), Ask()])
"""


@pytest.mark.timeout(120)
def test_a_small_fit_is_a_few_lines_and_tells_where_it_is(tmp_path):
    """Epochs of 40 steps over two workers: Keras's bar on one line, and no chatter. What the
    launcher's --status knows of it is asked for in the second."""
    env = {"TMPDIR": str(tmp_path)}
    status, seen = run_in_terminal("--workers", 2, write(tmp_path, FIT), limit=100, env=env)
    text = seen.decode()
    assert status == 0, text
    lines = [line for line in text.split("\n") if line.strip()]
    assert len(lines) <= 6, text
    assert "40/40" in lines[-1]
    assert lines[-1].count("\r") > 2  # it moved
    assert not re.search(r"oneDNN|cuda|absl", text)
    rows = (tmp_path / "status").read_text().splitlines()[-2:]
    for index, row in enumerate(rows):
        # Worker 0 is in its 24th block; worker 1 may wait at its end.
        pattern = rf" +{index} +2/2 +24 +\d+\.\d+ +\d+ %  (ended a block|waits in .*), .* ago"
        assert re.fullmatch(pattern, row), rows


NOISE = r"""
print("WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
      "I0000 00:00:1795675668.196982   24185 cudart_stub.cc:31] Could not find cuda drivers\n"
      "E0000 00:00:1795675672.013081   24185 cuda_platform.cc:52] failed call to cuInit\n"
      "I will stay\nE0000 00:00:1795675672.013081   24185 real.cc:52] an error", file=sys.stderr)
sys.stderr.write("I0000 00:00:1")
sys.stderr.flush()
time.sleep(0.2)
print("795675668.196982 24185 port.cc:31] in two pieces", file=sys.stderr)
sys.stderr.write("In pieces")
sys.stderr.flush()
time.sleep(0.2)
print(" too", os.environ["TF_CPP_MIN_LOG_LEVEL"], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("level", "gone", "left"),
    [
        (None, ["absl", "cudart", "cuInit", "port.cc"], ["an error", "In pieces too 2"]),
        ("1", ["cudart", "cuInit", "port.cc"], ["an error", "In pieces too 1"]),
        ("3", ["cudart", "cuInit", "port.cc", "an error"], ["In pieces too 3"]),
        ("0", [], ["absl", "cudart", "cuInit", "an error", "port.cc", "In pieces too 0"]),
    ],
)
@pytest.mark.parametrize("mode", ["first", "all"])
def test_tensorflows_chatter(tmp_path, level, gone, left, mode):
    env = {} if level is None else {"TF_CPP_MIN_LOG_LEVEL": level}
    done = run("--workers", 1, "--output", mode, write(tmp_path, NOISE), env=env)
    assert done.returncode == 0
    start = "[worker 0] " if mode == "all" else ""
    assert f"{start}I will stay\n" in done.stderr
    for text in gone:
        assert text not in done.stderr
    for text in left:
        assert text in done.stderr


LEAVES = r"""
print("E0000 00:00:1795699098.916157   26604 base_collective_executor.cc:252] BaseCollective"
      "Executor::StartAbort UNAVAILABLE: Failed to send RPC to coordination service.\n"
      "Additional GRPC error information from remote target /job:worker/replica:0/task:0\n"
      ":UNKNOWN:Error received from peer  {grpc_status:14}\nmine", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("how", ["pass", "raise KeyError('gone')", "os._exit(3)"])
def test_that_others_have_left_is_said_to_those_who_fail(tmp_path, how):
    """In TensorFlow's own words, before the traceback; one that ends well has not missed them."""
    done = run("--workers", 1, "--output", "first", write(tmp_path, LEAVES + how))
    said = done.stderr.splitlines()
    found = [text for text in ("StartAbort", "GRPC", "grpc_status") if text in done.stderr]
    assert len(found) == (0 if how == "pass" else 3)
    assert "mine" in said
    if "raise" in how:
        assert said.index("mine") < said.index(
            ":UNKNOWN:Error received from peer  {grpc_status:14}"
        )
        assert done.stderr.index("grpc_status") < done.stderr.index("Traceback")


@pytest.mark.timeout(120)
def test_workers_that_end_at_different_times_end_without_a_word(tmp_path):
    """With the chief last but one, so that one outlives it, and it outlives one."""
    script = write(
        tmp_path,
        "import tf_blockmomentum as tfbm\n"
        "tfbm.MultiWorkerBlockStrategy()\n"
        "time.sleep([2, 0, 4][index])",
    )
    logs = ["--log-dir", tmp_path, "--heartbeat", 1]
    done = run("--workers", 3, *logs, script, limit=100)
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.splitlines()[1:] == []  # the first: what was shared out
    for index in (0, 2):  # TensorFlow did say it
        assert "StartAbort UNAVAILABLE" in (tmp_path / f"worker-{index}.log").read_text()


# -- the end of a failed job ----------------------------------------------------------------------

FAILS = (
    PROGRESS
    + """
class UnavailableError(Exception): pass
def deep():
    raise ValueError("three apples")
if index:
    print("worker 1 began")
    print("a bar", end="", flush=True)  # on a line that is never ended
    time.sleep(0.1)
    deep()
raise UnavailableError("the others are gone")
"""
)


def test_the_end_of_a_failed_job_is_its_reason(tmp_path):
    """Worker 0's output is on the screen, worker 1's in a file; worker 1 is the cause."""
    script = write(tmp_path, FAILS)
    options = ["--workers", 2, "--output", "first", "--max-restarts", 1]
    done = run(*options, script, "--x", "a b", env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 1
    assert "worker 1 began" not in done.stdout + done.stderr
    restart, _, end = done.stderr.partition("restart 1 of 1")
    assert "    | ValueError: three apples\n" in restart  # it was on no screen
    _, block, after = end.split("-" * 72)
    assert after == "\n"  # nothing comes later
    assert re.search(
        rf"worker  1 of 2 on {re.escape(socket.gethostname())} \(127\.0\.0\.1:\d+\)\n", block
    )
    assert "reason  failed with exit status 1 (ValueError: three apples)\n" in block
    assert re.search(r"time    \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, \d s after its start\n", block)
    assert re.search(
        r"\| Traceback .*\n(    \|.*\n)*.* in deep\n(    \|.*\n)*    \| ValueError: three", block
    )
    assert "a bar" not in block
    assert "then    worker 0 failed with exit status 1 (UnavailableError: the others" in block
    typed = f"--workers 2 --output first --max-restarts 1 {script} --x 'a b'\n"
    assert re.search(r"go on   python\S* -m tf_blockmomentum.launch " + re.escape(typed), block)
    logs = logs_named(block)
    assert len(logs) == 2
    assert logs[1].read_text().count("worker 1 began") == 2


def test_temporary_files_are_kept_for_a_failed_job_alone(tmp_path):
    code = "import tempfile, sys; print('ok')\nif sys.argv[1] == 'fail': sys.exit(9)"
    for how, status in (("well", 0), ("fail", 9)):
        env = {"TMPDIR": str(tmp_path)}
        script = write(tmp_path, code)
        assert run("--workers", 2, "--output", "first", script, how, env=env).returncode == status
        assert len(list(tmp_path.glob("tfbm-*/worker-*.log"))) == (2 if status else 0)
        assert len(list(tmp_path.glob("tfbm-*"))) == (1 if status else 0)


@pytest.mark.parametrize(
    ("number", "last"),
    [(9, r"    \| the last one\n"), (11, r"    \| Current thread .*\n    \|   File .*script.py")],
)
def test_a_process_without_a_traceback_shows_its_last_lines(tmp_path, number, last):
    text = "print('line', *range(400))\nprint('the last one')\n"
    text += f"if index: os.kill(os.getpid(), {number})"
    done = run(
        "--workers", 2, "--output", "first", write(tmp_path, text + "\ntime.sleep(60)"),
        env={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 128 + number
    assert f"reason  failed with {signal.Signals(number).name}\n" in done.stderr
    assert re.search(last, done.stderr), done.stderr
    assert max(map(len, done.stderr.splitlines())) < 400


# -- where nothing can be written -----------------------------------------------------------------

TALKS = "for i in range(300):\n    print('x' * 1000, flush=True)\n(here / f'done-{index}').touch()"


def test_a_log_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    done = run("--workers", 2, "--log-dir", tmp_path / "file", write(tmp_path, TALKS))
    assert done.returncode == 0
    assert done.stderr.count("warning: there will be no log of worker") == 2
    assert done.stdout.count("x" * 1000) == 600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_log_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        # Status files, which workers write, are on the full disk too.
        env = {"TMPDIR": str(disk)}
        done = run("--workers", 2, "--log-dir", disk, write(tmp_path, PROGRESS + TALKS), env=env)
        # Either may fill the disk before the other has written anything.
        assert any((disk / f"worker-{i}.log").stat().st_size for i in range(2))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"warning: worker \d's log has gaps.*No space left", done.stderr)) == 2
    assert done.stdout.count("x" * 1000) == 600


def test_a_screen_that_is_gone(tmp_path):
    """`tfbm-launch ... | head -n 1`: the training goes on."""
    command = [*COMMAND, "--workers", "2", write(tmp_path, TALKS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()


if sys.platform != "linux":  # /proc, mount
    pytestmark = pytest.mark.skip("for Linux")
