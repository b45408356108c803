"""The code in docstrings and README runs, and private API stays behind its fence."""

import ast
import doctest
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_blockmomentum as tfbm

ROOT = Path(__file__).parent.parent
PACKAGE = Path(tfbm.__file__).parent
MODULES = sorted(m.name for m in pkgutil.iter_modules([str(PACKAGE)]) if m.name != "launch")
MODULES += ["launch.spawn", "report.callback"]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"tf_blockmomentum.{name}")
    names = {"keras": keras, "np": np, "tf": tf, "tfbm": tfbm}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0
    if name in ("callback", "launch.spawn", "loop", "optimizer", "report.callback", "strategy"):
        assert result.attempted > 0


def public_members():
    for name in tfbm.__all__:
        thing = getattr(tfbm, name)
        yield name, thing
        public = getattr(thing, "__all__", vars(thing))
        for attribute, member in [(key, vars(thing)[key]) for key in public]:
            if not attribute.startswith("_") and (
                callable(member) or isinstance(member, property)
            ):
                yield f"{name}.{attribute}", member


def test_everything_public_says_what_it_is():
    keras_calls = {"set_model", "on_train_batch_begin", "on_train_batch_end", "on_test_begin",
                   "on_epoch_end", "on_train_end"}  # fmt: skip
    for name, thing in public_members():
        if name.rpartition(".")[2] not in keras_calls:
            assert thing.__doc__, name


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def test_the_readme_is_short_and_its_script_is_the_tutorials():
    """Which tests/test_tutorial.py runs."""
    readme, tutorial = (ROOT / "README.md").read_text(), ROOT / "docs" / "tutorial.md"
    assert len(readme.splitlines()) <= 150
    (diff,) = blocks(readme, "diff")
    assert diff == blocks(tutorial.read_text(), "diff")[0]
    assert "tfbm-launch --workers 2 train.py" in blocks(readme, "sh")[1]


def test_commands_in_the_docs_exist():
    """Every path and make target that README, CONTRIBUTING and docs name."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text()
        for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, flags=re.M):
            target = "".join(target)
            assert target in targets, (page.name, target)
        for path in re.findall(r"\b(?:examples|benchmarks|tests)/\w+\.py", text):
            assert (ROOT / path).exists(), (page.name, path)
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / link).exists(), (page.name, link)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"python3.12": (3, 12), "python3.11": (3, 11), "python3": (3, 11)}, "Python: python3.12"),
        ({"python3.13": None, "python3.11": (3, 11)}, "Python: python3.11"),  # without venv
        ({"python3": (3, 13)}, "Python: python3"),
        ({"python3": (3, 14)}, "There is no Python from 3.11 to 3.13 here"),
    ],
)
def test_the_makefile_finds_a_python(tmp_path, found, said):
    """Other versions are this one, which says that it is another."""
    for name, version in found.items():
        fake = tmp_path / name
        code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
        body = f'exec {sys.executable} -c "{code}" "$2"' if version else "exit 1"
        fake.write_text(f"#!/bin/sh\n{body}\n")
        fake.chmod(0o755)
    for tool in ("make", "sh", "test"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        ["make", "-f", ROOT / "Makefile", ".venv/bin/python"], cwd=tmp_path,
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert said in done.stdout, done.stdout + done.stderr


def test_private_api_is_fenced():
    """Only the room _private touches anything private of Keras, TensorFlow and KerasTuner."""
    sources = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    own = {
        target
        for tree in trees.values()
        for node in ast.walk(tree)
        for target in names_defined(node)
    }
    for path, source in sources.items():
        if path.parent.name == "_private":
            continue
        assert "tensorflow.python" not in source, path.name
        assert "tf.__internal__" not in source, path.name
        assert "keras.src" not in source, path.name
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                public = ast.unparse(node) == "os._exit"  # in spite of its name
                assert public or node.attr in own, (
                    f"{path.name}:{node.lineno} reaches for {node.attr}"
                )


def names_defined(node):
    """Functions, classes, modules and attributes of self that this package defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    for target in targets:
        for part in ast.walk(target):
            if isinstance(part, ast.Attribute):
                yield part.attr
            elif isinstance(part, ast.Name):
                yield part.id
