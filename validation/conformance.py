"""Whether the runtime's tokenizer is the source tokenizer: same ids, same ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BadInput, ValidationFailed
from ..tokenizer.conformance import CHATS, Chat
from ..tokenizer.tokenizer import Tokenizer
from .runtime import Reader, Vocabulary


@dataclass(frozen=True, slots=True)
class Difference:
    """A text that the runtime tokenizes otherwise."""

    text: str
    expected: tuple[int, ...]
    got: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conformance:
    """What was compared and found.

    Attributes:
        checked: texts compared.
        differences: texts with other ids.
        missed_stops: end-of-sequence ids of the source at which the runtime goes on.
        further_stops: ids at which the runtime stops although the source does not name them.
        chats: conversations that the runtime rendered as the source does, or refused with it.
    """

    checked: int
    differences: tuple[Difference, ...]
    missed_stops: tuple[int, ...]
    further_stops: tuple[int, ...]
    chats: int = 0

    @property
    def conforms(self) -> bool:
        return not self.differences and not self.missed_stops

    def to_json(self) -> dict[str, Any]:
        """The keys of report.json."""
        further = list(self.further_stops)
        return {
            "conforms": self.conforms,
            "checked": self.checked,
            "further_stops": further,
            "chats": self.chats,
        }


def check(tokenizer: Tokenizer, file: Path, runtime: Reader) -> Conformance:
    """Compare `tokenizer` with the tokenizer that `runtime` reads from `file`.

    Raises:
        ValidationFailed: a text has other ids, the runtime misses an end-of-sequence token, starts
            a text otherwise, has another chat template, or renders it otherwise.
    """
    texts = tokenizer.conformance_texts()
    read = runtime.vocabulary(file)
    found = compare(
        texts,
        [tokenizer.encode(text) for text in texts],
        runtime.tokenize(file, texts),
        tokenizer.eos_ids,
        read.eog,
    )
    if found.differences:
        raise _differs(found)
    if found.missed_stops:
        raise ValidationFailed(
            f"the runtime does not stop at token {found.missed_stops[0]}",
            f"the source ends at {list(tokenizer.eos_ids)}, the runtime misses"
            f" {list(found.missed_stops)}",
            "name every end-of-sequence id in generation_config.json and export again",
        )
    _refuse_another_start(tokenizer, read)
    rendered = runtime.render(file, CHATS)
    if rendered is None:
        _refuse("has the chat template", tokenizer.chat_template or None, read.chat_template)
        return found
    return replace(found, chats=_same_chats(tokenizer, read, rendered))


def _same_chats(tokenizer: Tokenizer, read: Vocabulary, rendered: Sequence[str | None]) -> int:
    """How many conversations are compared; none if the files have no template to render."""
    if read.chat_template is None and all(prompt is None for prompt in rendered):
        return 0  # withheld: the runtime says so to whoever asks
    for chat, got in zip(CHATS, rendered, strict=True):
        expected = _expected(tokenizer, chat)
        pairs = enumerate(zip(expected or "", got or "", strict=False))
        parting = next((place for place, (mine, theirs) in pairs if mine != theirs), 0)
        start = max(0, parting - 20)  # a long prompt is shown from where they part
        _refuse("renders a conversation as", expected and expected[start:], got and got[start:])
    return len(CHATS)


def _expected(tokenizer: Tokenizer, chat: Chat) -> str | None:
    try:
        return tokenizer.render_chat(chat.messages, chat.add_generation_prompt)
    except BadInput:
        return None


def _refuse_another_start(tokenizer: Tokenizer, read: Vocabulary) -> None:
    """What a runtime puts before a prompt by itself; without a BOS it may name any id."""
    if read.adds_bos is not None:  # else it is the app's, and the bundle's notes say so
        _refuse("puts BOS before a text", tokenizer.adds_bos, read.adds_bos)
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else read.bos
    _refuse("has the BOS id", bos, read.bos)


def _refuse(what: str, expected: object, got: object) -> None:
    """Raise ValidationFailed if a runtime has, or does, something else than the source."""
    if expected != got:
        raise ValidationFailed(
            f"the runtime {what}: {got!r:.80}",
            f"the source tokenizer says {expected!r:.80}",
            "export again; if it stays, report it with the model's tokenizer_config.json",
        )


def compare(
    texts: Sequence[str],
    expected: Sequence[Sequence[int]],
    got: Sequence[Sequence[int]],
    eos_ids: Collection[int],
    runtime_stops: Collection[int],
) -> Conformance:
    """Ids of each text by the source and by the runtime, and the ids at which each ends."""
    pairs = zip(texts, expected, got, strict=True)
    return Conformance(
        checked=len(texts),
        differences=tuple(
            Difference(text, tuple(mine), tuple(theirs))
            for text, mine, theirs in pairs
            if list(mine) != list(theirs)
        ),
        missed_stops=tuple(sorted(set(eos_ids) - set(runtime_stops))),
        further_stops=tuple(sorted(set(runtime_stops) - set(eos_ids))),
    )


def _differs(found: Conformance) -> ValidationFailed:
    first = found.differences[0]
    return ValidationFailed(
        f"the runtime tokenizes {first.text!r} otherwise"
        f" ({len(found.differences)} of {found.checked} texts differ)",
        f"the source tokenizer gives {list(first.expected)}, the runtime {list(first.got)}",
        "the pre-tokenizer of this model is not one that the runtime has: use another container",
    )
