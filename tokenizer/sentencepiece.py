"""SentencePiece's tokenizer.model, turned into what tokenizer.json of such a model says.

A text, and each text between special tokens, is encoded by itself as SentencePiece would. Numbers
of fields are those of its `sentencepiece_model.proto` (https://github.com/google/sentencepiece).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from ..errors import BadInput, Unsupported
from .refusals import contradiction
from .vocabulary import SPACE

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of the file
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)  # its types; 6 is a byte
_MODEL_TYPE, _SPACE_LAST, _BYTE_FALLBACK = 3, 24, 35  # of the trainer
_BPE = 2
_ROLES = {"bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}  # field, default
_RULES, _SPACE_FIRST, _TRIMS, _MARKS_SPACES = 2, 3, 4, 5  # of the normalizer
_SIZES = {1: 8, 5: 4}  # bytes of a value, by its kind on the wire

Value = int | bytes


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    score: float
    type: int


def read_sentencepiece(
    path: Path, settings: Mapping[str, Any], added: Mapping[str, Any], special: dict[str, str]
) -> tuple[Any, dict[str, str]]:
    """The tokenizers library's object for a folder without tokenizer.json, and special tokens.

    Args:
        path: tokenizer.model.
        settings: tokenizer_config.json.
        added: added_tokens.json, {text: id}.
        special: {bos_token: text, ...} of the settings; tokenizer.model names those that it lacks.

    Raises:
        BadInput: the file is damaged, or the others contradict it.
        Unsupported: it is not BPE, or tokenizer.json could not say the same.
    """
    pieces, trainer, normalizer = _read(path)
    space_first = bool(normalizer.get(_SPACE_FIRST, True))
    _refuse_other_rules(trainer, normalizer)
    _refuse_other_settings(settings, space_first)
    _refuse_other_pieces(pieces, space_first)
    library = _library(pieces, bool(trainer.get(_BYTE_FALLBACK, False)), space_first)
    _add_tokens(library, pieces, settings, added)
    special = {**dict(_named(pieces, trainer)), **special}
    bos = special.get("bos_token")
    if bos is not None and settings.get("add_bos_token") in (None, True):
        if (index := library.token_to_id(bos)) is None:
            raise contradiction(f"bos_token {bos!r} is not in tokenizer.model")
        start = [(bos, index)]
        library.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=start)
    return library, special


def _read(path: Path) -> tuple[list[_Piece], dict[int, int], dict[int, int]]:
    """Pieces, trainer and normalizer; these two as {field: number, or how many bytes}."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == _PIECES]
        parts = {number: _numbers(value) for number, value in fields if number in (2, 3)}
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise _damaged(path, str(error)) from error
    doubled = [text for text, n in Counter(piece.text for piece in pieces).items() if n > 1]
    if not pieces or doubled or parts.keys() != {_TRAINER, _NORMALIZER}:
        raise _damaged(path, f"{len(pieces)} pieces, doubled {doubled[:1]}, parts {list(parts)}")
    return pieces, parts[_TRAINER], parts[_NORMALIZER]


def _piece(data: Value) -> _Piece:
    fields: dict[int, Any] = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(_SCORE, bytes(4)))
    piece = _Piece(fields[_TEXT].decode(), score, fields.get(_TYPE, _NORMAL))
    if not piece.text or math.isnan(score) or piece.type not in range(1, 7):
        raise ValueError(f"{piece}")
    return piece


def _numbers(data: Value) -> dict[int, int]:
    return {
        field: value if isinstance(value, int) else len(value) for field, value in _fields(data)
    }


def _fields(data: Value) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message; a number, or bytes."""
    if isinstance(data, int):
        raise ValueError("a number stands where a message should")
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        if key & 7 == 0:
            number, position = _varint(data, position)
            yield key >> 3, number
            continue
        if key & 7 == 2:
            size, position = _varint(data, position)
        else:
            size = _SIZES[key & 7]
        if position + size > len(data):
            raise ValueError(f"{size} bytes at {position} of {len(data)}")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number in groups of 7 bits, low ones first, and the position after it."""
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, position


def _library(pieces: Sequence[_Piece], byte_fallback: bool, space_first: bool) -> Any:
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.type == _UNKNOWN), None)
    library = tokenizers.Tokenizer(
        models.BPE(
            ids, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback
        )
    )
    mark: Any = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_first:
        mark = normalizers.Sequence([normalizers.Prepend(SPACE), mark])
        steps.append(decoders.Strip(" ", 1, 0))
    library.normalizer, library.decoder = mark, decoders.Sequence(steps)
    return library


def _merges(pieces: Sequence[_Piece]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best score first."""
    normal = {piece.text for piece in pieces if piece.type == _NORMAL}
    merges = []
    scores: dict[float, str] = {}
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        if piece.type != _NORMAL:
            continue
        cuts = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
        found = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
        if found and (other := scores.setdefault(piece.score, piece.text)) != piece.text:
            raise _differs(f"{piece.text!r} and {other!r} have one score, so the leftmost wins")
        merges += found
    return merges


def _refuse_other_rules(trainer: Mapping[int, int], normalizer: Mapping[int, int]) -> None:
    kind = trainer.get(_MODEL_TYPE, 1)
    if kind != _BPE:
        name = {1: "unigram", 3: "word", 4: "char"}.get(kind, str(kind))
        raise _differs(f"its model is {name}, and only BPE is held")
    for found, what in (
        (normalizer.get(_RULES), "it normalizes characters"),
        (normalizer.get(_TRIMS, True), "it removes extra spaces"),
        (not normalizer.get(_MARKS_SPACES, True), "it does not mark spaces"),
        (trainer.get(_SPACE_LAST), "it puts spaces at the end of pieces"),
    ):
        if found:
            raise _differs(what)


def _refuse_other_settings(settings: Mapping[str, Any], space_first: bool) -> None:
    """transformers' own switches for the space before a text."""
    if space_first and settings.get("legacy") is False:
        raise _differs("legacy = false: no space comes before text after a special token")
    if settings.get("add_prefix_space") not in (None, space_first):
        raise _differs(f"add_prefix_space is not {space_first} as in tokenizer.model")
    if settings.get("add_eos_token"):
        raise _differs("add_eos_token: every text would end")


def _refuse_other_pieces(pieces: Sequence[_Piece], space_first: bool) -> None:
    """User-defined pieces are found in the text before spaces are marked, as added tokens."""
    for piece in pieces:
        if piece.type == _UNUSED:
            raise _differs(f"the piece {piece.text!r} is unused")
        if piece.type == _USER_DEFINED and (space_first or SPACE in piece.text):
            raise _differs(f"{piece.text!r} is user-defined, beside spaces that are added")


def _named(pieces: Sequence[_Piece], trainer: Mapping[int, int]) -> Iterator[tuple[str, str]]:
    for role, (field, default) in _ROLES.items():
        index = trainer.get(field, default)  # -1 is none, written as 2**64 - 1
        if 0 <= index < len(pieces) and pieces[index].type == _CONTROL:
            yield role, pieces[index].text


def _add_tokens(
    library: Any,
    pieces: Sequence[_Piece],
    settings: Mapping[str, Any],
    added: Mapping[str, Any],
) -> None:
    """Add control and user-defined pieces, then those of the other files, at their ids."""
    tokens: dict[int, AddedToken] = {}
    for index, piece in enumerate(pieces):
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            tokens[index] = _token(piece.text, {"special": piece.type != _USER_DEFINED})
    for text, index in added.items():
        tokens[index] = _token(text, {"special": True})
    try:
        for key, flags in settings.get("added_tokens_decoder", {}).items():
            tokens[int(key)] = _token(flags["content"], flags)
        ordered = sorted(tokens.items())
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise contradiction("its added tokens are not {id: {content, ...}}") from error
    for index, token in ordered:
        library.add_tokens([token])
        if library.token_to_id(token.content) != index:
            raise contradiction(f"the added token {token.content!r} has the id {index}")


def _token(text: str, flags: Mapping[str, Any]) -> AddedToken:
    names = ("single_word", "lstrip", "rstrip", "special")
    return AddedToken(text, normalized=False, **{name: bool(flags.get(name)) for name in names})


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path.name} is not a model of SentencePiece",
        why,
        f"download {path} again, or put tokenizer.json beside it",
    )


def _differs(what: str) -> Unsupported:
    return Unsupported(
        f"tokenizer.model: {what}",
        "its rules cannot be held exactly",
        "put the model's tokenizer.json beside it: it is taken instead, if it can be held",
    )
