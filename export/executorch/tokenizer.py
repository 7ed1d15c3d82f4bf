"""The tokenizer as ExecuTorch's runner reads it, and those that it would read otherwise.

The runner's C++ library reads tokenizer.json itself, with PCRE2 for regexes. It drops what a regex
leaves unmatched, decomposes text where NFC is asked for, takes every piece that is a whole split
whatever the merges say, and decodes each token alone: a Strip takes every space of Llama 2's text,
and ends the app at a byte of a longer character. tokenizer.json is therefore written anew, so that
it gives the same ids in the tokenizers library and no others in the runner.
"""

from __future__ import annotations

import json
from typing import Any

from ...errors import Unsupported
from ...tokenizer import pretokenizers as known
from ...tokenizer.tokenizer import Tokenizer
from ...tokenizer.vocabulary import SPACE
from ..onnx.tokenizer import BYTE_REST, BYTE_START, byte_names_cut, other_pieces

TOKENIZER = "tokenizer.json"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# Those that PCRE2 and the tokenizers library were found to match alike, on text of all scripts.
_REGEXES = (
    *(known.GPT2, known.DIGIT, known.THREE_DIGITS, known.LLAMA3, known.QWEN2, known.QWEN35),
    *(known.MINICPM5, known.SEED_CODER, known.JAIS2, known.EXAONE_MOE, *known.DEEPSEEK_V3),
)


def refuse_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise Unsupported if the runner would give other ids for some text, or could not stop.

    BadInput for a token beyond `vocab_size`: the runner samples among as many numbers as it has
    tokens, whatever the logits have.
    """
    tokenizer.pieces(vocab_size)
    ids = set(tokenizer.library.get_vocab(with_added_tokens=True).values())
    if len(ids) != 1 + max(ids):
        raise _unsupported(
            f"{1 + max(ids) - len(ids)} ids below {max(ids)} have no token",
            "ExecuTorch's runner samples among the first ids, as many as there are tokens, and"
            " would never give the last ones",
        )
    if tokenizer.kind == "ugm":
        raise _unsupported(
            "the tokenizer has no tokens for bytes",
            "ExecuTorch's runner refuses a text with a character that it does not have",
        )
    if not tokenizer.eos_ids:
        raise Unsupported(
            "no token ends a generation",
            "ExecuTorch's runner would go on up to the end of the context",
            "name it: eos_token_id in generation_config.json",
        )
    _pre_tokenizer(tokenizer)
    if piece := next(other_pieces(tokenizer), None):
        raise _unsupported(
            f"merging does not give the piece {piece!r}",
            "ExecuTorch's runner takes it wherever it stands alone, whatever the merges say",
        )


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """tokenizer.json for the runner; the same bytes on every run.

    Text has to be normalized before, where the source does. The runner puts BOS before a text where
    an app sets `num_bos` to 1, as the source does with special tokens; by itself it never does.
    What it decodes begins with a space where the source takes that away from a whole text.

    Raises:
        Unsupported: as `refuse_tokenizer`, for how text is split.
    """
    spec = {
        **tokenizer.spec,
        "pre_tokenizer": _pre_tokenizer(tokenizer),
        "post_processor": _post_processor(tokenizer),
        "decoder": _decoder(tokenizer),
    }
    if tokenizer.kind == "bpe":
        spec["normalizer"] = None
    return json.dumps(spec, ensure_ascii=False, separators=(",", ":")).encode()


def _pre_tokenizer(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """`pre_tokenizer` of tokenizer.json, in terms that the runner gets right."""
    if tokenizer.kind == "spm":
        return _byte_names(tokenizer)
    stated = tokenizer.spec["pre_tokenizer"]
    try:
        found = tuple(known.regexes(stated))
    except Unsupported:
        found = ()
    if not found or any(regex not in _REGEXES for regex in found):
        raise _unsupported(
            f"the tokenizer splits text with {' then '.join(found) or json.dumps(stated)}",
            "no regex of ExecuTorch's runner is known to do the same",
        )
    steps = [*map(_split, found), {**_BYTE_LEVEL, "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def _split(regex: str) -> dict[str, Any]:
    """A step that cuts out what a regex matches, and keeps what lies between."""
    whole = regex if regex in known.WHOLE else rf"{regex}|(?:(?!{regex})[\s\S])++"
    pattern = {"Regex": whole}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """BOS before a text, where the source puts it there; without one the runner guesses its id."""
    if not tokenizer.adds_bos or tokenizer.bos_id is None:
        return None
    text = tokenizer.library.id_to_token(tokenizer.bos_id)
    bos, first, second = (
        {"SpecialToken": {"id": text, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {text: {"id": text, "ids": [tokenizer.bos_id], "tokens": [text]}},
    }


def _decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    """From each token alone to its bytes."""
    if tokenizer.kind == "bpe":
        return {**_BYTE_LEVEL, "use_regex": False}
    spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]}


def _byte_names(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A step that cuts a text `<0x0A>` where merging cuts it: a whole one is taken for the byte."""
    if tokenizer.scheme.space_prefix:  # no text starts with one
        return None
    cut = byte_names_cut(tokenizer)
    if cut is None:
        raise _unsupported(
            f"the tokenizer merges {BYTE_START!r} into what follows it",
            "ExecuTorch's runner takes the text <0x0A> for a line end, and it cannot be cut",
        )
    return _split(rf"\A{BYTE_START[:cut]}(?={BYTE_START[cut:]}{BYTE_REST}\z)")


def _unsupported(what: str, why: str) -> Unsupported:
    return Unsupported(what, why, "write GGUF: --container gguf")
