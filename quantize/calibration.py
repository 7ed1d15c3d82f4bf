"""Calibration: token windows become the Hessian of every Linear.

Windows stream through decoder.py one layer at a time. What lies between two layers waits in an
unnamed temporary file, so anonymous memory depends on one layer and not on windows or layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ..architectures import DecoderConfig, Kind, weights
from ..checkpoint import Weights
from ..decoder import SHARED_INPUTS, decoder_layer, load_layer, rope_tables
from ..errors import EnvironmentFailed
from .grid import Float32
from .windows import Int32, Windows

_TOKENS_AT_ONCE = 2048  # per forward pass: bounds what one layer computes in memory
_ROWS_AT_ONCE = 8192  # of the embedding, read in one piece


def layer_hessians(
    source: Weights, config: DecoderConfig, windows: Windows
) -> Generator[tuple[int, dict[str, Float32]], Mapping[str, Float32], None]:
    """Stream windows through the decoder; yield each layer's index and {weight name: Hessian}.

    A Hessian is the mean over all tokens of x x^T, float32 (inputs, inputs), x the input of that
    Linear; Linears that read the same input share one array. Send {weight name: dequantized
    weights, float32} back for the weights of this layer that were quantized: the next layer's
    inputs are computed with them, so each layer is calibrated on what it will really receive.

    Raises:
        EnvironmentFailed: no room for the temporary file (4 bytes per token and hidden feature).
    """
    cos, sin = rope_tables(config, windows.ids.shape[1])
    with _Activations(windows, config) as activations:
        activations.embed(source, config)
        for index in range(config.layers):
            hessians = _hessians(source, config, index, activations, cos, sin)
            quantized = yield index, hessians
            hessians.clear()
            if index + 1 < config.layers:
                replaced = {name: torch.from_numpy(array) for name, array in quantized.items()}
                layer = load_layer(source, config, index, replaced)
                for batch in range(activations.batches):
                    hidden = activations.read(batch)
                    activations.write(batch, decoder_layer(hidden, layer, config, cos, sin))
                del quantized, replaced, layer


def _hessians(
    source: Weights,
    config: DecoderConfig,
    index: int,
    activations: _Activations,
    cos: Tensor,
    sin: Tensor,
) -> dict[str, Float32]:
    """The Hessians of one full-precision layer over the activations before it."""
    layer = load_layer(source, config, index)
    sums = {kind: torch.zeros(2 * layer[kind].weight.shape[1:]) for kind in SHARED_INPUTS}

    def add(kind: Kind, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        sums[kind].addmm_(flat.T, flat)

    for batch in range(activations.batches):
        decoder_layer(activations.read(batch), layer, config, cos, sin, add)
    shared: dict[Kind, Float32] = {}
    for first, kinds in SHARED_INPUTS.items():
        mean = sums[first].div_(activations.tokens).numpy()
        shared |= dict.fromkeys(kinds, mean)
    return {
        weight.name: shared[weight.kind]
        for weight in weights(config)
        if weight.layer == index and weight.is_linear
    }


class _Activations:
    """The hidden states of all windows at one layer boundary, in an unnamed temporary file.

    Plain reads and writes, not a map: a full disk is an error then and not a killed process.
    """

    def __init__(self, windows: Windows, config: DecoderConfig) -> None:
        self._ids = windows.ids
        self._hidden_size = config.hidden_size
        count, length = windows.ids.shape
        self._windows = max(1, _TOKENS_AT_ONCE // length)  # in one batch
        self.batches = -(-count // self._windows)
        self.tokens = count * length
        self._file = tempfile.TemporaryFile(buffering=0)

    def __enter__(self) -> _Activations:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def embed(self, source: Weights, config: DecoderConfig) -> None:
        """Write the embedding of every window; rows of the table are read in blocks."""
        used, places = np.unique(self._ids, return_inverse=True)
        rows = _embedding_rows(source, config, used)
        places = places.reshape(self._ids.shape)
        for batch in range(self.batches):
            chosen = places[self._span(batch)]
            self.write(batch, torch.from_numpy(rows[chosen]))

    def read(self, batch: int) -> Tensor:
        """(windows of the batch, length, hidden_size), float32."""
        count, length = self._ids[self._span(batch)].shape
        self._seek(batch)
        values = np.fromfile(self._file, np.float32, count * length * self._hidden_size)
        return torch.from_numpy(values.reshape(count, length, self._hidden_size))

    def write(self, batch: int, hidden: Tensor) -> None:
        self._seek(batch)
        try:
            hidden.contiguous().numpy().tofile(self._file)
        except OSError as error:
            needed = 4 * self.tokens * self._hidden_size
            raise EnvironmentFailed(
                f"calibration needs {needed / 1e6:.0f} MB of temporary disk space",
                f"writing to {tempfile.gettempdir()} failed: {error}",
                "free disk space, set TMPDIR to a larger disk, or calibrate on fewer windows",
            ) from error

    def _span(self, batch: int) -> slice:
        return slice(batch * self._windows, (batch + 1) * self._windows)

    def _seek(self, batch: int) -> None:
        tokens = batch * self._windows * self._ids.shape[1]
        self._file.seek(4 * tokens * self._hidden_size)


def _embedding_rows(source: Weights, config: DecoderConfig, ids: Int32) -> Float32:
    """Rows `ids` (ascending) of the embedding, float32 (ids, hidden_size)."""
    name = next(weight.name for weight in weights(config) if weight.kind is Kind.EMBEDDING)
    found = []
    for start in range(0, config.vocab_size, _ROWS_AT_ONCE):
        inside = ids[(ids >= start) & (ids < start + _ROWS_AT_ONCE)]
        if inside.size:
            stop = min(start + _ROWS_AT_ONCE, config.vocab_size)
            found.append(source.rows(name, start, stop)[inside - start])
    return np.concatenate(found)
