"""Kill anything, lose nothing: scripted failures of real processes, each proven by a count."""

import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import classifier, crossentropy, dataset, examples, replica_values, scope

import tf_blockmomentum as tfbm
from tf_blockmomentum import launch

HERE = pathlib.Path(__file__).parent


def environment():
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": path}


def processes_with(text):
    """Processes that have `text` on their command line, this one and its parents apart."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if text in line and state != "Z" and "pytest" not in line:
                found.append(line)
    return found


def start(script, *arguments, options=(), **popen):
    command = [sys.executable, "-m", "tf_blockmomentum.launch", *map(str, options)]
    command += [str(script), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), **{**streams, **popen})


def job(out, options=(), limit=240, status=0, **settings):
    """Runs job.py under the launcher (directly without launcher options); returns (what was
    printed, what each worker wrote). No process is left afterwards."""
    out.mkdir(exist_ok=True)
    settings = json.dumps({"out": str(out), "marks": str(out), **settings})
    if options:
        process = start(HERE / "job.py", settings, options=options)
    else:
        command = [sys.executable, str(HERE / "job.py"), settings]
        process = subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        printed, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher then ends its workers
            process.wait(timeout=10)
    assert process.returncode == status, printed[-6000:]
    assert processes_with(str(out)) == []
    results = sorted(out.glob("result-*.json"))
    return printed, [json.loads(result.read_text()) for result in results]


def times_failed(out):
    """How often each failure has happened: a mark has one letter for each time."""
    return [len(mark.read_text()) for mark in sorted(out.glob("failure-*"))]


def same_end(result, other):
    """Every replica's state and the last epoch's logs are the same, to the bit."""
    for key in ("state", "logs", "blocks"):
        assert result[key] == other[key], key


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What two workers come to when nothing happens, validating."""
    out = tmp_path_factory.mktemp("undisturbed")
    return job(out, ["--workers", 2], backup=False, validate=True)[1]


# -- stopped and resumed is never stopped ---------------------------------------------------------


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("options", "process", "fits"),
    [
        pytest.param(
            ["--workers", 2],
            {"compression": "float16"},
            {
                "XLA, 4 steps at once": {
                    "optimizer": "momentum",
                    "jit": True,
                    "steps_per_execution": 4,
                    "every": 1,
                    "stop": 5,
                },
                "overlap, unknown length, int4": {
                    "compression": "int4",
                    "optimizer": "adam",
                    "overlap": 1.0,
                    "known_length": False,
                    "every": 1,
                    "stop": 18,
                },
                # Epochs of 10 steps, K=3: the backup at 7 has deltas that left at 6 and land at 8.
                "overlap, in flight": {
                    "compression": "int8",
                    "overlap": 0.5,
                    "steps_per_execution": 7,
                    "every": 1,
                    "stop": 4,
                },
            },
            marks=pytest.mark.slow,  # over a minute; test_going_on has the like
        ),
        (
            [],
            {"devices": 1},
            {"repeated": {"optimizer": "schedule", "steps_per_epoch": 7, "stop": 16}},
        ),
        pytest.param(
            [],
            {"devices": 3},
            {"every step a block": {"optimizer": "sgd", "epochs": 2, "stop": 14}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two workers", "no strategy", "three devices"],
)
def test_stopped_and_resumed_is_never_stopped(tmp_path, options, process, fits):
    """Stopped in the middle of an epoch, and resumed in new processes."""
    never = {f"never {name}": {**fit, "stop": None, "backup": False} for name, fit in fits.items()}
    _, before = job(tmp_path, options, fits={**never, **fits}, **process)
    again = {name: {**fit, "stop": None} for name, fit in fits.items()}
    printed, results = job(tmp_path, options, fits=again, **process)
    assert printed.count("going on from") == len(fits)
    for result, first in zip(results, before, strict=True):
        for name, fit in fits.items():
            assert first[name] is None  # stopped
            same_end(result[name], first[f"never {name}"])
            # Not from the beginning of the epoch.
            left = first[f"never {name}"]["batches"] - fit["stop"]
            assert left <= result[name]["batches"] < left + 6


# -- failures of processes ------------------------------------------------------------------------


@pytest.mark.slow  # a minute; one that is killed is in test_codes and test_launch too
@pytest.mark.timeout(600)
def test_killed_anywhere(tmp_path, undisturbed):
    failures = [
        {"worker": 1, "how": "kill", "at": "batch", "n": 8},
        {"worker": 1, "how": "kill", "at": "backup"},
        {"worker": 0, "how": "kill", "at": "boundary"},
        {"worker": 1, "how": "kill", "at": "validation"},
        {"worker": 0, "how": "kill", "at": "batch", "n": 17},
        {"worker": 1, "how": "kill", "at": "batch", "n": 17},
        {"worker": 1, "how": "raise", "at": "batch", "n": 20},
    ]
    # One after the other and on the same backups; two of them at once.
    printed, results = job(
        tmp_path,
        ["--workers", 2, "--max-restarts", 7, "--heartbeat", 2, "--log-dir", tmp_path / "log"],
        limit=400,
        validate=True,
        failures=failures,
    )
    assert times_failed(tmp_path) == [1] * len(failures)
    for result, other in zip(results, undisturbed, strict=True):
        same_end(result[""], other[""])
    assert 5 <= printed.count("tfbm-launch: restart") <= 7
    assert printed.count("failed with SIGKILL") >= 5
    assert "worker 1 failed with exit status 1 (RuntimeError: a mistake in the script)" in printed
    assert "does not count: worker-1-of-2.npz is missing or was not finished" in printed
    logs = [(tmp_path / "log" / f"worker-{i}.log").read_text() for i in range(2)]
    assert "RuntimeError: a mistake" in logs[1]
    assert "RuntimeError: a mistake" not in logs[0]


@pytest.mark.slow  # a minute and a half; one that never comes is waited for below
@pytest.mark.timeout(500)
def test_hangs_end(tmp_path, undisturbed):
    failures = [
        {"worker": 1, "how": "sleep", "at": "start", "seconds": 10},  # late, which is no failure
        {"worker": 1, "how": "sleep", "at": "batch", "n": 14},
        {"worker": 0, "how": "stop", "at": "batch", "n": 20},
    ]
    printed, results = job(
        tmp_path,
        ["--workers", 2, "--max-restarts", 2, "--hang-timeout", 25],
        limit=400,
        validate=True,
        failures=failures,
    )
    assert times_failed(tmp_path) == [1, 1, 1]
    for result, other in zip(results, undisturbed, strict=True):
        same_end(result[""], other[""])
    assert "worker 1 is stuck: no progress in 25 s" in printed
    assert "worker 0 is stuck: no progress in 25 s" not in printed.partition("restart 1")[0]
    assert "[worker 1]   File" in printed.partition("Python stack:")[2]
    assert " in fail\n" in printed.partition("Python stack:")[2]
    assert "worker 0 is stopped (SIGSTOP)" in printed or "it is stopped (SIGSTOP)" in printed


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_that_never_comes(tmp_path):
    began = time.monotonic()
    failures = [{"worker": 1, "how": "sleep", "at": "start"}]
    printed, _ = job(
        tmp_path,
        ["--workers", 2, "--hang-timeout", 20],
        status=128 + signal.SIGABRT,
        failures=failures,
    )
    assert time.monotonic() - began < 60
    assert times_failed(tmp_path) == [1]
    assert "worker 1 is stuck: no progress in 20 s, its last word: starting" in printed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_elastic(tmp_path):
    """The third worker always fails; its two fellows go on with the backup of three."""
    failures = [{"worker": 2, "how": "kill", "at": "batch", "n": 8, "always": True}]
    printed, results = job(
        tmp_path,
        ["--elastic", "2:3", "--max-restarts", 3],
        failures=failures,
        every=1,
        epochs=2,
        compression="int8",
    )
    assert times_failed(tmp_path) == [2]
    assert "restart 1 of 3, workers: 3" in printed
    assert "restart 2 of 3, workers: 2" in printed
    assert "of 3 workers (3 replicas) on 2 (2): weights, anchor" in printed
    assert len(results) == 2
    # 8 steps of 3 workers in blocks of 3, of which 2 were dropped, then 12 more.
    assert [r[""]["blocks"] for r in results] == [8, 8]
    assert results[0][""]["logs"] == results[1][""]["logs"]


# -- the launcher alone, with scripts that need no TensorFlow -------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_end_everything(tmp_path, number):
    script = tmp_path / "stubborn.py"
    script.write_text(
        "import signal, sys, time\n"
        f"sys.path.insert(0, {str(HERE.parent / 'tf_blockmomentum')!r})\n"
        "import progress\n"  # the module alone, without TensorFlow
        "progress.install()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(100)\n"
    )
    process = start(script, options=["--workers", 3, "--grace", 3])
    try:
        assert "3 workers on" in process.stdout.readline()
        for _ in range(3):
            assert "ready" in process.stdout.readline()
        began = time.monotonic()
        process.send_signal(number)
        rest = process.communicate(timeout=20)[0]
        while processes_with(str(script)) and time.monotonic() < began + 5:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - began < 5
    assert processes_with(str(script)) == []
    if number != signal.SIGKILL:  # of the launcher: then each worker ends itself
        assert process.returncode == 128 + number
        assert f"interrupted by {number.name}; ended all workers" in rest


@pytest.mark.parametrize(
    ("code", "status", "line"),
    [
        ("raise SystemExit(7)", 7, "worker 1 failed with exit status 7"),
        ("import os; os.kill(os.getpid(), 11)", 139, "worker 1 failed with SIGSEGV"),
    ],
)
def test_reasons_and_restarts(tmp_path, code, status, line):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, time\n"
        "config = json.loads(os.environ['TF_CONFIG'])\n"
        "print('ports', config['cluster']['worker'], flush=True)\n"
        f"if config['task']['index'] == 1:\n    {code}\n"
        "time.sleep(60)\n"
    )
    process = start(script, options=["--workers", 2, "--max-restarts", 2])
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == status
    assert printed.count(line) == 3
    assert "restart 2 of 2, workers: 2" in printed
    ports = {row.partition("ports")[2] for row in printed.splitlines() if "ports" in row}
    assert len(ports) == 3  # new ones each time
    assert processes_with(str(script)) == []


def test_more_workers_when_asked(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, time\n"
        "count = len(json.loads(os.environ['TF_CONFIG'])['cluster']['worker'])\n"
        "print('one of', count, flush=True)\n"
        "time.sleep(0 if count == 3 else 60)\n"
    )
    process = start(script, options=["--elastic", "1:3", "--workers", 2])
    assert "2 workers on" in process.stdout.readline()
    for _ in range(2):
        assert "one of 2" in process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert printed.count("one of 3") == 3


def test_the_cause_comes_first(tmp_path):
    """Worker 0 fails because worker 1 has, at the same moment."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, time\n"
        f"sys.path.insert(0, {str(HERE.parent / 'tf_blockmomentum')!r})\n"
        "import progress\n"
        "progress.install()\n"
        "class UnavailableError(Exception): pass\n"
        "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
        "if index: time.sleep(0.1); raise KeyError('the cause')\n"
        "raise UnavailableError('Graph execution error:\\n\\nCollective ops is aborted by: x')\n"
    )
    process = start(script, options=["--workers", 2])
    printed = process.communicate(timeout=30)[0]
    said = [line for line in printed.splitlines() if line.startswith("tfbm-launch: worker")]
    assert said[0] == "tfbm-launch: worker 1 failed with exit status 1 (KeyError: 'the cause')"
    assert said[1].endswith("(UnavailableError: Collective ops is aborted by: x)")


CONFIG = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}


@pytest.mark.parametrize(
    ("options", "outside", "expected"),
    [
        ([], {"TF_CONFIG": json.dumps(CONFIG)}, CONFIG),
        (["--hosts", "a:1,b:2", "--index", "1"], {}, CONFIG),
        (
            ["--slurm"],
            {
                "SLURM_PROCID": "2",
                "SLURM_STEP_NUM_TASKS": "3",
                "SLURM_STEP_NODELIST": "n[1-2]",
                "SLURM_STEP_TASKS_PER_NODE": "2,1",
            },
            {
                "cluster": {"worker": ["n1:8888", "n1:8889", "n2:8888"]},
                "task": {"type": "worker", "index": 2},
            },
        ),
    ],
)
def test_one_worker_of_several_machines(tmp_path, monkeypatch, capfd, options, outside, expected):
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['TF_CONFIG'], os.environ['TFBM_HEARTBEAT'])\n")
    for name, value in outside.items():
        monkeypatch.setenv(name, value)
    assert launch.main([*options, "--heartbeat", "3", str(script)]) == 0
    printed = capfd.readouterr().out.strip()  # not a terminal's: numbered
    assert printed.startswith(f"[worker {expected['task']['index']}] ")
    config, heartbeat = printed.partition("] ")[2].rsplit(" ", 1)
    assert json.loads(config) == expected
    assert heartbeat == "3.0"


@pytest.mark.parametrize(
    ("options", "outside", "problem"),
    [
        ([], None, "--workers is missing"),
        (["--workers", "0"], None, "--workers must be at least 1. Received: 0."),
        (["--workers", "2"], "{}", "TF_CONFIG is set already"),
        ([], "[]", "TF_CONFIG is not a JSON object. Received: TF_CONFIG='[]'"),
        (["--hosts", "a:1,b"], None, "Received: 'a:1,b'"),
        (["--hosts", "a:1,b:2", "--index", "2"], None, "--index must be from 0 to 1"),
        (["--hosts", "a:1,b:2"], None, "Received: None"),
        (["--workers", "2", "--slurm"], None, "exclude each other"),
        (["--elastic", "3:2"], None, "--elastic takes MIN:MAX"),
        (["--elastic", "2:3", "--workers", "4"], None, "--workers must be within --elastic"),
        (["--workers", "2", "--hang-timeout", "0"], None, "--hang-timeout must be above 0"),
        (["--workers", "2", "--max-restarts", "-1"], None, "--max-restarts must be at least 0"),
    ],
)
def test_wrong_options(monkeypatch, capsys, options, outside, problem):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if outside is not None:
        monkeypatch.setenv("TF_CONFIG", outside)
    with pytest.raises(SystemExit) as e:
        launch.main([*options, __file__])
    assert e.value.code == 2
    assert problem in capsys.readouterr().err


def test_slurm_outside_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(SystemExit, match=r"--slurm works inside a Slurm step. Received: .*SLURM"):
        launch.main(["--slurm", __file__])


# -- damaged backups, in this process -------------------------------------------------------------


def compiled(strategy):
    """A small model with BatchNormalization and dropout, the same at every call."""
    keras.utils.set_random_seed(4)
    with scope(strategy):
        model = classifier(dropout=True)
        inner = keras.optimizers.Adam(0.01)
        model.compile(
            tfbm.BlockMomentum(inner, sync_period=3), crossentropy(), metrics=["accuracy"]
        )
    return model


def fit(strategy, directory, epochs=1, stop_at=None, **settings):
    """A small fit with backups; returns the model."""
    model = compiled(strategy)
    callbacks = [tfbm.BlockTraining(), tfbm.BlockBackup(directory, every=1, **settings)]
    if stop_at:
        callbacks.append(
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: 1 / (batch + 1 != stop_at)
            )
        )
    x, y = examples(96)
    data = dataset(x, y, 12)
    if stop_at:
        with pytest.raises(ZeroDivisionError):
            model.fit(data, epochs=epochs, verbose=0, callbacks=callbacks)
    else:
        model.fit(data, epochs=epochs, verbose=0, callbacks=callbacks)
    return model


def pieces(directory):
    return sorted(pathlib.Path(directory).glob("*/*.npz"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A fit that stopped after two backups, and what one that did not comes to."""
    out = tmp_path_factory.mktemp("one_process")
    fit(None, out / "stopped", stop_at=7)
    return {"stopped": out / "stopped", "weights": fit(None, out / "never").get_weights()}


def same_weights(these, those):
    for w, v in zip(these, those, strict=True):
        np.testing.assert_array_equal(w, v)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "is torn or changed"),
        pytest.param(truncate, "is torn or changed", marks=pytest.mark.slow),
        (lambda path: path.unlink(), "is missing or was not finished"),
        pytest.param(
            lambda path: path.with_suffix(".npz.sha256").unlink(),
            "is missing or was not finished",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bit flip", "truncated", "no piece", "no checksum"],
)
def test_damaged(tmp_path, one_process, damage, reason):
    directory = tmp_path / "stopped"
    shutil.copytree(one_process["stopped"], directory)
    first, last = pieces(directory)
    damage(last)
    text = f"{last.parent.name} does not count: .*{reason}.*Going back to {first.parent.name}"
    with pytest.warns(UserWarning, match=text):
        model = fit(None, directory)
    same_weights(model.get_weights(), one_process["weights"])


def test_all_damaged(tmp_path, one_process):
    shutil.copytree(one_process["stopped"], tmp_path / "stopped")
    for path in pieces(tmp_path / "stopped"):
        flip(path)
    with pytest.warns(UserWarning, match="Going back to the beginning"):
        model = fit(None, tmp_path / "stopped")
    same_weights(model.get_weights(), one_process["weights"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_full_disk(tmp_path, one_process):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        backups = disk / "backups"
        fit(None, backups, stop_at=4)
        assert len(pieces(backups)) == 1
        free = shutil.disk_usage(disk).free
        (disk / "other").write_bytes(b"x" * (free - 4096))
        with pytest.raises(
            OSError, match=r"could not write .*No space left.*last complete backup"
        ):
            fit(None, backups)
        assert len(pieces(backups)) == 1
        assert len(list(backups.iterdir())) == 1
        (disk / "other").unlink()
        model = fit(None, backups, keep=1)
        same_weights(model.get_weights(), one_process["weights"])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_no_pickle(tmp_path):
    """What could run code when it is read is not read."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "epoch-000001-step-000000000" / "worker-0-of-1.npz"
    path.parent.mkdir()
    np.savez(path, meta=np.array([Trap()], dtype=object))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".npz.sha256").write_text(digest)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        fit(None, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_wrong_backup(tmp_path, strategy_of):
    fit(None, tmp_path)
    keras.utils.set_random_seed(4)
    model = classifier(features=5)
    model.compile(
        tfbm.BlockMomentum(keras.optimizers.Adam(0.01)), crossentropy(), metrics=["accuracy"]
    )
    x, y = examples(48, features=5)
    callbacks = [tfbm.BlockTraining(), tfbm.BlockBackup(tmp_path)]
    with pytest.raises(
        ValueError, match=r"of another model. Received: for variable 0 .*\[5, 8\].*\[6, 8\]"
    ):
        model.fit(x, y, verbose=0, callbacks=callbacks)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="BlockBackup needs BlockTraining"):
        model.fit(x, y, verbose=0, callbacks=callbacks[1:])
    with pytest.raises(ValueError, match=r"`every` must be .*Received: every=0"):
        tfbm.BlockBackup(tmp_path, every=0)
    with pytest.raises(ValueError, match=r"`keep` must be at least 1. Received: keep=0"):
        tfbm.BlockBackup(tmp_path, keep=0)


def test_keeps_some(tmp_path):
    fit(None, tmp_path, epochs=3, keep=2)
    names = [path.parent.name for path in pieces(tmp_path)]
    assert names == [
        "epoch-000002-step-000000003",
        "epoch-000002-step-000000006",
        "epoch-000003-step-000000000",
    ]
    assert len(list(tmp_path.iterdir())) == 3


# -- another number of replicas -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (2, 4),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(3, 1, marks=pytest.mark.slow),
    ],
)
def test_other_replicas(tmp_path, strategy_of, before, after, capfd):
    fit(strategy_of(before), tmp_path, stop_at=4)
    saved = np.load(pieces(tmp_path)[-1], allow_pickle=False)
    meta = json.loads(saved["meta"].tobytes())
    strategy = strategy_of(after)
    seen = {}

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if not seen:
                seen["batch"] = batch
                variables = [*self.model.variables, *self.model.optimizer.variables]
                seen["values"] = {v.path: replica_values(v) for v in variables}
                seen["metrics"] = {m.name: m.result().numpy() for m in self.model.metrics[:1]}
                seen["metrics"]["count"] = sum(replica_values(self.model.metrics[0].count))

    model = compiled(strategy)
    x, y = examples(96)
    callbacks = [tfbm.BlockTraining(), Look(), tfbm.BlockBackup(tmp_path, every=1)]
    model.fit(dataset(x, y, 12), verbose=0, callbacks=callbacks)
    printed = capfd.readouterr().err
    assert f"of 1 workers ({before} replicas) on 1 ({after}): weights, anchor" in printed
    assert seen["batch"] == 3
    assert seen["metrics"]["count"] == 3 * 12  # neither lost nor counted twice
    names = [path for path, _, _ in meta["variables"]]
    checked = 0
    for (path, values), i in zip(seen["values"].items(), range(len(names)), strict=False):
        kind = names[i].rsplit("/", 1)[-1]
        if "seed" in path:
            seeds = [value.tolist()[0] for value in values]
            assert len(set(seeds)) == after
            continue
        for replica, value in enumerate(values):
            stored = saved[f"{replica % before}/{i}"]
            np.testing.assert_array_equal(value, stored, err_msg=kind)
            checked += 1
    assert checked > 20 * after


def test_progress_of_callbacks(tmp_path, capfd):
    """EarlyStopping's patience and ReduceLROnPlateau's go on as if never stopped."""

    def run(directory, stop_after=None):
        keras.utils.set_random_seed(4)
        model = classifier()
        model.compile(tfbm.BlockMomentum(keras.optimizers.SGD(0.1), sync_period=3), crossentropy())
        plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=2, min_delta=9)
        early = keras.callbacks.EarlyStopping(
            "loss", patience=5, min_delta=9, restore_best_weights=True
        )
        backup = tfbm.BlockBackup(directory, callbacks=[plateau, early])
        fail = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: 1 / (epoch != stop_after)
        )
        data = dataset(*examples(48))
        history = model.fit(
            data,
            epochs=20,
            verbose=0,
            callbacks=[tfbm.BlockTraining(), plateau, early, fail, backup],
        )
        return history, model

    history, expected = run(tmp_path / "never")
    assert len(history.epoch) == 6
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "stopped", stop_after=3)
    history, model = run(tmp_path / "stopped")
    assert history.epoch == [0, 1, 2, 3, 4, 5]  # those before the stop, too
    assert float(model.optimizer.learning_rate) == float(expected.optimizer.learning_rate) < 0.1
    same_weights(model.get_weights(), expected.get_weights())
    capfd.readouterr()
    history, _ = run(tmp_path / "stopped")  # stopped early it stays
    assert history.epoch == [0, 1, 2, 3, 4, 5]
    assert "this fit has ended already, after 6 epochs" in capfd.readouterr().err


# -- poison ---------------------------------------------------------------------------------------


@pytest.mark.slow  # test_codes has the like
@pytest.mark.timeout(200)
def test_poison_on_workers(tmp_path):
    fits = {"skip": {"on_nonfinite": "skip"}, "raise": {}}
    printed, _ = job(tmp_path, ["--workers", 2], status=1, fits=fits, epochs=1, poison=5)
    text = "A delta is not finite (NaN or infinity) in block 2: replica 1 in variable "
    assert printed.count(f"UserWarning: {text}") == 2  # on both workers
    assert printed.count(f"FloatingPointError: {text}") >= 2
    assert "worker 0 failed with exit status 1 (FloatingPointError" in printed
    assert "worker 1 failed with exit status 1 (FloatingPointError" in printed


@pytest.mark.parametrize(
    ("inner", "overlap", "compression"),
    [
        pytest.param(*case, compression, marks=[pytest.mark.slow] * (compression not in enough))
        for *case, enough in (
            ("sgd", False, [None]),
            ("adam", False, []),
            ("ema", False, ["float16"]),
            ("adam", True, [None, "float16"]),
        )
        for compression in (None, "float16")
    ],
)
def test_poison_is_left_out(strategy_of, monkeypatch, inner, overlap, compression):
    """Replica 1's data is NaN in the second block: its delta is left out of the mean."""
    strategy = strategy_of(2)
    monkeypatch.setattr(strategy, "compression", compression)
    x, y = examples(96)
    x = x.reshape([12, 2, 4, 6])
    x[4, 1, 0] = np.nan  # the fifth batch's second half
    x = x.reshape([96, 6])
    make = {
        "sgd": lambda: keras.optimizers.SGD(0.1),
        "adam": lambda: keras.optimizers.Adam(0.01),
        "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True),
    }[inner]
    anchors = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            anchors.append([replica_values(w) for w in self.model.trainable_variables])

    with scope(strategy):
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
        optimizer = tfbm.BlockMomentum(make(), sync_period=3, block_momentum=0, overlap=overlap)
        model.compile(optimizer, crossentropy())
    training = tfbm.BlockTraining(on_nonfinite="skip")
    with pytest.warns(UserWarning, match="in block 2: replica 1 in variable .*kernel.*Left out"):
        model.fit(dataset(x, y, 8), verbose=0, callbacks=[training, Look()])
    assert training.skipped == 1
    assert model.optimizer.blocks == 4
    assert all(np.isfinite(w).all() for w in model.get_weights())
    for variable in model.optimizer.variables:
        assert all(np.isfinite(value).all() for value in replica_values(variable)), variable.path
    # After five steps replica 1 was NaN; without momentum the anchor is then replica 0 alone.
    assert np.isnan(anchors[4][0][1]).any()
    alone = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
    assert all(np.array_equal(*replicas) for replicas in anchors[11 if overlap else 5])
    assert all(np.isfinite(replicas).all() for replicas in anchors[5])
    assert alone.count_params() == model.count_params()


def test_poison_is_raised(strategy_of):
    strategy = strategy_of(2)
    x, y = examples(48)
    x[:] = np.inf
    for on_nonfinite, overlap, text in [
        ("raise", False, 'Received: on_nonfinite="raise". The anchor is finite'),
        ("skip", False, 'Received: on_nonfinite="skip", and no replica is left'),
        ("raise", True, 'Received: on_nonfinite="raise". The anchor is finite'),
    ]:
        with scope(strategy):
            model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
            optimizer = tfbm.BlockMomentum(
                keras.optimizers.SGD(0.1), sync_period=2, overlap=overlap
            )
            model.compile(optimizer, crossentropy())
        with pytest.raises(FloatingPointError) as e:
            model.fit(
                dataset(x, y, 8),
                verbose=0,
                callbacks=[tfbm.BlockTraining(on_nonfinite=on_nonfinite)],
            )
        assert text in str(e.value)
        assert "replica 0 in variable" in str(e.value)
        assert "replica 1 in variable" in str(e.value)
        if overlap:  # it has gone back to the anchor
            assert all(np.isfinite(w).all() for w in model.get_weights())
    with pytest.raises(ValueError, match=r'"raise" or "skip". Received: on_nonfinite=.warn.'):
        tfbm.BlockTraining(on_nonfinite="warn")


@pytest.mark.timeout(300)
def test_ray(tmp_path):
    """Ray Train starts the workers and sets TF_CONFIG; the second run goes on from the backup."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('ray is not installed; pip install "ray[train]" runs this test')
    command = [sys.executable, HERE.parent / "examples" / "ray_trainer.py", "--folder", tmp_path]
    for run in range(2):
        done = subprocess.run(
            [*map(str, command)],
            env={**environment(), "RAY_TRAIN_V2_ENABLED": "1"},
            capture_output=True,
            text=True,
            timeout=140,
            check=False,
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed[-4000:]
        assert ("going on from" in printed) == (run == 1)
        if run == 0:
            assert "worker 0 of 2: loss" in printed
            assert "worker 1 of 2: loss" in printed
    assert len(list((tmp_path / "backup").glob("*/worker-1-of-2.npz"))) > 0


def test_numbers_that_numpy_does_not_know(tmp_path):
    from tf_blockmomentum.backup import pieces

    values = np.array([[1.5, -2.0], [0.0, 3.0]])
    for dtype in (tf.bfloat16, tf.float16, tf.bool, tf.int64, tf.uint8):
        array = values.astype(dtype.as_numpy_dtype)
        pieces.write(tmp_path / "a.npz", [("x", pieces.to_bytes(array)), *META])
        back = pieces.from_bytes(pieces.Piece(tmp_path / "a.npz")["x"], [2, 2], dtype.name)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


META = [("meta", np.frombuffer(b'{"format": 1}', np.uint8))]
