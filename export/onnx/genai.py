"""What onnxruntime-genai reads beside the model: genai_config.json and the tokenizer's files.

genai cannot run a reward model, but it opens one for its tokenizer, with the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...architectures import DecoderConfig
from ...quantize.grid import Grid
from ...quantize.plan import Plan
from ...tokenizer.tokenizer import Tokenizer
from ..container import Deployment
from . import tokenizer as tokenizer_files
from .decoder import PAST, PRESENT, SCORE
from .reader import MODEL

CONFIG = "genai_config.json"
# Prompt tokens of one run: logits of all of them are in memory, so this bounds what a prompt costs.
_CHUNK = 128
_TEXT = {name: name for name in ("input_ids", "attention_mask")}
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def session_options(plan: Plan) -> dict[str, str]:
    """Options without which a device would compute with other scales than those of the plan.

    On Arm, KleidiAI's kernels cut float16 scales to bfloat16, whose 8 bits the portable grids keep.
    """
    wide = any(isinstance(c.grid, Grid) and c.grid.scale_bits == 11 for c in plan.quantized)
    return {"mlas.disable_kleidiai": "1"} if wide else {}


def files(
    config: DecoderConfig,
    tokenizer: Tokenizer,
    deployment: Deployment,
    model: str = MODEL,
    options: Mapping[str, str] = {},
) -> dict[str, bytes]:
    """{file name: content}; `model` is run with these session options."""
    settings = genai_config(config, tokenizer, deployment)
    settings["model"]["decoder"]["filename"] = model
    settings["model"]["decoder"]["session_options"] |= options
    return {
        CONFIG: _json(settings),
        **tokenizer_files.files(tokenizer),
    }


def genai_config(
    config: DecoderConfig, tokenizer: Tokenizer, deployment: Deployment
) -> dict[str, Any]:
    """The model as onnxruntime-genai runs it; keys are those of its config.h."""
    return {
        "model": {
            "type": "decoder",
            "context_length": deployment.context,
            "vocab_size": config.vocab_size,
            "bos_token_id": tokenizer.bos_id if tokenizer.bos_id is not None else _end(tokenizer),
            "eos_token_id": list(tokenizer.eos_ids),
            "pad_token_id": tokenizer.pad_id if tokenizer.pad_id is not None else _end(tokenizer),
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "slimport", "provider_options": []},
                "hidden_size": config.hidden_size,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "num_key_value_heads": config.kv_heads,
                "head_size": config.head_dim,
                "inputs": {**_TEXT, **({} if config.reward else _names("past", PAST))},
                "outputs": {"logits": SCORE}
                if config.reward
                else {"logits": "logits", **_names("present", PRESENT)},
            },
        },
        **({} if config.reward else {"search": _search(tokenizer, deployment)}),
    }


def _names(which: str, pattern: str) -> dict[str, str]:
    """Those of the cache's keys and values, by layer."""
    return {f"{which}_{part}_names": pattern.format("%d", part) for part in ("key", "value")}


def _search(tokenizer: Tokenizer, deployment: Deployment) -> dict[str, Any]:
    """Sampling as the makers of the model set it; greedy without."""
    stated = tokenizer.sampling
    return {
        "max_length": deployment.context,
        "chunk_size": _CHUNK,
        "past_present_share_buffer": True,
        "do_sample": bool(stated.get("do_sample", False)),
        **{key: stated[key] for key in _SAMPLING if key in stated},
    }


def _end(tokenizer: Tokenizer) -> int:
    """What stands in for an id that the model does not have and genai wants."""
    return tokenizer.eos_ids[0]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
