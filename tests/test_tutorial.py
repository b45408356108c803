"""docs/tutorial.md, followed to the letter but for epochs: script, changes, commands, output."""

import os
import re
import runpy
import shlex
import signal

import launching
import pytest

from tf_blockmomentum import plan

PAGE = (launching.ROOT / "docs" / "tutorial.md").read_text()


def blocks(start):
    """The code blocks that begin with this line."""
    return re.findall(rf"^```{re.escape(start)}\n(.*?)^```$", PAGE, flags=re.M | re.S)


def changed(script, diff):
    """A script with the lines with a minus made those with a plus."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert script.count(old) == 1, old
    return script.replace(old, new)


def shorter(script):
    """With fewer epochs than on the page, which are enough."""
    assert script.count("epochs=12") == 1
    return script.replace("epochs=12", "epochs=7")


def in_the_shape_of(expected):
    """A pattern: the same words, any numbers. Which worker was waited for, if any, is chance."""
    pattern = re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(expected))
    return re.sub(r"\\ \\\([^()]*waiting\\ for\\ worker[^()]*\\\)", r"( \\([^)]*\\))?", pattern)


def interrupted_at(words, command):
    """Runs a command; Ctrl-C once it has said this. Returns its status and output."""
    process, said = launching.start(*command[1:]), []
    try:
        for line in process.stdout:
            said.append(line)
            if words in line:
                words = "\0"
                process.send_signal(signal.SIGINT)
        return process.wait(timeout=30), "".join(said)
    finally:
        launching.end(process)
        process.stdout.close()


@pytest.mark.timeout(300)
def test_the_tutorial_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (script,), (use,) = blocks('python title="train.py"'), blocks('python title="use.py"')
    commands = [shlex.split(line) for text in blocks("sh") for line in text.splitlines()]
    (launch,) = {tuple(command) for command in commands if command[0] == "tfbm-launch"}
    (predict,) = [command for command in commands if command[0] == "tfbm-plan"]

    (tmp_path / "train.py").write_text(shorter(script))
    runpy.run_path("train.py")  # alone
    assert plan.main(predict[1:]) == 0
    alone = capsys.readouterr().out

    two_workers, *later = blocks("diff")
    script = changed(script, two_workers)
    assert [script] == blocks('python title="train.py, for workers"')
    for diff in later:
        script = changed(script, diff)
    (after_fit,) = blocks("python")
    script += after_fit
    (tmp_path / "train.py").write_text(shorter(script))
    status, first = interrupted_at("[worker 0] Epoch 4/", launch)
    assert status == 128 + signal.SIGINT, first
    assert len(os.listdir("backup")) > 1
    done = launching.run(*launch[1:], limit=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "] Epoch 3/" not in done.stdout
    assert (tmp_path / "final.keras").exists()

    (tmp_path / "use.py").write_text(use)
    runpy.run_path("use.py")
    said = "\n".join([alone, first, done.stdout, done.stderr, capsys.readouterr().out])
    for text in blocks("text"):
        for line in text.splitlines():
            assert re.search(in_the_shape_of(line), said), line
    accuracy = float(re.search(r"0\.\d\d(?= of the held-out)", said)[0])
    assert accuracy > 0.89
