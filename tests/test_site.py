"""The docs site: it builds without a warning, and what its pages say of the code is so."""

import ast
import os
import re
import subprocess
import sys

import launching

DOCS = launching.ROOT / "docs"
PACKAGE = launching.ROOT / "tf_blockmomentum"
TREES = [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=launching.ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404"}
    assert pages == {path.stem for path in DOCS.glob("*.md")}
    for page in pages:
        text = (tmp_path / "site" / f"{page}.html").read_text()
        assert not re.search(r"<(script|link|img|iframe)\b[^>]*(src|href)=\"?(https?:)?//", text)
        assert 'class="arithmatex"' not in text, page  # a formula that was not rendered
    assert "<math" in (tmp_path / "site" / "api.html").read_text()


def test_files_that_the_design_names_exist():
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", (DOCS / "design.md").read_text()):
        assert (PACKAGE / name).exists() or name == "tf_blockmomentum/", name


def text_of(node):
    """The text of a string expression, "…" for what is filled in; None if it is something else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) or "…" for part in parts)
        case ast.BinOp(op=ast.Add()):
            parts = [text_of(node.left), text_of(node.right)]
            return None if parts == [None, None] else "".join(part or "…" for part in parts)
    return None


def texts():
    """Every text in the package."""
    found = (text_of(node) for tree in TREES for node in ast.walk(tree))
    return {text for text in found if text}


def messages():
    """What the package raises, warns of, and refuses on a command line."""
    for tree in TREES:
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            told = getattr(call.func, "attr", "") in ("error", "warn")
            if isinstance(node, ast.Raise) or told:
                text = text_of(call.args[0])
                people = getattr(call.func, "id", "") != "AttributeError"
                if people and text and re.search(r"[a-z]{2}", text):  # not only what is filled in
                    yield text


def listed():
    """The messages on the page, but for TensorFlow's and Keras's."""
    _, own = (DOCS / "errors.md").read_text().split("\n## When the script starts\n")
    for row in re.findall(r"^\| (.*?) \| .*\|$", own, flags=re.M):
        if row != "message":
            for _, code in re.findall(r"(`+)(.+?)\1(?!`)", row):
                yield code.strip()


def pattern(message):
    parts = [re.escape(part.strip()) for part in message.split("…")]
    return re.compile(r"\s*.*?\s*".join(parts), re.DOTALL)


def test_messages_on_the_page_of_errors_stand_in_the_code():
    known = texts()
    stale = [m for m in listed() if not any(pattern(m).match(text) for text in known)]
    assert not stale, "docs/errors.md has rows for what no message says:\n" + "\n".join(stale)


def test_errors_are_on_the_page_of_errors():
    patterns = [pattern(message) for message in listed()]
    missing = {text for text in messages() if not any(p.match(text) for p in patterns)}
    assert not missing, "docs/errors.md has no row for:\n" + "\n".join(sorted(missing))
