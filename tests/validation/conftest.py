"""Tiny random models, quantized and written as GGUF files; packages of Core ML by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.export import gguf
from slimport.export.coreml.proto import messages
from slimport.export.gguf import layout
from slimport.quantize.ggml import Type
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exported:
    """A model folder, its quantized checkpoint, and the GGUF file of that."""

    model: Path
    quantized: Path
    file: Path

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.open(self.model)


def export_gguf(
    model: Path, folder: Path, preset: str = "int4", pre: str | None = None, **patterns: str
) -> Exported:
    checkpoint = Checkpoint.open(model)
    plan = make_plan(decoder_config(checkpoint.config), preset, "rtn", patterns)
    quantized = quantize(
        checkpoint,
        checkpoint.config,
        plan,
        folder / "quantized",
        calibration=None,
        tokenizer_folder=model,
        progress=lambda stage, done, total: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Beside float16 weights ggml rounds activations to float16 too: 1e-2 in these logits.
        patch.setattr(layout, "FLOAT_MATRIX", Type.F32)
        (file,) = gguf.write(quantized, Tokenizer.open(model, pre=pre), folder)
    return Exported(model, quantized.folder, file)


@pytest.fixture(scope="session")
def export_folder() -> Callable[..., Exported]:
    """export_folder(model, folder, preset, pre, **patterns) -> Exported."""
    return export_gguf


@pytest.fixture(scope="session")
def exported(make_model: Any, tmp_path_factory: Any) -> Callable[..., Exported]:
    """exported(family, preset, pre, **config) -> Exported.

    Preset "float" stores weights as float32, rounded to float16; `pre` overrides the pre-tokenizer
    in the file.
    """
    made: dict[str, Exported] = {}

    def export(
        family: str = "llama", preset: str = "float", pre: str | None = None, **config: Any
    ) -> Exported:
        key = repr((family, preset, pre, sorted(config.items())))
        if key not in made:
            model = make_model(family, **config)
            folder = tmp_path_factory.mktemp(f"{family}-{preset}")
            patterns = {"*": "float16"} if preset == "float" else {}
            grids = "int4" if preset == "float" else preset
            made[key] = export_gguf(model, folder, grids, pre, **patterns)
        return made[key]

    return export


class MilWriter:
    """A Core ML package, written operation by operation; nothing is inferred or checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "model.mlpackage"
        self.model = messages("Model").Model(specificationVersion=9)
        self.blobs = bytearray(64)
        self.count = 0
        self.function("main")

    def function(self, name: str) -> None:
        self.head = self.model.mlProgram.functions[name]
        self.head.opset = "CoreML8"
        self.block = self.head.block_specializations["CoreML8"]

    def input(self, name: str, kind: str, *shape: int | None) -> str:
        self._type(self.head.inputs.add(name=name).type.tensorType, kind, shape)
        return name

    def state(self, name: str, kind: str, *shape: int) -> str:
        wrapped = self.head.inputs.add(name=name).type.stateType.wrappedType
        self._type(wrapped.tensorType, kind, shape)
        return name

    def op(self, operation: str, made: str, kind: str, *shape: int | None, **arguments: Any) -> str:
        """Arguments are names, lists of names, or immediate arrays; `made` may be empty."""
        message = self.block.operations.add(type=operation)
        for key, given in arguments.items():
            bindings = message.inputs[key].arguments
            for each in given if isinstance(given, list) else [given]:
                if isinstance(each, str):
                    bindings.add(name=each)
                else:
                    self.immediate(bindings.add().value, np.asarray(each))
        if made:
            self._type(message.outputs.add(name=made).type.tensorType, kind, shape)
        return made

    def blob(self, name: str, kind: str, packed: bytes, *shape: int, unused: int = 0) -> str:
        """A constant that lies in the weight file."""
        codes = {"FLOAT16": 1, "FLOAT32": 2, "UINT8": 3, "INT8": 4, "INT4": 8, "UINT1": 9}
        codes |= {"UINT2": 10, "UINT4": 11, "UINT3": 12, "UINT6": 13, "INT32": 14}
        self.blobs += bytes(-len(self.blobs) % 64)
        message = self.block.operations.add(type="const")
        self._type(message.outputs.add(name=name).type.tensorType, kind, shape)
        value = message.attributes["val"]
        self._type(value.type.tensorType, kind, shape)
        value.blobFileValue.fileName = "@model_path/weights/weight.bin"
        value.blobFileValue.offset = start = len(self.blobs)
        record = struct.pack("<IIQQQ", 0xDEADBEEF, codes[kind], len(packed), start + 64, unused)
        self.blobs += record.ljust(64, b"\0") + packed
        self.count += 1
        return name

    def immediate(self, value: Any, array: np.ndarray[Any, Any], kind: str | None = None) -> None:
        kinds = {"f": "FLOAT", "i": "INT", "u": "UINT", "b": "BOOL", "U": "STRING"}
        letter = array.dtype.kind
        bits = str(8 * array.itemsize) if letter in "fiu" else ""
        kind = kind or kinds[letter] + ("32" if bits == "64" else bits)
        self._type(value.type.tensorType, kind, array.shape)
        tensor, numbers = value.immediateValue.tensor, array.reshape(-1).tolist()
        if kind in ("FLOAT16", "INT8", "UINT8", "INT4", "UINT4"):
            tensor.bytes.values = array.tobytes()
        else:
            field = {"f": "floats", "i": "ints", "u": "ints", "b": "bools", "U": "strings"}[letter]
            held = getattr(tensor, field)
            held.SetInParent()
            held.values.extend(numbers)

    def returns(self, *names: str) -> None:
        self.block.outputs.extend(names)

    def describe(self) -> None:
        """Say of each function what its program says of inputs, states and outputs."""
        program, description = self.model.mlProgram, self.model.description
        del description.functions[:]
        for name in sorted(program.functions):
            told = description.functions.add(name=name)
            block = program.functions[name].block_specializations["CoreML8"]
            made = {out.name: out.type for op in block.operations for out in op.outputs}
            for each in program.functions[name].inputs:
                made[each.name] = each.type
                if each.type.WhichOneof("type") == "stateType":
                    array = told.state.add(name=each.name).type.stateType.arrayType
                    self._feature(array, each.type.stateType.wrappedType.tensorType)
                else:
                    array = told.input.add(name=each.name).type.multiArrayType
                    self._feature(array, each.type.tensorType)
            for output in block.outputs:
                array = told.output.add(name=output).type.multiArrayType
                if output in made:
                    self._feature(array, made[output].tensorType)

    def _feature(self, array: Any, tensor: Any) -> None:
        kinds = {"FLOAT16": 65552, "FLOAT32": 65568, "INT32": 131104}
        array.dataType = kinds.get(messages("MIL").DataType.Name(tensor.dataType), 0)
        sizes = [each.constant.size for each in tensor.dimensions]
        array.shape.extend(size or 1 for size in sizes)
        if 0 in sizes:
            for size in sizes:
                array.shapeRange.sizeRanges.add(lowerBound=size or 1, upperBound=size or -1)

    def save(self) -> Path:
        self.describe()
        data = self.folder / "Data" / "com.apple.CoreML"
        (data / "weights").mkdir(parents=True, exist_ok=True)
        entry = {"author": "com.apple.CoreML", "path": "com.apple.CoreML/model.mlmodel"}
        manifest = {"itemInfoEntries": {"1": entry}, "rootModelIdentifier": "1"}
        (self.folder / "Manifest.json").write_text(json.dumps(manifest))
        (data / "model.mlmodel").write_bytes(self.model.SerializeToString(deterministic=True))
        self.blobs[:8] = struct.pack("<II", self.count, 2)
        (data / "weights" / "weight.bin").write_bytes(bytes(self.blobs))
        return self.folder

    def _type(self, tensor: Any, kind: str, shape: Sequence[int | None]) -> None:
        tensor.dataType = messages("MIL").DataType.Value(kind)
        tensor.rank = len(shape)
        for size in shape:
            dimension = tensor.dimensions.add()
            if size is None:
                dimension.unknown.variadic = False
            else:
                dimension.constant.size = size


@pytest.fixture
def mil(tmp_path: Path) -> MilWriter:
    return MilWriter(tmp_path)
