"""What MkDocs calls while it builds the site (`make docs`): formulas become MathML, which browsers
render by themselves."""

import html
import re

from latex2mathml.converter import convert

_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_) -> str:
    """Renders what pymdownx.arithmatex has marked."""
    return _MARKED.sub(_rendered, content)


def _rendered(found: re.Match) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    # The converter knows `aligned` by its other name.
    tex = html.unescape(found["tex"]).replace("{aligned}", "{align*}")
    return convert(tex, display=display)
