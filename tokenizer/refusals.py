"""What is said of a tokenizer that llama.cpp does not have, or whose files disagree."""

from __future__ import annotations

from ..errors import BadInput, Unsupported


def contradiction(what: str) -> BadInput:
    """Two files of a tokenizer say different things."""
    return BadInput(
        what,
        "the files of the tokenizer do not belong together",
        "take all of them from one revision of the model",
    )


def differs(what: str) -> Unsupported:
    """No tokenizer of llama.cpp does the same."""
    return Unsupported(
        f"the tokenizer cannot be held: {what}",
        "llama.cpp would give other ids for some text",
        "use a model with a byte-level BPE or a SentencePiece BPE tokenizer",
    )
