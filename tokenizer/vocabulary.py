"""What tokenizer.json says, in the terms of llama.cpp: kind, pre-tokenizer, pieces, scores.

Everything is derived from the structure of tokenizer.json, nothing from a model's name, and what
llama.cpp would tokenize in another way is refused (compared with its `llama-vocab.cpp`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ..errors import BadInput, Unsupported

Kind = Literal["spm", "bpe", "ugm"]
PieceKind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]
Merge = tuple[str, str]

SPACE = "▁"  # what SentencePiece writes for a space
_UNUSED_SCORE = -1000.0  # never wins
# Gemma's: it splits at spaces that the normalizer has replaced before.
_SPACES_ARE_GONE = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# llama.cpp's tekken, gpt-4o and deepseek-coder part some letters otherwise than their regexes in
# tokenizer.json (marks, letters without case, the ideographic space): these are refused.
# (regexes applied in turn, ignore_merges) -> tokenizer.ggml.pre with the same behaviour.
_PRE = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    (_DEEPSEEK_V3, False): "deepseek-v3",
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How text becomes tokens.

    Attributes:
        kind: spm (SentencePiece BPE with byte fallback), bpe (byte level) or ugm (single
            characters, unknown ones fused into one token).
        pre: llama.cpp's `tokenizer.ggml.pre`; bpe only.
        space_prefix: whether text, and text after a special token, gets a space before it.
        nfc: whether text is normalized first; llama.cpp does not, so it must be given NFC.
    """

    kind: Kind
    pre: str | None
    space_prefix: bool
    nfc: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of the vocabulary; `score` as llama.cpp's SPM and UGM tokenizers need it."""

    text: str
    kind: PieceKind
    score: float


def read_scheme(spec: Mapping[str, Any], pre: str | None = None) -> Scheme:
    """The scheme of a tokenizer.json; `pre` overrides the pre-tokenizer found in it.

    Raises:
        Unsupported: llama.cpp would give other ids for some text.
    """
    model = spec["model"]
    if model["type"] != "BPE":
        raise _differs(f"its model is {model['type']}, and only BPE is held")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _differs(f"its model has {option} = {model[option]!r}")
    _refuse_added_tokens(spec)
    normalizers = _sequence(spec["normalizer"], "normalizers")
    if _ends_in_bytes(spec["pre_tokenizer"]):
        nfc = normalizers == [{"type": "NFC"}]
        if normalizers and not nfc:
            raise _differs(f"it normalizes text with {normalizers}")
        _refuse_missing_bytes(model["vocab"])
        return Scheme("bpe", pre or _pre_tokenizer(spec), space_prefix=False, nfc=nfc)
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if replace not in normalizers or any(step not in (prepend, replace) for step in normalizers):
        raise _differs(f"it normalizes text with {normalizers or 'nothing'}")
    if spec["pre_tokenizer"] not in (None, _SPACES_ARE_GONE):
        raise _differs(f"it splits text with {spec['pre_tokenizer']}")
    kind = _sentencepiece_kind(spec)
    return Scheme(kind, None, space_prefix=prepend in normalizers, nfc=False)


def read_pieces(
    spec: Mapping[str, Any], scheme: Scheme, vocab_size: int | None = None
) -> list[Piece]:
    """Every token in the order of ids, filled up to `vocab_size` with unused `[PADi]`.

    Raises:
        BadInput: an id beyond `vocab_size`.
    """
    model = spec["model"]
    kinds: dict[str, PieceKind] = {}
    texts = {index: text for text, index in model["vocab"].items()}
    if scheme.kind != "bpe":
        kinds |= dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), "byte")
    for token in spec["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["content"]] = "control" if token["special"] else "user_defined"
    if scheme.kind != "bpe":
        kinds[model["unk_token"]] = "unknown"
    last = max(texts)
    vocab_size = last + 1 if vocab_size is None else vocab_size
    if last >= vocab_size:
        raise BadInput(
            f"the tokenizer has the id {last} ({texts[last]!r})",
            f"the model's embedding has {vocab_size} rows",
            "give the tokenizer that the model was trained with",
        )
    scores = _scores(model["merges"]) if scheme.kind == "spm" else {}
    unmerged = -float(len(scores))
    pieces = []
    for index in range(vocab_size):
        if index in texts:
            text = texts[index]
            pieces.append(Piece(text, kinds.get(text, "normal"), scores.get(text, unmerged)))
        else:
            pieces.append(Piece(f"[PAD{index}]", "unused", _UNUSED_SCORE))
    return pieces


def space_charsmap() -> bytes:
    """SentencePiece's compiled character map with one rule: a space becomes `▁`.

    llama.cpp's UGM tokenizer otherwise puts no space before text that has only spaces. Layout:
    bytes of the table, a double array of uint32 (the rule's leaf at 32 points to cell 33, which
    holds the offset of the replacement), and the replacement strings.
    """
    cells = [0] * 256
    cells[ord(" ")] = 1 << 10 | 1 << 8 | ord(" ")
    return struct.pack("<257I", 4 * len(cells), *cells) + SPACE.encode() + b"\0"


def _pre_tokenizer(spec: Mapping[str, Any]) -> str:
    ignore_merges = bool(spec["model"].get("ignore_merges"))
    regexes = tuple(_regexes(spec["pre_tokenizer"]))
    if name := _PRE.get((regexes, ignore_merges)):
        return name
    raise Unsupported(
        f"tokenizer.json splits text in a way unknown here: {' then '.join(regexes) or 'none'}",
        f"no pre-tokenizer of llama.cpp is known to do the same (ignore_merges {ignore_merges})",
        "if you know its name in llama.cpp, give it with --pre NAME",
    )


def _sequence(step: Mapping[str, Any] | None, key: str) -> list[Any]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _ends_in_bytes(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    steps = _sequence(pre_tokenizer, "pretokenizers")
    return bool(steps) and steps[-1]["type"] == "ByteLevel"


def _regexes(pre_tokenizer: Mapping[str, Any]) -> Iterator[str]:
    """The regexes that a byte-level pre-tokenizer applies in turn."""
    for step in _sequence(pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                if use_regex:
                    yield _GPT2
            case {"type": "Digits", "individual_digits": True}:
                yield r"\p{N}"
            case {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": False,
            }:
                yield regex
            case _:
                raise _differs(f"it splits text with {dict(step)}")


def _refuse_missing_bytes(vocab: Mapping[str, int]) -> None:
    """Every byte of UTF-8 needs a token: Hugging Face joins the neighbours of a dropped byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    missing = [b for b, letter in sorted(letters.items()) if b not in never and letter not in vocab]
    if missing:
        listed = ", ".join(f"0x{byte:02X}" for byte in missing[:8])
        raise _differs(f"{len(missing)} bytes have no token, such as {listed}")


def _refuse_added_tokens(spec: Mapping[str, Any]) -> None:
    """llama.cpp finds added tokens in the raw text, and strips nothing around them."""
    for token in spec["added_tokens"]:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]
        if token["normalized"] and not _ends_in_bytes(spec["pre_tokenizer"]):
            flags.append("normalized")
        if flags:
            raise _differs(f"the added token {token['content']!r} is {', '.join(flags)}")


def _sentencepiece_kind(spec: Mapping[str, Any]) -> Kind:
    model = spec["model"]
    vocab, merges = model["vocab"], model["merges"]
    bytes_known = sum(f"<0x{byte:02X}>" in vocab for byte in range(256))
    if model.get("ignore_merges") or model["unk_token"] not in vocab:
        raise _differs("it has ignore_merges, or no unknown token")
    added = {token["content"] for token in spec["added_tokens"]}
    if model["byte_fallback"] and bytes_known == 256:
        # An added token is found before anything is merged, and spaces are marked after that.
        merged = vocab.keys() - {text for text in added if SPACE not in text}
        _refuse_other_merges(merged, vocab, [(left, right) for left, right in merges])
        return "spm"
    if not merges and model["fuse_unk"] and all(len(p) == 1 for p in vocab.keys() - added):
        return "ugm"
    raise _differs(
        f"it has {bytes_known} of 256 byte tokens (byte_fallback {model['byte_fallback']})"
        f" and {len(merges)} merges"
    )


def _scores(merges: Sequence[Sequence[str]]) -> dict[str, float]:
    """A score per merged piece: minus its place in the order of merging."""
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    return {piece: -float(place) for piece, place in order.items()}


def _refuse_other_merges(
    merged: Collection[str], vocab: Collection[str], merges: Sequence[Merge]
) -> None:
    """Check that merging by score is merging by rank, for all pieces that can be `merged`.

    llama.cpp joins any two neighbours that make a piece, best score first. tokenizer.json joins
    only pairs that it lists, in their order. They agree if all pairs of one piece stand together
    in the list, and if an unlisted pair can never become neighbours while its piece is due.
    """
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece in first and "".join(merges[rank - 1]) != piece:
            raise _differs(f"the merges into {piece!r} do not stand together")
        first.setdefault(piece, rank)
    for piece in merged:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair in ranks or pair[0] not in vocab or pair[1] not in vocab:
                continue
            due = first.get(piece, len(merges))
            if any(list(pair) == state and rank > due for state, rank in _merging(piece, ranks)):
                raise _differs(f"it does not merge {pair[0]!r} and {pair[1]!r} into {piece!r}")


def _merging(text: str, ranks: Mapping[Merge, int]) -> Iterator[tuple[list[str], float]]:
    """Every state of merging `text`, with the rank of the merge that comes next."""
    state = list(text)
    while True:
        found = [ranks.get(pair, math.inf) for pair in pairwise(state)]
        rank = min(found, default=math.inf)
        yield state, rank
        if rank == math.inf:
            return
        place = found.index(rank)
        state = [*state[:place], state[place] + state[place + 1], *state[place + 2 :]]


def contradiction(what: str) -> BadInput:
    """Two files of a tokenizer say different things."""
    return BadInput(
        what,
        "the files of the tokenizer do not belong together",
        "take all of them from one revision of the model",
    )


def _differs(what: str) -> Unsupported:
    return Unsupported(
        f"the tokenizer cannot be held: {what}",
        "llama.cpp would give other ids for some text",
        "use a model with a byte-level BPE or a SentencePiece BPE tokenizer",
    )
