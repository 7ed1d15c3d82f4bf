"""The child process behind `qnn`: one job on one folder, in the emulator of the NPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...checkpoint import read_json
from ...errors import BadInput
from ...export.qnn.chips import CHIPS
from ...export.qnn.compilation import binary_of, require_chip
from ...export.qnn.compiler import session
from ...export.qnn.encoding import Encoding
from ...export.qnn.rolling import Array, Geometry, Inputs, Rolling, Run
from ...quantize.grid import Float32
from .. import worker
from ..logits import writer
from .refusals import refusals

_DECODED = 4  # tokens of the first window that go through the graph of one token


class _Model:
    """The files as an app opens them: context binaries, tables, encodings."""

    def __init__(self, file: Path) -> None:
        folder = file.parent
        sizes = read_json(folder / "qnn.json")
        self.context, self.chunk = int(sizes["context"]), int(sizes["chunk"])
        self.vocab_size, self.ends = int(sizes["vocab_size"]), set(sizes["tokens"]["ends"])
        self.encodings = {name: Encoding(**entry) for name, entry in sizes["encodings"].items()}
        self.geometry = Geometry(
            sizes["layers"], sizes["heads"], sizes["kv_heads"], sizes["head_dim"], self.context
        )
        chip = CHIPS[sizes["hexagon"]]
        options = {"soc_model": str(chip.soc_model), "htp_arch": str(chip.hexagon)}
        self.runs: dict[int, Run] = {}
        for name, tokens in (("prefill", self.chunk), ("decode", 1)):
            require_chip(folder / binary_of(name), chip)
            with refusals(f"the NPU's emulator does not load {name}.onnx"):
                self.runs[tokens] = _runner(session(str(folder / f"{name}.onnx"), options, {}))
        self.inputs = self._inputs(np.memmap(folder / "tables.data", np.uint8, "r"), sizes)

    def rolling(self) -> Rolling:
        return Rolling(self.geometry, self.inputs, self.runs)

    def feed(self, text: Rolling, ids: npt.NDArray[np.int32], tokens: int) -> Iterator[Float32]:
        """Logits float32 (n, vocabulary) of ids, `tokens` a run."""
        if text.length + ids.size > self.context:
            raise BadInput(
                f"a text of {text.length + ids.size} tokens is too long",
                f"the files are made for a context of {self.context} tokens",
                "validate with shorter windows or prompts",
            )
        with refusals("the NPU's emulator cannot run the model"):
            for codes in text.feed(ids, tokens):
                yield self.encodings["logits"].decode(codes)

    def _inputs(self, data: npt.NDArray[np.uint8], sizes: dict[str, Any]) -> Inputs:
        def table(name: str) -> Array:
            entry = sizes["tables"][name]
            dtype, shape = np.dtype(entry["dtype"]), entry["shape"]
            start = entry["offset"]
            count = int(np.prod(shape)) * dtype.itemsize
            found: Array = data[start : start + count].view(dtype).reshape(shape)
            return found

        codes, scale = table("embedding.codes"), table("embedding.scale")
        embedding = sizes["embedding"]

        def hidden(ids: npt.NDArray[np.int32]) -> Array:
            rows = codes[ids]
            if embedding["bits"] == 4:  # low half of a byte first
                signed = rows.view(np.int8)
                rows = np.stack([(signed << 4) >> 4, signed >> 4], -1).reshape(len(ids), -1)
            grouped = rows.reshape(len(ids), scale.shape[1], -1).astype(np.float32)
            values = (grouped * scale[ids][..., None]).reshape(len(ids), -1)
            return self.encodings["hidden"].encode(values * np.float32(embedding["multiplier"]))

        ropes = sum(name.startswith("cos_") for name in sizes["tables"])
        return Inputs(
            hidden,
            tuple((table(f"cos_{index}"), table(f"sin_{index}")) for index in range(ropes)),
            sizes["mask"]["seen"],
            sizes["mask"]["masked"],
            self.encodings["mask"].dtype,
            "int16",
        )


def _runner(opened: Any) -> Run:
    names = [output.name for output in opened.get_outputs()]
    opened.disable_fallback()
    return lambda feeds: dict(zip(names, opened.run(names, feeds), strict=True))


def _logits(file: str, windows: list[list[int]], out: str) -> None:
    model = _Model(Path(file))
    ids = np.array(windows, np.int32)
    with writer(Path(out), (*ids.shape, model.vocab_size)) as target:
        for index, window in worker.counted(enumerate(ids), len(ids)):
            decoded = min(_DECODED, window.size - 1) if index == 0 else 0
            text, cut = model.rolling(), window.size - decoded
            for part, tokens in ((window[:cut], model.chunk), (window[cut:], 1)):
                for rows in model.feed(text, part, tokens):
                    target.write(np.ascontiguousarray(rows).data)


def _generate(file: str, prompts: list[list[int]], max_tokens: int) -> list[tuple[list[int], bool]]:
    model = _Model(Path(file))
    return [
        _greedy(model, np.array(prompt, np.int32), max_tokens)
        for prompt in worker.counted(prompts, len(prompts))
    ]


def _greedy(
    model: _Model, prompt: npt.NDArray[np.int32], max_tokens: int
) -> tuple[list[int], bool]:
    text = model.rolling()
    rows = list(model.feed(text, prompt, model.chunk))[-1]
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = int(rows[-1].argmax())
        if token in model.ends:
            return tokens, True
        tokens.append(token)
        if text.length == model.context:
            break
        (rows,) = model.feed(text, np.array([token], np.int32), 1)
    return tokens, False


if __name__ == "__main__":
    worker.serve({"logits": _logits, "generate": _generate})
