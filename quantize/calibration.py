"""Calibration: texts become token windows, windows become the Hessian of every Linear.

Windows stream through decoder.py one layer at a time. What lies between two layers waits in an
unnamed temporary file, so anonymous memory depends on one layer and not on windows or layers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..architectures import DecoderConfig, Kind, weights
from ..checkpoint import Weights
from ..decoder import SHARED_INPUTS, LayerWeights, decoder_layer, load_layer, rope_tables
from ..errors import BadInput, EnvironmentFailed, UsageError
from ..tokenizer import Tokenizer
from .grid import Float32

Int32 = npt.NDArray[np.int32]
RenderChat = Callable[[list[dict[str, str]]], str | None]

_TOKENS_AT_ONCE = 2048  # per forward pass: bounds what one layer computes in memory
_ROWS_AT_ONCE = 8192  # of the embedding, read in one piece


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows, each an independent context.

    Attributes:
        ids: int32 (windows, length).
        digest: `sha256:...` over shape and ids.
    """

    ids: Int32
    digest: str


def read_text(path: Path, render: RenderChat | None = None) -> str:
    """Read a calibration or evaluation text, UTF-8.

    A file named `*.jsonl` has one JSON object per line, each a document (joined by blank lines):
    `text`; or `messages` (a list of {role, content}); or `prompt` with `completion` or `chosen`
    (strings are joined as they are, lists of messages are one chat); or `instruction` with
    `output` and maybe `input`, a chat of two messages. Any other file is plain text.

    Args:
        render: writes a chat as the model reads it (Tokenizer.render_chat). Without it, or where
            it returns None, the contents of the messages are joined by blank lines.

    Raises:
        UsageError: there is no such file.
        BadInput: not UTF-8, or a line is malformed.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(
            f"no text file {path}", "the path does not exist or is a folder", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8",
            f"byte {error.start} cannot be decoded",
            "convert the file: iconv -t UTF-8",
        ) from error
    if path.suffix != ".jsonl":
        return text
    lines = enumerate(text.split("\n"), start=1)
    return "\n\n".join(_document(path, n, line, render) for n, line in lines if line.strip())


def _document(path: Path, number: int, line: str, render: RenderChat | None) -> str:
    """The text of one line of JSONL."""
    try:
        fields = json.loads(line)
        match fields:
            case {"text": str(text)}:
                return text
            case {"messages": [_, *_] as messages}:
                return _chat(messages, render)
            case {"prompt": str(prompt), "completion": str(answer)}:
                return prompt + answer
            case {"prompt": str(prompt), "chosen": str(answer)}:
                return prompt + answer
            case {"prompt": [_, *_] as prompt, "completion": answer}:
                return _chat(prompt + _answer(answer), render)
            case {"prompt": [_, *_] as prompt, "chosen": answer}:
                return _chat(prompt + _answer(answer), render)
            case {"instruction": str(instruction), "output": str(answer)}:
                asked = "\n".join(part for part in (instruction, fields.get("input")) if part)
                return _chat([{"role": "user", "content": asked}, *_answer(answer)], render)
        why = "it has none of: text; messages; prompt and completion or chosen; instruction and output"
    except (ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
    raise BadInput(f"{path}, line {number} is malformed", why, "correct or remove the line")


def _answer(answer: Any) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)


def _chat(messages: list[dict[str, str]], render: RenderChat | None) -> str:
    contents = [message["content"] for message in messages]
    rendered = render(messages) if render else None
    return "\n\n".join(contents) if rendered is None else rendered


def token_windows(
    text: str, tokenizer: Tokenizer, length: int, count: int, *, vocab_size: int
) -> Windows:
    """Cut a text into at most `count` windows of `length` tokens, evenly spread, not overlapping.

    Every window starts with BOS if the tokenizer adds one. Special tokens written in the text are
    special ids. A text too short for `count` windows gives as many as it holds.

    Raises:
        BadInput: the text is too short for one window, or an id is outside the vocabulary.
    """
    ids = np.array(tokenizer.encode(text), np.int32)
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    body = length - len(start)
    if ids.size < body:
        raise BadInput(
            f"the text has {ids.size} tokens",
            f"one window of {length} tokens needs {body} of them",
            "give a longer text, or ask for shorter windows",
        )
    _check_ids(ids, tokenizer, vocab_size)
    count = min(count, ids.size // body)
    begins = np.linspace(0, ids.size - body, count).astype(np.int64)
    bodies = ids[begins[:, None] + np.arange(body)]
    starts = np.broadcast_to(np.array(start, np.int32), (count, len(start)))
    return windows_of(np.hstack((starts, bodies)))


def windows_of(ids: Int32) -> Windows:
    """Windows from ids (windows, length)."""
    ids = np.ascontiguousarray(ids, np.int32)
    digest = hashlib.sha256(f"{ids.shape[0]} {ids.shape[1]}\n".encode())
    digest.update(np.ascontiguousarray(ids, "<i4").data)
    return Windows(ids, f"sha256:{digest.hexdigest()}")


def _check_ids(ids: Int32, tokenizer: Tokenizer, vocab_size: int) -> None:
    highest = int(ids.max())
    if highest >= vocab_size:
        raise BadInput(
            f"token {highest} ({tokenizer.decode([highest])!r}) is outside the model's vocabulary",
            f"the tokenizer gives ids up to {highest}, the embedding has {vocab_size} rows",
            "use the tokenizer that the model was trained with",
        )


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
            quantized = yield index, _hessians(source, config, index, activations, cos, sin)
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
    sums = {kind: _square(layer, kind) for kind in SHARED_INPUTS}

    def add(kind: Kind, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        sums[kind].addmm_(flat.T, flat)

    for batch in range(activations.batches):
        decoder_layer(activations.read(batch), layer, config, cos, sin, add)
    for total in sums.values():
        total /= activations.tokens
    shared = {kind: sums[first].numpy() for first, kinds in SHARED_INPUTS.items() for kind in kinds}
    return {
        weight.name: shared[weight.kind]
        for weight in weights(config)
        if weight.layer == index and weight.is_linear
    }


def _square(layer: LayerWeights, kind: Kind) -> Tensor:
    inputs = layer[kind].weight.shape[1]
    return torch.zeros(inputs, inputs)


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


def _embedding_rows(source: Weights, config: DecoderConfig, ids: npt.NDArray[np.integer]) -> Float32:
    """Rows `ids` (ascending) of the embedding, float32 (ids, hidden_size)."""
    name = next(weight.name for weight in weights(config) if weight.kind is Kind.EMBEDDING)
    found = []
    for start in range(0, config.vocab_size, _ROWS_AT_ONCE):
        inside = ids[(ids >= start) & (ids < start + _ROWS_AT_ONCE)]
        if inside.size:
            stop = min(start + _ROWS_AT_ONCE, config.vocab_size)
            found.append(source.rows(name, start, stop)[inside - start])
    return np.concatenate(found)
