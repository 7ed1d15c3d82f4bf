"""Which tensors a GGUF file holds, under which names and types, and which models it cannot hold."""

from __future__ import annotations

import math
from dataclasses import replace

from ...architectures import DecoderConfig
from ...errors import Unsupported
from ...quantize.blocks import AnyGrid, BlockGrid
from ...quantize.ggml import BLOCKS, Type
from ...quantize.grid import listed
from ...quantize.plan import Choice, Plan
from .metadata import full_period, rope_tensors
from .packing import TYPES
from .writer import TensorInfo

FLOAT_MATRIX, FLOAT_VECTOR = Type.F16, Type.F32  # llama.cpp wants norms and biases in F32


def as_llama_cpp(config: DecoderConfig) -> DecoderConfig:
    """A decoder as llama.cpp computes it: without a window that all layers have, up to its end.

    (`llama` and `phi3` graphs have no window; of the others, none has one in every layer.)
    """
    if config.window is None or not config.family.all_windowed:
        return config
    context = min(config.context_length, config.window)
    none = (False,) * config.layers
    return replace(config, context_length=context, window=None, windowed=none)


def tensor_infos(config: DecoderConfig, plan: Plan) -> list[TensorInfo]:
    """Every tensor of the file in its order; a tied table stands once, as the embedding.

    Raises:
        Unsupported: llama.cpp's graph of this family or ggml's blocks cannot hold it.
    """
    _refuse_graph(config)
    infos = [_info(choice) for choice in plan.choices]
    ropes = rope_tensors(config.rope, config.head_dim).items()
    return infos + [TensorInfo(name, values.shape, Type.F32) for name, values in ropes]


def _info(choice: Choice) -> TensorInfo:
    weight = choice.weight
    if choice.grid is None:
        return TensorInfo(
            weight.gguf, weight.shape, FLOAT_MATRIX if weight.is_matrix else FLOAT_VECTOR
        )
    kind = ggml_type(choice.grid)
    if kind is None:
        raise Unsupported(
            f"{weight.name}: GGUF cannot hold the grid {choice.grid.name}",
            f"no ggml type means the same; GGUF holds {listed(TYPES)} and ggml's own exactly",
            f'give it one of these grids: "{weight.name}" = "int8-g32"',
        )
    if weight.shape[1] % BLOCKS[kind][0]:
        raise Unsupported(
            f"{weight.name}: GGUF cannot hold {choice.grid.name} rows of {weight.shape[1]} inputs",
            f"ggml's blocks hold {BLOCKS[kind][0]} weights each, and a row holds whole blocks",
            f'leave it in float16: "{weight.name}" = "float16"',
        )
    return TensorInfo(weight.gguf, weight.shape, kind)


def ggml_type(grid: AnyGrid) -> Type | None:
    """The type that holds a grid exactly, if there is one."""
    return grid.type if isinstance(grid, BlockGrid) else TYPES.get(grid.name)


def _refuse_graph(config: DecoderConfig) -> None:
    """What llama.cpp's graph of a family leaves out: it would not load, or compute other logits."""
    family = config.family.gguf
    for name, missing in _left_out(config, family).items():
        if missing:
            raise Unsupported(
                f"GGUF cannot hold a {family} model with {name}",
                f"llama.cpp's {family} graph does not compute it",
                "export a model without it",
            )


def _left_out(config: DecoderConfig, family: str) -> dict[str, bool]:
    """{feature: whether the model has it and the graph has not}"""
    root = config.hidden_size // config.heads
    llama, gemma2, gemma3 = (family == name for name in ("llama", "gemma2", "gemma3"))
    caps = config.attention_softcap, config.logits_softcap
    period = full_period(config.windowed)
    # llama.cpp knows the 27B models of Gemma 2 and 3 by their number of layers.
    large = (gemma2 and config.layers == 46) or (gemma3 and config.layers == 62)
    plain_scale = 1 / math.sqrt(root if large else config.head_dim)
    of_config = family == "granite"
    return {
        "rope of type llama3": config.rope.kind == "llama3" and not llama,
        "rope of type longrope": config.rope.kind == "longrope" and family != "phi3",
        "heads that are rotated in part": config.rope.share != 1 and family != "phi3",
        "a bias on the attention output": config.output_bias and not llama,
        "biases in the feed-forward network": config.mlp_bias and not llama,
        "one table for embedding and head": config.tied and family == "olmo2",
        "a head of its own": not config.tied and family in ("gemma", "gemma2"),
        "heads whose size is not hidden_size / heads": config.head_dim != root
        and family in ("phi3", "olmo2", "qwen2"),
        "rope of type linear or yarn": config.rope.kind in ("linear", "yarn") and family == "phi3",
        "attention scores capped": caps[0] is not None and not gemma2,
        "attention scores or logits that are not capped": gemma2 and None in caps,
        "logits capped": caps[1] is not None and not (gemma2 or gemma3),
        "attention scaled by another factor than the root of a head's size": not (
            of_config or math.isclose(config.attention_scale, plain_scale, rel_tol=1e-6)
        ),
        "windows in other layers than every second": gemma2 and period != 2,
        "windows that follow no period": gemma3 and period is None,
        "layers that are not rotated but every fourth": family == "smollm3"
        and config.rotated != tuple((layer + 1) % 4 > 0 for layer in range(config.layers)),
        "local rope that is scaled": config.local_rope is not None
        and config.local_rope.kind != "default",
    }
