"""A tokenizer as onnxruntime-genai 0.18 reads it, and those that it would read otherwise.

genai has no engine for Unicode regexes. It knows two dozen alternatives by their very text, some of
them wrong, and gives the rest to C++'s std::regex (ECMAScript, over UTF-8 bytes, without \\p). Of
tokenizer.json it reads vocabulary, merges, added tokens, these regexes and the decoder; everything
else it ignores in silence: the normalizer, Digits, ignore_merges (a piece that is a whole split is
always taken), the unknown token. tokenizer.json is therefore written anew, so that it says the same
to the tokenizers library and nothing else to genai. docs/tokenizers.md lists what still differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...bundle import canonical_json
from ...errors import Unsupported
from ...tokenizer import pretokenizers as known
from ...tokenizer.tokenizer import Tokenizer
from ...tokenizer.vocabulary import SPACE
from . import template

# \s of the tokenizers library. std::regex sees bytes: wide spaces are alternatives, not a class.
_ASCII_SPACE = r"[ \t\n\v\f\r]"
_WIDE_SPACE = (
    "(?:\u0085|\u00a0|\u1680|\u2000|\u2001|\u2002|\u2003|\u2004|\u2005|\u2006|\u2007|\u2008|\u2009"
    "|\u200a|\u2028|\u2029|\u202f|\u205f|\u3000)"
)
_SPACE = f"(?:{_ASCII_SPACE}|{_WIDE_SPACE})"
# _SPACE*, with a third of the recursion in std::regex
_ANY_SPACES = f"{_ASCII_SPACE}*(?:{_WIDE_SPACE}{_ASCII_SPACE}*)*"
# genai's own \s*[\r\n]+ is wrong where spaces follow the last line end.
_SPACES = rf"|{_ANY_SPACES}[\r\n]|{_SPACE}{_ANY_SPACES}(?={_SPACE}|$)|{_SPACE}"


def _spelt_out(regex: str) -> str:
    return regex.removesuffix(known.SPACES) + _SPACES


# regexes of tokenizer.json, applied in turn -> those that genai splits with in the same places
_SPLITS = {
    (known.GPT2,): (known.GPT2,),
    (known.DIGIT, known.GPT2): (known.DIGIT, known.GPT2),
    (known.LLAMA3,): (_spelt_out(known.LLAMA3),),
    (known.QWEN2,): (_spelt_out(known.QWEN2),),
    (known.QWEN35,): (_spelt_out(known.QWEN35),),
    # \p{N}{1} and [^...\r\n]+ are unknown; no sign is a line end, they are of \s.
    (known.SEED_CODER,): (
        _spelt_out(known.SEED_CODER)
        .replace(r"\p{N}{1}", known.DIGIT)
        .replace(r"\p{N}\r\n]+", r"\p{N}]+"),
    ),
    # \p{N}+ is unknown; runs of digits were cut to three before.
    (known.THREE_DIGITS, known.MINICPM5): (known.THREE_DIGITS, _spelt_out(known.LLAMA3)),
}
# Without a Split, genai cuts SentencePiece's text with Llama 3's regex. No piece has a space after
# anything else, so words are safe to cut; not a "▁" of the text itself from the spaces after it.
_WORDS = f"(?: *[^ ]*{SPACE} +)+(?: *[^ ]+)?| *[^ ]+| +"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
BYTE_START, BYTE_REST = "<0x", "[0-9A-F][0-9A-F]>"  # such as <0x0A>
_LONGEST_ADDED = 1000  # letters; genai crashes on some 100,000
_NAMED = ("bos_token", "eos_token")  # what chat templates of genai may write


def refuse(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise Unsupported if genai would give other ids for some text, or could not stop.

    Raises:
        BadInput: an id beyond `vocab_size`.
    """
    tokenizer.pieces(vocab_size)
    if tokenizer.kind == "ugm":
        raise _unsupported(
            "the tokenizer has no tokens for bytes",
            "onnxruntime-genai gives the id -1 for a character that it does not have",
        )
    if not tokenizer.eos_ids:
        raise Unsupported(
            "no token ends a generation",
            "onnxruntime-genai would take token 0 for it",
            "name it: eos_token_id in generation_config.json",
        )
    _pre_tokenizer(tokenizer)
    _refuse_added_tokens(tokenizer.spec["added_tokens"])
    _refuse_pieces(tokenizer)


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """{file name: content} of what genai reads; the same bytes on every run.

    Raises:
        Unsupported: as `refuse`, for how text is split.
    """
    spec = {
        **tokenizer.spec,
        "pre_tokenizer": _pre_tokenizer(tokenizer),
        "post_processor": None,  # genai would put a second BOS before a rendered chat
    }
    return {
        "tokenizer.json": json.dumps(spec, ensure_ascii=False, separators=(",", ":")).encode(),
        "tokenizer_config.json": canonical_json(_settings(tokenizer)),
    }


def template_withheld(tokenizer: Tokenizer) -> str | None:
    """Why the chat template is not among the files; None: it is, or the model has none."""
    return template.withheld(tokenizer.chat_template) if tokenizer.chat_template else None


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json: another class or key would change ids, a null stops genai."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {name: tokenizer.special[name] for name in _NAMED if name in tokenizer.special}
    if tokenizer.chat_template and template_withheld(tokenizer) is None:
        settings["chat_template"] = template.written(tokenizer.chat_template)
    return settings


def _pre_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """`pre_tokenizer` of tokenizer.json, in terms that genai gets right."""
    if tokenizer.kind == "spm":
        return _split(_byte_names(tokenizer) + _WORDS)
    stated = tokenizer.spec["pre_tokenizer"]
    try:
        found = tuple(known.regexes(stated))
    except Unsupported:
        found = ()
    if found not in _SPLITS:
        raise _unsupported(
            f"the tokenizer splits text with {' then '.join(found) or json.dumps(stated)}",
            "onnxruntime-genai has no Unicode regexes, and nothing that it knows does the same",
        )
    to_bytes = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [*map(_split, _SPLITS[found]), {"type": "ByteLevel", **to_bytes}]
    return {"type": "Sequence", "pretokenizers": steps}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_names(tokenizer: Tokenizer) -> str:
    """A regex that cuts `<0x0A>` where merging cuts it: genai takes a whole one for the byte."""
    if tokenizer.scheme.space_prefix:  # no text starts with one
        return ""
    cut = byte_names_cut(tokenizer)
    if cut is None:
        raise _unsupported(
            f"the tokenizer merges {BYTE_START!r} into what follows it",
            "onnxruntime-genai takes the text <0x0A> for a line end, and it cannot be cut",
        )
    return f"{BYTE_START[:cut]}(?={BYTE_START[cut:]}{BYTE_REST}(?: |$))|"


def byte_names_cut(tokenizer: Tokenizer) -> int | None:
    """After how many letters of BYTE_START merging cuts every `<0x0A>`; None: it does not."""
    tokenize = tokenizer.library.model.tokenize
    cuts = [{token.offsets[1] for token in tokenize(name)} for name in _BYTES]
    cut = min(set.intersection(*cuts))
    return cut if cut <= len(BYTE_START) else None


def _refuse_added_tokens(tokens: Sequence[Mapping[str, Any]]) -> None:
    texts = {token["content"] for token in tokens}
    for text in sorted(texts):
        if len(text) > _LONGEST_ADDED:
            raise _unsupported(
                f"an added token has {len(text)} letters", "onnxruntime-genai crashes on long ones"
            )
        starts = {text[:end] for end in range(1, len(text))}
        if not starts & texts and (hidden := sorted(_inside(text) & texts)):
            raise _unsupported(
                f"the added token {hidden[0]!r} stands within {text!r}",
                "onnxruntime-genai overlooks it where a text ends within the longer one",
            )


def _inside(text: str) -> set[str]:
    """Every part of a text that has neither its first nor its last letter."""
    return {
        text[start:end] for start in range(1, len(text) - 1) for end in range(start + 1, len(text))
    }


def _refuse_pieces(tokenizer: Tokenizer) -> None:
    if piece := next(other_pieces(tokenizer), None):
        raise _unsupported(
            f"merging does not give the piece {piece!r}",
            "onnxruntime-genai takes it wherever it stands alone, whatever the merges say",
        )
    if tokenizer.kind == "spm":
        after = re.compile(f"[^{SPACE}]{SPACE}")
        if piece := next(filter(after.search, _learnt(tokenizer)), None):
            raise _unsupported(
                f"the piece {piece!r} has a space after something else",
                "onnxruntime-genai is given words, and the piece reaches over two of them",
            )


def other_pieces(tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces that the tokenizers library does not give for their own text."""
    model, tokenize = tokenizer.spec["model"], tokenizer.library.model.tokenize
    for piece in () if model.get("ignore_merges") else _learnt(tokenizer):
        if [token.id for token in tokenize(piece)] != [model["vocab"][piece]]:
            yield piece


def _learnt(tokenizer: Tokenizer) -> list[str]:
    """The pieces that text is merged into."""
    others = {token["content"] for token in tokenizer.spec["added_tokens"]}
    if tokenizer.kind == "spm":
        others.update(_BYTES)
    return [piece for piece in tokenizer.spec["model"]["vocab"] if piece not in others]


def _unsupported(what: str, why: str) -> Unsupported:
    return Unsupported(what, why, "write GGUF: --container gguf")
