"""What mkdocstrings does to docstrings before it renders them for the site."""

import re
from pathlib import Path

import griffe

_EXAMPLE = re.compile(r"^Example:\n\n(.*)\Z", re.MULTILINE | re.DOTALL)  # the last section
_PAGE = re.compile(r"\bdocs/(\w+\.md)\b")


class Readable(griffe.Extension):
    """Examples become code, and pages that a docstring names become links."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = _EXAMPLE.sub(r"**Example**\n\n```pycon\n\1\n```", obj.docstring.value)
            obj.docstring.value = _PAGE.sub(_link, text)


def _link(found: re.Match) -> str:
    title = (Path(__file__).parent / found[1]).read_text().partition("\n")[0]
    return f"[{title.removeprefix('# ')}]({found[1]})"
