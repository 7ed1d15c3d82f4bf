"""Whether the runtime's tokenizer is the source tokenizer: same ids, same ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ValidationFailed
from ..tokenizer.tokenizer import Tokenizer
from .runtime import Runtime, Vocabulary


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
    """

    checked: int
    differences: tuple[Difference, ...]
    missed_stops: tuple[int, ...]
    further_stops: tuple[int, ...]

    @property
    def conforms(self) -> bool:
        return not self.differences and not self.missed_stops

    def to_json(self) -> dict[str, Any]:
        """The keys of report.json."""
        further = list(self.further_stops)
        return {"conforms": self.conforms, "checked": self.checked, "further_stops": further}


def check(tokenizer: Tokenizer, file: Path, runtime: Runtime) -> Conformance:
    """Compare `tokenizer` with the tokenizer that `runtime` reads from `file`.

    Raises:
        ValidationFailed: a text has other ids, the runtime misses an end-of-sequence token, starts
            a text otherwise, or has another chat template.
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
    return found


def _refuse_another_start(tokenizer: Tokenizer, read: Vocabulary) -> None:
    """What a runtime puts before a prompt by itself; without a BOS it may name any id."""
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else read.bos
    pairs = (
        ("puts BOS before a text", tokenizer.adds_bos, read.adds_bos),
        ("has the BOS id", bos, read.bos),
        ("has the chat template", tokenizer.chat_template or None, read.chat_template),
    )
    for what, expected, got in pairs:
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
