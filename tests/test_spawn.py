"""tfbm.spawn: a function on new processes; and the notebook in examples/, run as a notebook."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, alive

import tf_blockmomentum as tfbm
from tf_blockmomentum.launch import shares


@pytest.fixture(autouse=True)
def _own_files(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    assert list(tmp_path.glob("tfbm-spawn-*")) == []


def make(how):
    """A function that cannot be imported by its name, as in a notebook's cell."""

    def function(*args):
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        print(f"worker {index} has {args}")
        if index == 0:
            if how == "unpicklable":
                return (i for i in args)
            if how not in ("ok", None):
                time.sleep(60)
        elif how == "raise":
            raise OSError(5, "a broken disk", "data.csv")
        elif how == "own":

            class Own(Exception):
                def __init__(self, one, two):
                    super().__init__(one)

            raise Own(1, 2)
        elif how == "exit":
            raise SystemExit(5)
        elif how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "wait":
            Path(args[0], "part").write_text(str(os.getpid()))
            os.rename(Path(args[0], "part"), Path(args[0], "began"))
            time.sleep(60)
        return {
            "index": index,
            "sum": sum(map(np.sum, args)),
            "threads": os.environ["OMP_NUM_THREADS"],
        }

    return function


def test_the_result_and_output_of_the_first_worker(capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = str(max(1, shares.cores() // 3))
    result = tfbm.spawn(make("ok"), workers=3, args=(np.arange(4), 2))
    assert (result["index"], result["sum"], result["threads"]) == (0, 8, threads)
    out, err = capfd.readouterr()
    assert out == "worker 0 has (array([0, 1, 2, 3]), 2)\n"
    assert err == ""


def test_the_exception_of_the_first_worker_that_fails(capfd):
    with pytest.raises(OSError, match=r"a broken disk: 'data\.csv'") as e:
        tfbm.spawn(make("raise"))
    assert type(e.value) is OSError
    assert e.value.filename == "data.csv"
    assert 'raise OSError(5, "a broken disk", "data.csv")\n' in str(e.value.__cause__)
    (note,) = e.value.__notes__
    assert note.startswith("(in worker 1 of tfbm.spawn; all output: ")
    log = Path(note.rstrip(")").rpartition(", ")[2])
    assert log.read_text().startswith("worker 1 has ()\n")
    assert "tfbm-launch" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("own", r"worker 1 failed with exit status 1. [\s\S]*Own: 1"),  # not to be made again
        ("exit", r"worker 1 failed with exit status 5. The last lines [\s\S]*worker 1 has"),
        ("kill", "worker 1 failed with SIGKILL"),
        ("unpicklable", r"result must travel back. Received: generator, and .*Return numbers"),
    ],
)
def test_other_ends(how, text):
    with pytest.raises(RuntimeError, match=text):
        tfbm.spawn(make(how))


def test_interrupted(tmp_path):
    """What a notebook's stop button does."""
    began = tmp_path / "began"

    def interrupt():
        while not began.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tfbm.spawn(make("wait"), args=(tmp_path,))
    assert time.monotonic() - begin < 10
    assert not alive(int(began.read_text()))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"function": 3}, TypeError, "`function` must be callable. Received: function=3."),
        ({"args": 3}, TypeError, "`args` must be a tuple of arguments. Received: args=3."),
        ({"args": (threading.Lock(),)}, TypeError, "must travel to new processes. Received: "),
        ({"workers": 0}, ValueError, "`workers` must be at least 1. Received: workers=0."),
        ({"workers": True}, ValueError, "Received: workers=True."),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error) as e:
        tfbm.spawn(**{"function": print, **arguments})
    assert text in str(e.value)


def test_in_a_worker(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(
        ValueError, match=r"this process is a worker itself\. Received: TF_CONFIG="
    ):
        tfbm.spawn(print)


# -- the notebook ---------------------------------------------------------------------------------

FAILING = """
def failing():
    import json, os
    if json.loads(os.environ["TF_CONFIG"])["task"]["index"]:
        raise KeyError("lost")
    import time
    time.sleep(30)

tfbm.spawn(failing)
"""
MOVING = """
def moving():
    import sys
    import tensorflow as tf

    @tf.function
    def bounded(x):
        if x > 3.0:  # AutoGraph has to see this line
            x = 3.0
        return x

    print(sys.stdout.isatty(), float(bounded(tf.constant(5.0))), end="\\r")

tfbm.spawn(moving)
"""


def printed(cell):
    return "".join(o["text"] for o in cell["outputs"] if o["output_type"] == "stream")


def pictures(cell):
    return [o["data"]["image/png"] for o in cell["outputs"] if o["output_type"] == "display_data"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_notebook(tmp_path, monkeypatch, whole):
    """Run from above, or what it imports, with two cells more: an exception, and output that
    moves."""
    import nbclient
    import nbformat

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    path = ROOT / "examples" / "notebook.ipynb"
    kept = nbformat.read(path, as_version=4)
    assert len(pictures(kept.cells[-2])) == 1  # it can be read without running it
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell["outputs"] = []
    if not whole:
        notebook.cells = notebook.cells[:2]
    tags = {"tags": ["raises-exception"]}
    notebook.cells.append(nbformat.v4.new_code_cell(FAILING, metadata=tags))
    notebook.cells.append(nbformat.v4.new_code_cell(MOVING))
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    *_, failing, moving = notebook.cells
    if whole:
        *_, trained, plot, _, _, _ = notebook.cells
        parts = printed(trained).split("beta=")  # worker 0's, in place
        assert [part.count("Epoch") for part in parts] == [0, 5, 5]
        losses = [float(part.rpartition(" loss: ")[2].split()[0]) for part in parts[1:]]
        assert losses[1] < 0.6 * losses[0]
        assert len(pictures(plot)) == 1
    (error,) = [o for o in failing.outputs if o["output_type"] == "error"]
    assert (error["ename"], error["evalue"]) == ("KeyError", "'lost'")
    assert 'raise KeyError("lost")' in "\n".join(error["traceback"])
    assert printed(moving) == "True 3.0\r"
