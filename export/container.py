"""What every container fills: refuse, predict, write, read back.

Containers are modules (export.gguf, ...), checked against the protocol by the type checker; a
protocol and not a base class, because they share a shape and no code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..architectures import DecoderConfig
from ..quantize.grid import Float32
from ..quantize.plan import Plan
from ..quantize.store import QuantizedCheckpoint
from ..quantize.tensor import QuantizedTensor
from ..tokenizer import Tokenizer


class Container(Protocol):
    """A file format that holds the codes of a quantized checkpoint exactly."""

    @property
    def NAME(self) -> str:
        """As written on the command line and in manifests."""

    def refuse(self, config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
        """Raise Unsupported if the container cannot hold this exactly; before any work starts."""

    def predict(self, config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> dict[str, int]:
        """{file name: bytes} of what `write` would write, to the byte."""

    def write(self, model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path) -> list[Path]:
        """Write the files, tensor by tensor, fsynced; returns their paths."""

    def read_back(
        self, folder: Path, config: DecoderConfig
    ) -> Iterator[tuple[str, QuantizedTensor | Float32]]:
        """Every tensor of the finished file, under its source name and in source row order.

        Shares no code with the packer.
        """
