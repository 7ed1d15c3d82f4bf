"""Chat templates for genai: rewritten where that is exact, withheld where it renders otherwise.

transformers renders with trim_blocks and lstrip_blocks, genai's minja with neither. A template is
written with both already done; what else differs is in minja.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from jinja2 import TemplateError

from . import minja

_TAG = re.compile(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
_RAW = re.compile(r"\{%[-+]?\s*raw\b")
_KEPT = re.compile(r"\{[%#{]\+|\+[%#}]\}")  # "+" turns trimming off for one tag
_ESCAPE = re.compile(r"""\\[^nrtbf\\'"]""")
_BLANK = " \t\v\f"


def withheld(template: str) -> str | None:
    """Why genai cannot be given the template, as the end of a sentence; None: it can.

    In doubt it is withheld: genai then refuses to render, and an app cannot overlook that.
    """
    return next(_reasons(template), None)


def written(template: str) -> str:
    """The template with trim_blocks and lstrip_blocks done: the same without either.

    Exact for what `withheld` lets pass.
    """
    source = template.replace("\r\n", "\n").replace("\r", "\n")
    parts: list[str] = []
    position = 0
    for match in _TAG.finditer(source):
        tag, text = match.group(), source[position : match.start()]
        if tag[1] != "{" and tag[2] != "-":
            text = _without_indentation(text, starts_line=position == 0)
        parts += text, tag
        position = match.end()
        if tag[1] != "{" and tag[-3] != "-" and source.startswith("\n", position):
            position += 1
    return "".join(parts) + source[position:]


def trims(template: str) -> bool:
    """Whether it takes all white space away at the ends of texts."""
    return minja.trims(minja.parse(template, trim=True))


def _without_indentation(text: str, starts_line: bool) -> str:
    """Text before a block, less the blanks between its last line end and the block."""
    head, newline, line = text.rpartition("\n")
    return head + newline if (newline or starts_line) and not line.strip(_BLANK) else text


def _reasons(template: str) -> Iterator[str]:
    if _RAW.search(template) or any(_KEPT.search(tag) for tag in _TAG.findall(template)):
        yield "it has blocks that cannot be written without trimming"
        return
    escapes = chain.from_iterable(_ESCAPE.findall(tag) for tag in _TAG.findall(template))
    yield from (f"it writes {escape} in a text" for escape in escapes)
    try:
        tree = minja.parse(template, trim=True)
        same = tree == minja.parse(written(template), trim=False)
    except (TemplateError, RecursionError) as error:
        yield f"it cannot be parsed ({getattr(error, 'message', error)})"
        return
    if not same:
        yield "it has blocks that cannot be written without trimming"
    yield from minja.differences(tree)
