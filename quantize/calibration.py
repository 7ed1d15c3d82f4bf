"""Calibration: token windows become statistics of what every Linear receives.

Windows stream through decoder.py one layer at a time. What lies between two layers waits in memory
up to a limit, beyond it in an unnamed temporary file, so anonymous memory depends on one layer and
not on windows or layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..architectures import DecoderConfig, Kind, weights
from ..checkpoint import Weights
from ..decoder import (
    RESIDUALS,
    SHARED_INPUTS,
    LayerWeights,
    Tables,
    attention_tables,
    decoder_layer,
    embed,
    load_layer,
)
from ..errors import EnvironmentFailed
from .grid import Float32
from .imatrix import Imatrix
from .windows import IN_MEMORY, Int32, Windows

Progress = Callable[[str, int, int], None]

# Matrix products add up in an order that depends on the number of threads: a fixed one, whatever
# the cores, gives the same codes on every machine with this CPU.
_THREADS = 4
_TOKENS_AT_ONCE = 2048  # per forward pass: bounds what one layer computes in memory
_ROWS_AT_ONCE = 8192  # of the embedding, read in one piece


@contextmanager
def same_threads() -> Iterator[None]:
    """Calibrate and solve in here: codes do not depend on how many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Statistics(NamedTuple):
    """What a Linear y = W x receives, averaged over all tokens.

    Attributes:
        hessian: x x^T, float32 (inputs, inputs); one array for Linears that read the same input.
        drift: d x^T, float32 (outputs, inputs), where d is what the quantization of earlier layers
            took from the output: W x, and the residual stream that it is added to if it is, in
            full precision minus here.
    """

    hessian: Float32
    drift: Float32


@dataclass(frozen=True, slots=True)
class Passage:
    """The calibration windows on their way through one decoder layer, in batches of some of them.

    Attributes:
        index: of the layer.
        held: batches that went into no statistics; batch n holds the same windows everywhere.
    """

    index: int
    source: Weights
    config: DecoderConfig
    tables: Sequence[Tables]
    held: tuple[int, ...]
    _exact: Activations
    _actual: Activations

    @property
    def batches(self) -> int:
        return self._actual.batches

    @property
    def judges(self) -> tuple[int, ...]:
        """The batches to measure on: those that are held; all where there are too few to hold."""
        return self.held or tuple(range(self.batches))

    @property
    def teaches(self) -> tuple[int, ...]:
        """The batches to learn from."""
        return tuple(batch for batch in range(self.batches) if batch not in self.held)

    def inputs(self, batch: int) -> Tensor:
        """What the layer receives from the quantized ones before it: (windows, length, hidden)."""
        return self._actual.read(batch)

    def targets(self, batch: int) -> Tensor:
        """What it gives in full precision, where those before it are too; the same shape."""
        return self._exact.read(batch)

    def load(self, replaced: Mapping[str, Tensor] = {}) -> LayerWeights:
        """The layer's weights, float32, some of them replaced by name."""
        return load_layer(self.source, self.config, self.index, replaced)

    def run(self, inputs: Tensor, layer: LayerWeights) -> Tensor:
        """The output of a layer with these weights, same shape as `inputs`; differentiable."""
        return decoder_layer(inputs, layer, self.config, self.tables[self.index])


def layer_statistics(
    source: Weights,
    config: DecoderConfig,
    windows: Windows,
    hold: bool = False,
    before: Sequence[Callable[[], Mapping[str, Float32]]] = (),
) -> Generator[tuple[Passage, dict[str, Statistics]], Mapping[str, Float32], None]:
    """Stream windows through the decoder; yield each layer's Passage and {name: Statistics}.

    Send {weight name: dequantized weights, float32} back for the weights of this layer that were
    quantized: the next layer's inputs are computed with them, so each layer is calibrated on what
    it will really receive. The dict is emptied then.

    Args:
        before: what would be sent for each of the first layers, which were quantized already: they
            are passed through and not yielded.

    Raises:
        EnvironmentFailed: no room for temporary files (8 bytes per token and hidden feature, past
            IN_MEMORY).
    """
    tables = attention_tables(config, windows.ids.shape[1])
    with Activations(windows, config) as exact, Activations(windows, config) as actual:
        for activations in (exact, actual):
            activations.embed(source, config)
        held = _held(exact.batches) if hold else ()
        for index, solved in enumerate(before):
            _move(exact, load_layer(source, config, index), config, tables[index])
            _move(actual, _with(solved(), source, config, index), config, tables[index])
        for index in range(len(before), config.layers):
            layer = load_layer(source, config, index)
            found = _statistics(layer, config, exact, actual, tables[index], held)
            named = {
                weight.name: found[weight.kind]
                for weight in weights(config)
                if weight.layer == index and weight.is_linear
            }
            del layer, found
            passage = Passage(index, source, config, tables, held, exact, actual)
            quantized = yield passage, named
            named.clear()
            if index + 1 < config.layers:
                layer = _with(quantized, source, config, index)
                _move(actual, layer, config, tables[index])
                del quantized, layer


def _with(
    quantized: Mapping[str, Float32], source: Weights, config: DecoderConfig, index: int
) -> LayerWeights:
    """A layer with its quantized weights."""
    replaced = {name: torch.from_numpy(array) for name, array in quantized.items()}
    return load_layer(source, config, index, replaced)


def _move(
    activations: Activations, layer: LayerWeights, config: DecoderConfig, tables: Tables
) -> None:
    """Activations become the layer's output."""
    for batch in range(activations.batches):
        activations.write(batch, decoder_layer(activations.read(batch), layer, config, tables))


def importance(
    source: Weights,
    config: DecoderConfig,
    windows: Windows,
    progress: Progress,
    texts: tuple[str, ...] = (),
) -> Imatrix:
    """llama.cpp's importance matrix of every Linear, in full precision, as llama-imatrix makes it.

    Args:
        texts: names of what the windows are of.
        progress: called with (stage, layers done, layers in all).

    Raises:
        EnvironmentFailed: no room for a temporary file (4 bytes per token and hidden feature, past
            IN_MEMORY).
    """
    tables = attention_tables(config, windows.ids.shape[1])
    found: dict[str, Float32] = {}
    with same_threads(), Activations(windows, config, streams=1) as activations:
        activations.embed(source, config)
        for index in range(config.layers):
            progress("importance matrix", index, config.layers)
            squares = _squares(
                load_layer(source, config, index), config, activations, tables[index]
            )
            found |= {
                weight.name: squares[weight.kind]
                for weight in weights(config)
                if weight.layer == index and weight.is_linear
            }
    progress("importance matrix", config.layers, config.layers)
    return Imatrix(found, windows.ids.size, windows.ids.shape[1], texts)


def _squares(
    layer: LayerWeights, config: DecoderConfig, activations: Activations, tables: Tables
) -> dict[Kind, Float32]:
    """Sums of x^2 by the kind of Linear; `activations` move on to the layer's output."""
    shared = {first: kinds for first, kinds in SHARED_INPUTS.items() if first in layer}
    sums = {kind: torch.zeros(layer[kind].weight.shape[1], dtype=torch.float64) for kind in shared}

    def add(kind: Kind, inputs: Tensor) -> None:
        if kind in sums:
            sums[kind] += inputs.flatten(0, 1).square().sum(0)

    for batch in range(activations.batches):
        output = decoder_layer(activations.read(batch), layer, config, tables, add)
        activations.write(batch, output)
    found = {first: total.float().numpy() for first, total in sums.items()}
    return {kind: found[first] for first, kinds in shared.items() for kind in kinds}


def _held(batches: int) -> tuple[int, ...]:
    """Every eighth batch, four of them at most; none of less than four."""
    return tuple(range(3, batches, max(8, batches // 4)))


def _statistics(
    layer: LayerWeights,
    config: DecoderConfig,
    exact: Activations,
    actual: Activations,
    tables: Tables,
    held: Sequence[int],
) -> dict[Kind, Statistics]:
    """Statistics of the Linears of one full-precision layer; `exact` moves on to its output.

    Batches that are `held` do not count.
    """
    shared = {first: kinds for first, kinds in SHARED_INPUTS.items() if first in layer}
    squares = {kind: torch.zeros(2 * layer[kind].weight.shape[1:]) for kind in shared}
    moves = {kind: torch.zeros_like(square) for kind, square in squares.items()}
    added = {} if Kind.ATTENTION_POST_NORM in layer else RESIDUALS  # not through another norm
    residuals = {kind: torch.zeros_like(layer[kind].weight) for kind in added}
    tokens = 0
    for batch in range(exact.batches):
        wanted: dict[Kind, Tensor] = {}
        found: dict[Kind, Tensor] = {}
        output = decoder_layer(exact.read(batch), layer, config, tables, wanted.__setitem__)
        exact.write(batch, output)
        if batch in held:
            continue
        tokens += output.shape[0] * output.shape[1]
        decoder_layer(actual.read(batch), layer, config, tables, found.__setitem__)
        missing = {kind: (wanted.pop(kind) - found[kind]).flatten(0, 1) for kind in found}
        for kind in shared:
            inputs = found[kind].flatten(0, 1)
            squares[kind].addmm_(inputs.T, inputs)
            moves[kind].addmm_(missing[kind].T, inputs)
            if kind in added:
                residuals[kind].addmm_(missing[added[kind]].T, inputs)
    statistics = {}
    for first, kinds in shared.items():
        hessian = squares[first].div_(tokens).numpy()
        move = moves.pop(first)
        for kind in kinds:
            drift = layer[kind].weight @ move
            if kind in added:
                drift += residuals.pop(kind).div_(config.residual_multiplier)
            statistics[kind] = Statistics(hessian, drift.div_(tokens).numpy())
    return statistics


class Activations:
    """Hidden states of all windows at one layer boundary.

    In memory where all `streams` that lie beside one another fit IN_MEMORY, else in an unnamed
    temporary file. Plain reads and writes, not a map: a full disk is an error then and not a
    killed process.
    """

    def __init__(self, windows: Windows, config: DecoderConfig, streams: int = 2) -> None:
        self._ids = windows.ids
        self._hidden_size = config.hidden_size
        count, length = windows.ids.shape
        self._windows = max(1, _TOKENS_AT_ONCE // length)  # in one batch
        self.batches: int = -(-count // self._windows)
        self.tokens: int = count * length
        self._streams = streams
        self._kept: dict[int, Tensor] = {}
        fits = self._needed <= IN_MEMORY
        self._file = None if fits else tempfile.TemporaryFile(buffering=0)

    def __enter__(self) -> Activations:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def embed(self, source: Weights, config: DecoderConfig) -> None:
        """Write the embedding of every window; rows of the table are read in blocks."""
        used, places = np.unique(self._ids, return_inverse=True)
        rows = embedding_rows(source, config, used)
        table, places = torch.from_numpy(rows), places.reshape(self._ids.shape)
        for batch in range(self.batches):
            chosen = places[self._span(batch)]
            self.write(batch, embed(torch.from_numpy(chosen), table, config))

    def read(self, batch: int) -> Tensor:
        """A copy, float32 (windows of the batch, length, hidden_size).

        Equal bytes at equally aligned addresses, from wherever: products round by both.
        """
        if self._file is None:
            return self._kept[batch].clone()
        found = torch.empty(*self._ids[self._span(batch)].shape, self._hidden_size)
        self._seek(self._file, batch)
        rest = found.numpy().data.cast("B")
        while count := self._file.readinto(rest):
            rest = rest[count:]
        if rest:
            raise EOFError("the temporary file of activations was cut")
        return found

    def write(self, batch: int, hidden: Tensor) -> None:
        if self._file is None:
            self._kept[batch] = hidden.clone(memory_format=torch.contiguous_format)
            return
        self._seek(self._file, batch)
        try:
            hidden.contiguous().numpy().tofile(self._file)
        except OSError as error:
            raise EnvironmentFailed(
                f"calibration needs {self._needed / 1e6:.0f} MB of temporary disk space",
                f"writing to {tempfile.gettempdir()} failed: {error}",
                "free disk space, set TMPDIR to a larger disk, or calibrate on fewer windows",
            ) from error

    def _span(self, batch: int) -> slice:
        return slice(batch * self._windows, (batch + 1) * self._windows)

    @property
    def _needed(self) -> int:
        """Bytes of all streams."""
        return self._streams * 4 * self.tokens * self._hidden_size

    def _seek(self, file: FileIO, batch: int) -> None:
        tokens = batch * self._windows * self._ids.shape[1]
        file.seek(4 * tokens * self._hidden_size)


def embedding_rows(source: Weights, config: DecoderConfig, ids: Int32) -> Float32:
    """Rows `ids` (ascending) of the embedding, float32 (ids, hidden_size)."""
    name = next(weight.name for weight in weights(config) if weight.kind is Kind.EMBEDDING)
    found = []
    for start in range(0, config.vocab_size, _ROWS_AT_ONCE):
        inside = ids[(ids >= start) & (ids < start + _ROWS_AT_ONCE)]
        if inside.size:
            stop = min(start + _ROWS_AT_ONCE, config.vocab_size)
            found.append(source.rows(name, start, stop)[inside - start])
    return np.concatenate(found)
