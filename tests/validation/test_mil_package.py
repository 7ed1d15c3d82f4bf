"""Core ML packages read, and what is refused in them; none of these tests needs Core ML."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimport.errors import BadInput, SlimportError, ValidationFailed
from slimport.export.coreml.proto import blob_library
from slimport.validation.runtimes.mil import Interpreter, functions
from slimport.validation.runtimes.mil_package import KINDS, Package, Stored

X = torch.arange(8.0).reshape(1, 8) - 3
PACKED = ("INT4", "UINT1", "UINT2", "UINT3", "UINT4", "UINT6")


def linear(mil: Any) -> Path:
    """y = x @ (codes * scale).T, codes UINT4 (6, 8) with offset 8 and a scale for each row."""
    mil.input("x", "FLOAT16", 1, 8)
    codes = np.arange(48, dtype=np.uint8) % 16
    packed = (codes[::2] | codes[1::2] << 4).tobytes()
    scale = np.linspace(0.5, 1, 6, dtype=np.float16)
    mil.blob("codes", "UINT4", packed, 6, 8)
    mil.blob("scale", "FLOAT16", scale.tobytes(), 6, 1)
    mil.blob("offset", "FLOAT16", np.full(6, 8, np.float16).tobytes(), 6, 1)
    parts = {"data": "codes", "scale": "scale", "offset": "offset"}
    mil.op("constexpr_blockwise_shift_scale", "w", "FLOAT16", 6, 8, **parts)
    mil.op("linear", "y", "FLOAT16", 1, 6, x="x", weight="w")
    mil.returns("y")
    return mil.save()


def run(package: Path, **inputs: Any) -> Any:
    return Interpreter(package, rounding="fp32").run(inputs)["y"]


def weights(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


def program(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/model.mlmodel"


def test_a_package_written_by_hand_computes(mil: Any) -> None:
    codes = torch.arange(48).reshape(6, 8) % 16 - 8.0
    weight = codes * torch.from_numpy(np.linspace(0.5, 1, 6, dtype=np.float16))[:, None].float()
    torch.testing.assert_close(run(linear(mil), x=X), X @ weight.T)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes_are_unpacked_as_apples_reader_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(PACKED))
    low, high = (-8, 7) if kind == "INT4" else (0, 2 ** KINDS[kind].bits - 1)
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 21))
    numbers = st.lists(st.integers(low, high), min_size=rows * columns, max_size=rows * columns)
    codes = np.array(data.draw(numbers), np.int8 if low else np.uint8)
    file = tmp_path_factory.mktemp("blob") / "weight.bin"
    writer = blob_library()._BlobStorageWriter(str(file))
    offset = getattr(writer, f"write_{kind.lower()}_data")(codes)
    del writer
    package = Package(None, file.parent)
    stored = Stored(kind, (rows, columns), package._blob(file.name, offset, kind, (rows, columns)))
    expected = codes.reshape(rows, columns)
    np.testing.assert_array_equal(stored.numbers(), expected)
    places = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
    np.testing.assert_array_equal(stored.numbers(places), expected[places])
    reader = blob_library()._BlobStorageReader(str(file))
    theirs = getattr(reader, f"read_{kind.lower()}_data")(offset)
    np.testing.assert_array_equal(stored.numbers().reshape(-1), np.array(theirs))


def test_the_default_function_is_the_first(mil: Any) -> None:
    mil.function("also")
    mil.model.description.defaultFunctionName = "main"
    assert functions(mil.save()) == ["main", "also"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"Manifest.json"):
        Interpreter(tmp_path / "no.mlpackage", rounding="fp32")


@pytest.mark.parametrize(
    "path", ["../model.mlmodel", "/etc/passwd", "", "com.apple.CoreML/../../Manifest.json"]
)
def test_paths_that_leave_the_package(mil: Any, path: str) -> None:
    package = linear(mil)
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"]["1"]["path"] = path
    (package / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValidationFailed, match="names the file"):
        run(package, x=X)


def test_a_link_that_leaves_the_package(mil: Any, tmp_path: Path) -> None:
    package = linear(mil)
    weights(package).rename(tmp_path / "elsewhere")
    weights(package).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValidationFailed, match="outside"):
        run(package, x=X)


Damage = Callable[[bytearray], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "version": (lambda b: b.__setitem__(4, 1), "version 1"),
    "sentinel": (lambda b: b.__setitem__(64, 0), "no tensor begins there"),
    "data type": (lambda b: b.__setitem__(68, 10), "it has UINT2, the program says UINT4"),
    "unknown data type": (lambda b: b.__setitem__(68, 99), "data type 99"),
    "size": (lambda b: b.__setitem__(72, 23), "23 bytes"),
    "huge size": (lambda b: b.__setitem__(79, 127), "bytes"),
    "offset": (lambda b: b.__setitem__(slice(80, 88), b"\xff" * 8), "not in the file"),
    "unaligned offset": (lambda b: b.__setitem__(80, 129), "not in the file"),
    "unused bits": (lambda b: b.__setitem__(88, 4), "4 bits of them unused"),
    "truncated": (lambda b: b.__delitem__(slice(150, None)), "not in the file"),
    "header only": (lambda b: b.__delitem__(slice(64, None)), "no tensor can begin"),
    "half a header": (lambda b: b.__delitem__(slice(5, None)), "has 5 bytes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights(mil: Any, name: str) -> None:
    damage, message = DAMAGES[name]
    package = linear(mil)
    content = bytearray(weights(package).read_bytes())
    damage(content)
    weights(package).write_bytes(content)
    with pytest.raises(ValidationFailed, match=message):
        run(package, x=X)


def test_missing_and_empty_weights(mil: Any) -> None:
    package = linear(mil)
    weights(package).write_bytes(b"")
    with pytest.raises(BadInput, match=r"weight.bin"):
        run(package, x=X)
    weights(package).unlink()
    with pytest.raises(BadInput, match=r"weight.bin"):
        run(package, x=X)


def test_bytes_changed_at_random_raise_errors_of_ours(mil: Any) -> None:
    """Or nothing: most bytes are names or numbers."""
    package, chance, refusals = linear(mil), random.Random(0), 0
    for file in (program(package), weights(package)):
        whole = file.read_bytes()
        for _ in range(250):
            content = bytearray(whole)
            for _ in range(chance.randint(1, 3)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            file.write_bytes(content[: chance.choice([len(content)] * 4 + [chance.randrange(400)])])
            try:
                run(package, x=X)
            except SlimportError as error:
                refusals += 1
                assert all(str(error).split("\n")), "three lines"
        file.write_bytes(whole)
    assert refusals > 100
    run(package, x=X)


def test_bytes_of_the_program_alone(mil: Any) -> None:
    package = linear(mil)
    for content in (b"", b"\x08", b"not a message", bytes(100)):
        program(package).write_bytes(content)
        with pytest.raises(ValidationFailed):
            run(package, x=X)


def test_a_constant_has_as_many_numbers_as_it_says(mil: Any) -> None:
    mil.op("fill", "y", "FLOAT32", 2, shape=np.array([2]), value=np.float32(1))
    mil.returns("y")
    assert run(mil.save()).tolist() == [1, 1]
    value = mil.block.operations[0].inputs["shape"].arguments[0].value
    value.immediateValue.tensor.ints.values.append(3)
    with pytest.raises(ValidationFailed, match="2 numbers are INT32"):
        run(mil.save())


def test_three_bits_with_rows_that_begin_inside_bytes(mil: Any) -> None:
    """Worked by hand: 5 6 7 | 1 2 3 in 3 bits each, the first one lowest."""
    bits = sum(code << 3 * place for place, code in enumerate((5, 6, 7, 1, 2, 3)))
    mil.blob("codes", "UINT3", bits.to_bytes(3, "little"), 2, 3, unused=6)
    table = np.arange(8, dtype=np.float16).reshape(1, 1, 8, 1) * 10
    mil.op("constexpr_lut_to_dense", "w", "FLOAT16", 2, 3, indices="codes", lut=table)
    mil.op("gather", "y", "FLOAT16", 1, 3, x="w", indices=np.array([1], np.int32))
    mil.returns("y")
    assert run(mil.save()).tolist() == [[10, 20, 30]]
