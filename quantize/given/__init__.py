"""Checkpoints that others quantized, read without quantizing again.

Each maker's format is a module with `MAKER` and `entries(checkpoint, settings)`. Codes and scales
are carried over as they are; what no grid holds exactly is refused. What a format leaves in full
precision stays a float tensor, as it does in a checkpoint that nobody quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

from ...checkpoint import QUANTIZED_KEYS, Checkpoint
from ...errors import BadInput, Unsupported
from ..blocks import AnyGrid, Quantized
from ..grid import Float32
from . import awq, bitsandbytes, compressed_tensors, gptq, mlx, torchao
from .entry import FULL_PRECISION, Entry

_FORMATS: Mapping[str, ModuleType] = MappingProxyType(
    {
        "gptq": gptq,
        "awq": awq,
        "bitsandbytes": bitsandbytes,
        "compressed-tensors": compressed_tensors,
        "mlx": mlx,
        "torchao": torchao,
    }
)


@dataclass(frozen=True, slots=True)
class Given:
    """A model whose weights are codes already; fills Weights with what these mean.

    Attributes:
        maker: of the codes, for people.
        config: config.json without what it says of quantization.
        entries: the quantized weights by source name; other tensors are the checkpoint's own.
    """

    checkpoint: Checkpoint
    maker: str
    config: dict[str, Any]
    entries: Mapping[str, Entry]

    @property
    def grids(self) -> dict[str, AnyGrid]:
        """{source name: the grid} of the quantized weights."""
        return {name: entry.grid for name, entry in self.entries.items()}

    def names(self) -> tuple[str, ...]:
        parts = {part for entry in self.entries.values() for part in entry.parts}
        floats = [name for name in self.checkpoint.names() if name not in parts]
        return (*self.entries, *floats)

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self.entries.get(name)
        return entry.shape if entry else self.checkpoint.shape(name)

    def load(self, name: str) -> Quantized:
        """A quantized weight."""
        return self.entries[name].load()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """float32 rows [start:stop) along the first axis; of a quantized weight, what they mean."""
        if name not in self.entries:
            return self.checkpoint.rows(name, start, stop)
        return self.load(name).dequantize()[start:stop]


def open_given(checkpoint: Checkpoint) -> Given | None:
    """What others quantized of a model; None: it is in full precision. Scales are read and judged.

    Raises:
        BadInput: tensors that do not fit each other, or what they mean cannot be told.
        Unsupported: a format or a grid that is not held.
    """
    stated = {key: checkpoint.config[key] for key in QUANTIZED_KEYS if checkpoint.config.get(key)}
    if not stated:
        return None
    settings = next(iter(stated.values()))
    if not isinstance(settings, dict):
        raise BadInput(
            f"config.json: {next(iter(stated))} is no object",
            f"it is {settings!r:.60}",
            FULL_PRECISION,
        )
    # MLX names no method, and writes its settings under both keys.
    method = "mlx" if "quantization" in stated else settings.get("quant_method")
    if not isinstance(method, str) or method not in _FORMATS:
        raise Unsupported(
            f"config.json: the checkpoint is quantized by {method or 'an unnamed method'}"
            " (quantization_config)",
            f"slimport reads the codes of {', '.join(_FORMATS)}, and quantizes nothing twice",
            FULL_PRECISION,
        )
    maker = _FORMATS[method]
    entries = maker.entries(checkpoint, settings)
    if not entries:
        raise BadInput(
            f"config.json says {method}, and no weight is quantized",
            "there are no tensors that hold its codes",
            "remove quantization_config from config.json if the weights are in full precision",
        )
    config = {key: value for key, value in checkpoint.config.items() if key not in stated}
    return Given(checkpoint, maker.MAKER, config, MappingProxyType(entries))
