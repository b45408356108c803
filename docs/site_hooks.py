"""What MkDocs calls while it builds the site (`make docs`).

Links that name a file, which is right where files are read, name the page. Formulas become MathML,
which browsers render by themselves.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert

_LINK = re.compile(r"\[(\w+\.md)\]\(")
_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
# Whoever searches has a message or a question, and seldom looks for a row of numbers.
_SEARCH = {
    "errors.md": {"boost": 4},
    "evidence.md": {"boost": 0.2},
    "speed_tables.md": {"exclude": True},
}


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Gives links the titles of pages, and pages their weight in a search."""
    page.meta["search"] = _SEARCH.get(page.file.src_uri, {})

    def titled(found: re.Match) -> str:
        first = Path(config.docs_dir, found[1]).read_text().partition("\n")[0]
        return f"[{first.removeprefix('# ')}]("

    return _LINK.sub(titled, markdown)


def on_page_content(content: str, **_) -> str:
    """Renders the formulas that pymdownx.arithmatex has marked."""
    return _MARKED.sub(_rendered, content)


def _rendered(found: re.Match) -> str:
    # The converter knows `aligned` by its other name.
    tex = html.unescape(found["tex"]).replace("{aligned}", "{align*}")
    if found["tag"] == "span":
        return convert(tex)
    return f'<div class="formula">{convert(tex, display="block")}</div>'
