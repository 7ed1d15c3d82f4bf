"""A tokenizer as llama.cpp reads it: pieces, merges, special ids, what ends a generation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gguf import TokenType

from ...errors import Unsupported
from ...tokenizer.tokenizer import Tokenizer
from ...tokenizer.vocabulary import Piece
from .writer import Value

# Pieces that end a generation wherever they stand (llama.cpp's llama-vocab.cpp). Other EOS ids
# need a key, and there are three: eos, eot and eom.
ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>
    <eos> <turn|> <|tool_response>""".split()
)
_TYPES = {
    "normal": TokenType.NORMAL,
    "unknown": TokenType.UNKNOWN,
    "control": TokenType.CONTROL,
    "user_defined": TokenType.USER_DEFINED,
    "unused": TokenType.UNUSED,
    "byte": TokenType.BYTE,
}
_MODELS = {"spm": "llama", "bpe": "gpt2", "ugm": "t5"}


def vocabulary_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Value]:
    """`tokenizer.*` keys, the pieces filled up to `vocab_size`.

    Raises:
        BadInput: the tokenizer has more pieces than the model has embeddings.
        Unsupported: llama.cpp cannot hold this tokenizer exactly.
    """
    pieces = _distinct(tokenizer.pieces(vocab_size))
    values: dict[str, Value] = {
        "model": _MODELS[tokenizer.kind],
        "pre": tokenizer.pre or "default",
        "tokens": [piece.text for piece in pieces],
        "token_type": np.array([_TYPES[piece.kind] for piece in pieces], np.int32),
    }
    if tokenizer.kind == "bpe":
        values["merges"] = tokenizer.merges()
    else:
        values["scores"] = np.array([piece.score for piece in pieces], np.float32)
        values["add_space_prefix"] = tokenizer.scheme.space_prefix
        values["remove_extra_whitespaces"] = False
    if tokenizer.charsmap is not None:
        values["precompiled_charsmap"] = np.frombuffer(tokenizer.charsmap, np.uint8)
    values |= _special_ids(tokenizer, pieces)
    values |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if tokenizer.chat_template:
        named["tokenizer.chat_template"] = tokenizer.chat_template
    return named


def _distinct(pieces: list[Piece]) -> list[Piece]:
    doubled = len(pieces) - len({piece.text for piece in pieces})
    if doubled:
        raise Unsupported(
            f"the tokenizer has {doubled} pieces whose text is another piece's too",
            "llama.cpp looks pieces up by text and stops at a second one",
            "remove the duplicates from tokenizer.json",
        )
    return pieces


def _special_ids(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[str, Value]:
    if tokenizer.bos_id is None and "bos_token" in (tokenizer.chat_template or ""):
        raise Unsupported(
            "the chat template writes bos_token, and the tokenizer has none",
            "llama.cpp would write an ordinary token in its place",
            "remove bos_token from chat_template.jinja, or name one in tokenizer_config.json",
        )
    ends = _end_ids(tokenizer.eos_ids, pieces)
    ids = ends | {
        "bos": tokenizer.bos_id,
        "unknown": tokenizer.unk_id,
        "padding": tokenizer.pad_id,
    }
    # llama.cpp has defaults for what is left out; nothing writes them by itself.
    return {f"{role}_token_id": index for role, index in ids.items() if index is not None}


def _end_ids(eos_ids: Sequence[int], pieces: Sequence[Piece]) -> dict[str, int | None]:
    """Give each EOS id a key, those first that llama.cpp does not know by their text."""
    if not eos_ids:
        raise Unsupported(
            "no token ends a generation",
            "llama.cpp would take an ordinary token for it",
            "name it: eos_token_id in generation_config.json",
        )
    others = sorted(eos_ids[1:], key=lambda index: pieces[index].text in ENDS)
    for index in others[2:]:
        if pieces[index].text not in ENDS:
            raise Unsupported(
                f"{len(eos_ids)} tokens end a generation, such as {pieces[index].text!r}",
                "GGUF has keys for three (eos, eot, eom), and llama.cpp would not stop at it",
                "remove EOS ids that the model never writes from generation_config.json",
            )
    roles = ("eos", "eot", "eom")
    return dict(zip(roles, [*eos_ids[:1], *others[:2]], strict=False))
