"""Which tensors a GGUF file holds, under which names and types, and which models it cannot hold."""

from __future__ import annotations

from gguf import GGMLQuantizationType as Type

from ...architectures import DecoderConfig
from ...errors import Unsupported
from ...quantize.plan import Choice, Plan
from .packing import BLOCK, TYPES
from .writer import TensorInfo

ROPE_FACTORS = "rope_freqs.weight"
FLOAT_MATRIX, FLOAT_VECTOR = Type.F16, Type.F32  # llama.cpp wants norms and biases in F32


def tensor_infos(config: DecoderConfig, plan: Plan) -> list[TensorInfo]:
    """Every tensor of the file in its order; a tied table stands once, as the embedding.

    Raises:
        Unsupported: llama.cpp's graph of this family or ggml's blocks cannot hold it.
    """
    _refuse_graph(config)
    infos = [_info(choice) for choice in plan.choices]
    if config.rope.kind == "llama3":
        infos.append(TensorInfo(ROPE_FACTORS, (config.head_dim // 2,), Type.F32))
    return infos


def _info(choice: Choice) -> TensorInfo:
    weight = choice.weight
    if choice.grid is None:
        kind = FLOAT_MATRIX if weight.is_matrix else FLOAT_VECTOR
        return TensorInfo(weight.gguf, weight.shape, kind)
    if choice.grid.name not in TYPES:
        raise Unsupported(
            f"{weight.name}: GGUF cannot hold the grid {choice.grid.name}",
            f"no ggml type means the same; GGUF holds {', '.join(TYPES)} exactly",
            f'give it one of these grids: "{weight.name}" = "int8-g32"',
        )
    if weight.shape[1] % BLOCK:
        raise Unsupported(
            f"{weight.name}: GGUF cannot hold {choice.grid.name} rows of {weight.shape[1]} inputs",
            f"ggml's blocks hold {BLOCK} weights each, and a row holds whole blocks",
            f'leave it in float16: "{weight.name}" = "float16"',
        )
    return TensorInfo(weight.gguf, weight.shape, TYPES[choice.grid.name])


def _refuse_graph(config: DecoderConfig) -> None:
    """What llama.cpp's graph of a family leaves out: it would not load, or compute other logits."""
    family = config.family.gguf
    if family == "llama":
        return
    for name, present in (
        ("rope of type llama3", config.rope.kind == "llama3"),
        ("a bias on the attention output", config.output_bias),
        ("biases in the feed-forward network", config.mlp_bias),
    ):
        if present:
            raise Unsupported(
                f"GGUF cannot hold a {family} model with {name}",
                f"llama.cpp's {family} graph does not compute it",
                "export a model without it",
            )
