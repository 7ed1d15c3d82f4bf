"""The tokenizer beside a package, as Hugging Face's swift-transformers reads a folder.

Core ML has no tokenizer. tokenizer.json goes along as it is; the two files of settings are written
anew, without what only names files of the machine that made them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...bundle import canonical_json
from ...errors import Unsupported
from ...tokenizer.tokenizer import Tokenizer

TOKENIZER, SETTINGS, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"


def refuse(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise Unsupported without tokenizer.json; BadInput for a token beyond the vocabulary."""
    if not (tokenizer.folder / TOKENIZER).is_file():
        raise Unsupported(
            "the model has no tokenizer.json",
            "an app for Core ML reads tokenizer.json by itself",
            "save one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    tokenizer.pieces(vocab_size)


def files(tokenizer: Tokenizer, model_type: str) -> Mapping[str, bytes]:
    """{file name: content}: tokenizer, special tokens and chat template, and the model's type."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.adds_bos,
        **tokenizer.special,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    config = {
        "model_type": model_type,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
    }
    return {
        TOKENIZER: (tokenizer.folder / TOKENIZER).read_bytes(),
        SETTINGS: canonical_json(settings),
        CONFIG: canonical_json(config),
    }
