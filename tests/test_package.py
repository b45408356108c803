"""What is built and installed: wheel and sdist, without a network.

They are built with the setuptools of this environment (TensorFlow brings one; `dev` asks for one
that can make wheels by itself), and installed into an environment that has nothing else.
"""

import csv
import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import tf_blockmomentum as tfbm

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
OFFLINE = ["--no-deps", "--no-index", "--quiet"]
WHAT_IS_THERE = """
import importlib.metadata, importlib.util, pathlib
package = pathlib.Path(importlib.util.find_spec("tf_blockmomentum").origin).parent
print(importlib.metadata.version("tf-blockmomentum"), (package / "py.typed").exists(), package)
"""
USER = """
import tf_blockmomentum as tfbm

reveal_type(tfbm.BlockMomentum("sgd", overlap=0.5).blocks)
tfbm.BlockMomentum("sgd", sync_period="many")
tfbm.NoSuchThing
reveal_type(tfbm.tuner.time_to_target)
"""


def run(*command, cwd=None):
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel); the wheel is made from the sdist, as by an installer that has no wheel."""
    folder = tmp_path_factory.mktemp("package")
    source, made = folder / "source", folder / "made"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tf_blockmomentum", source / "tf_blockmomentum", ignore=unwanted)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=unwanted)
    for path in ROOT.iterdir():  # whatever setup.py reads, but no environments or runs
        if path.is_file():
            shutil.copy(path, source)
    run(sys.executable, "-c", SDIST, made, cwd=source)
    (sdist,) = made.glob("*.tar.gz")
    run(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", made, sdist)
    (wheel,) = made.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """The folder of the commands of an environment with the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    commands = folder / "bin"
    run(*PIP, "--python", commands / "python", "install", *OFFLINE, "--no-compile", built[1])
    return commands


def modules():
    package = ROOT / "tf_blockmomentum"
    return {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}


def test_they_carry_every_module_the_types_and_the_licence(built):
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*modules(), "tf_blockmomentum/py.typed", "LICENSE", "README.md"}
    assert not [name for name in names if name.startswith("tests")]  # only some would be there
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        recorded = {row[0] for row in csv.reader(archive.read(record).decode().splitlines())}
    assert {name for name in names if ".dist-info/" not in name} == {
        *modules(),
        "tf_blockmomentum/py.typed",
    }
    assert recorded == names
    assert any(name.endswith("LICENSE") for name in names)


def test_one_version_everywhere(built):
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == tfbm.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, flags=re.M)[1] == tfbm.__version__
    assert f"## {tfbm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_an_environment_with_nothing_else(environment):
    version, typed, package = run(environment / "python", "-I", "-c", WHAT_IS_THERE).split()
    assert (version, typed) == (tfbm.__version__, "True")
    assert str(environment.parent) in package


def test_a_type_checker_sees_the_types(environment, tmp_path):
    """In a script of a user's, which imports what is installed."""
    (tmp_path / "user.py").write_text(USER)
    checker = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    found = subprocess.run(
        [*checker, "--python-executable", environment / "python", "user.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = [line.split(": ", 1)[1] for line in found.stdout.splitlines()]
    assert [line.partition(":")[0] for line in lines] == ["note", "error", "error", "note"], lines
    assert 'Revealed type is "int"' in lines[0]
    assert 'expected "int | Callable[..., int]"' in lines[1]
    assert 'has no attribute "NoSuchThing"' in lines[2]
    assert "metric: str, target: float" in lines[3]


def test_the_commands_need_no_tensorflow(environment):
    assert "usage: tfbm-launch" in run(environment / "tfbm-launch", "--help")
    (libraries,) = environment.parent.glob("lib/python*/site-packages")
    numpy = Path(np.__file__).parent  # which plan asks for, and nothing more
    for path in (numpy, numpy.with_name("numpy.libs")):
        if path.exists():
            (libraries / path.name).symlink_to(path)
    form = ["--weights", "100MB", "--step", "50ms", "--link", "1gbit", "--workers", "2"]
    assert "K" in run(environment / "tfbm-plan", *form)
