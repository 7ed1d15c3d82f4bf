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

from ..errors import BadInput
from .pretokenizers import ends_in_bytes, pre_name, steps
from .refusals import differs

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
        raise differs(f"its model is {model['type']}, and only BPE is held")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise differs(f"its model has {option} = {model[option]!r}")
    _refuse_added_tokens(spec)
    normalizers = steps(spec["normalizer"], "normalizers")
    if ends_in_bytes(spec["pre_tokenizer"]):
        nfc = normalizers == [{"type": "NFC"}]
        if normalizers and not nfc:
            raise differs(f"it normalizes text with {normalizers}")
        _refuse_missing_bytes(model["vocab"])
        return Scheme(
            "bpe",
            pre or pre_name(spec["pre_tokenizer"], bool(model.get("ignore_merges"))),
            space_prefix=False,
            nfc=nfc,
        )
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if replace not in normalizers or any(step not in (prepend, replace) for step in normalizers):
        raise differs(f"it normalizes text with {normalizers or 'nothing'}")
    if spec["pre_tokenizer"] not in (None, _SPACES_ARE_GONE):
        raise differs(f"it splits text with {spec['pre_tokenizer']}")
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
        raise differs(f"{len(missing)} bytes have no token, such as {listed}")


def _refuse_added_tokens(spec: Mapping[str, Any]) -> None:
    """llama.cpp finds added tokens in the raw text, and strips nothing around them."""
    for token in spec["added_tokens"]:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]
        if token["normalized"] and not ends_in_bytes(spec["pre_tokenizer"]):
            flags.append("normalized")
        if flags:
            raise differs(f"the added token {token['content']!r} is {', '.join(flags)}")


def _sentencepiece_kind(spec: Mapping[str, Any]) -> Kind:
    model = spec["model"]
    vocab, merges = model["vocab"], model["merges"]
    bytes_known = sum(f"<0x{byte:02X}>" in vocab for byte in range(256))
    if model.get("ignore_merges") or model["unk_token"] not in vocab:
        raise differs("it has ignore_merges, or no unknown token")
    added = {token["content"] for token in spec["added_tokens"]}
    if model["byte_fallback"] and bytes_known == 256:
        # An added token is found before anything is merged, and spaces are marked after that.
        merged = vocab.keys() - {text for text in added if SPACE not in text}
        _refuse_other_merges(merged, vocab, [(left, right) for left, right in merges])
        return "spm"
    if not merges and model["fuse_unk"] and all(len(p) == 1 for p in vocab.keys() - added):
        return "ugm"
    raise differs(
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
            raise differs(f"the merges into {piece!r} do not stand together")
        first.setdefault(piece, rank)
    for piece in merged:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair in ranks or pair[0] not in vocab or pair[1] not in vocab:
                continue
            due = first.get(piece, len(merges))
            if any(list(pair) == state and rank > due for state, rank in _merging(piece, ranks)):
                raise differs(f"it does not merge {pair[0]!r} and {pair[1]!r} into {piece!r}")


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
