"""Random Llamas of the shapes of known models, written once and kept.

Gaussian weights of deviation 0.02 in bf16, one shard per layer, and a byte-level tokenizer: to a
quantizer and to a disk each is like any trained model of that size.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from slimport.architectures import decoder_config, weights

_DEVIATION = 0.02
_BOS, _EOS = "<s>", "</s>"


# 1.1B weights with 22 layers, and 135M with 30.
TINY_LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
SMOLLM = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def random_llama(layers: int, parent: Path, shape: Mapping[str, Any] = TINY_LLAMA) -> Path:
    """The model's folder in `parent`; written at the first call (2.2 GB with 22 layers)."""
    suffix = "" if shape is TINY_LLAMA else f"-{shape['hidden_size']}"
    folder = parent / f"random-llama-{layers}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, shape["vocab_size"])
    if (folder / "config.json").exists():  # written last
        return folder
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "num_hidden_layers": layers,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    _write_weights(folder, config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _write_weights(folder: Path, config: dict[str, Any]) -> None:
    """A shard per layer, one for what is before and one for what is after."""
    places: dict[str, str] = {}
    shards = groupby(weights(decoder_config(config)), lambda weight: weight.layer)
    for number, (_, shard) in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{config['num_hidden_layers'] + 2:05d}.safetensors"
        tensors = {weight.name: _values(weight.name, weight.shape) for weight in shard}
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).mul_(_DEVIATION).to(torch.bfloat16)


def _write_tokenizer(folder: Path, size: int) -> None:
    """Two special tokens, the 256 bytes, and strings of two and three that merge in one way only.

    Their first letters, second ones and third ones are different bytes.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [_BOS, _EOS, *letters]
    places = [letters[place::3] for place in range(3)]
    longer = ("".join(word) for n in (2, 3) for word in product(*places[:n]))
    words = list(islice(longer, size - len(pieces)))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(word[:-1], word[-1]) for word in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (_BOS, _EOS)])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, vocabulary[_BOS])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": _BOS, "eos_token": _EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
