"""adapter_model.safetensors: its tensors, read from the file when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..checkpoint import Float32, StoredTensor, read_header, read_rows
from ..errors import BadInput, UsageError

WEIGHTS_FILE = "adapter_model.safetensors"
BLOCK = 4096  # rows of a table that are in memory at a time
DOWNLOAD_AGAIN = "download or save the adapter again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that stays in its file until rows of it are asked for; `name` is the one there."""

    name: str
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int = 0, stop: int | None = None) -> Float32:
        """float32 rows [start:stop) of the first axis, all finite (else BadInput)."""
        return read_rows(self.name, self.tensor, start, stop)

    def blocks(self) -> Iterator[tuple[int, Float32]]:
        """(start, rows) of blocks that cover the tensor."""
        for start in range(0, self.shape[0], BLOCK):
            yield start, self.rows(start, start + BLOCK)

    def same(self, other: Stored) -> bool:
        """Whether both hold the same values."""
        return self.shape == other.shape and all(
            np.array_equal(rows, other.rows(start, start + len(rows)))
            for start, rows in self.blocks()
        )

    def rounded(self, values: Float32) -> Float32:
        """The values as they would be after being stored in the dtype of this tensor."""
        if self.tensor.dtype == "BF16":
            return _round_to_bfloat16(values)
        with np.errstate(over="ignore"):
            stored: npt.NDArray[np.floating] = values.astype(
                np.float16 if self.tensor.dtype == "F16" else np.float32
            )
        return stored.astype(np.float32)


def _round_to_bfloat16(values: Float32) -> Float32:
    """Round to nearest, ties to even: the upper 16 bits of a finite float32."""
    bits = values.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(
        0xFFFF0000
    )
    return bits.view(np.float32)


def open_adapter(folder: Path) -> dict[str, Stored]:
    """{name in the file: tensor} of adapter_model.safetensors; only its header is read.

    Raises:
        UsageError: the folder does not exist.
        BadInput: no weights, pickles only, a Git-LFS pointer, a damaged file, another dtype.
    """
    if not folder.is_dir():
        raise UsageError(
            f"the adapter folder {folder} does not exist",
            "an adapter is a folder that peft's save_pretrained wrote",
            "check the path in --adapter NAME=PATH",
        )
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise _no_weights(folder)
    tensors = {name: Stored(name, tensor) for name, tensor in read_header(path).items()}
    if not tensors:
        raise BadInput(f"{WEIGHTS_FILE} holds no tensors", "nothing was saved", DOWNLOAD_AGAIN)
    return tensors


def _no_weights(folder: Path) -> BadInput:
    if (folder / "adapter_model.bin").exists():
        return BadInput(
            f"the adapter {folder.name} has its weights in adapter_model.bin only",
            "reading a pickle can run any code, so they are never read",
            f"save the adapter again with a recent peft, which writes {WEIGHTS_FILE}",
        )
    return BadInput(
        f"{WEIGHTS_FILE} is missing in the adapter folder {folder.name}",
        "peft's save_pretrained writes it beside adapter_config.json",
        DOWNLOAD_AGAIN,
    )
