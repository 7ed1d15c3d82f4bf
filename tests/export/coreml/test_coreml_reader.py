"""Packages that lie, and damaged and hostile ones: found, named, never a crash."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.errors import BadInput, SlimportError, ValidationFailed
from slimport.export import coreml as container
from slimport.export.container import Deployment
from slimport.export.coreml.package import paths
from slimport.export.coreml.proto import messages
from slimport.tokenizer.tokenizer import Tokenizer

Written = tuple[Any, Path]
MODEL, MANIFEST, WEIGHTS = paths().model, paths().manifest, paths().weights
ATTENTION = "model.layers.0.self_attn."
Q, K, V, OUT = (f"{ATTENTION}{name}_proj.weight" for name in "qkvo")
UP, GATE = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def written(make_model: Any, in_memory: Any, tmp_path_factory: Any) -> Written:
    """A tied Llama with biases; int4, int8, NF4, int2 and float16 matrices."""
    source = make_model("llama", attention_bias=True)
    patterns = {Q: "int4-g32-signed", OUT: "nf4-g64", UP: "int2-g64", DOWN: "float16"}
    model = in_memory(source, "int4", patterns)
    folder = tmp_path_factory.mktemp("coreml")
    container.write(model, Tokenizer.open(source), folder, Deployment(64, ios=26))
    return model, folder


class Package:
    """A copy that is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = messages("Model").Model.FromString((folder / MODEL).read_bytes())
        self.content = bytearray((folder / WEIGHTS).read_bytes())
        self.function = self.model.mlProgram.functions["main"]
        self.block = self.function.block_specializations[self.function.opset]

    def save(self) -> None:
        (self.folder / MODEL).write_bytes(self.model.SerializeToString(deterministic=True))
        (self.folder / WEIGHTS).write_bytes(self.content)

    def made(self, name: str) -> Any:
        """The operation that makes a value."""
        wanted = name.replace(".", "_")
        found: Any = next(
            each for each in self.block.operations if wanted in [out.name for out in each.outputs]
        )
        return found

    def value(self, name: str, part: str) -> Any:
        """Where codes, scales, levels or the numbers of a weight lie."""
        made = self.made(name)
        if part == "values":
            return made.attributes["val"]
        if part in ("codes", "levels"):
            argument = made.inputs["data"].arguments[0]
            if argument.WhichOneof("binding") == "value":
                return argument.value
            made, part = self.made(argument.name), {"codes": "indices", "levels": "lut"}[part]
        return made.inputs[part].arguments[0].value

    def start(self, name: str, part: str) -> int:
        """Of a record in the weight file."""
        return int(self.value(name, part).blobFileValue.offset)

    def flip(self, name: str, part: str, place: int, bits: int) -> None:
        """Some bits of a byte of a tensor."""
        self.content[self.start(name, part) + 64 + place] ^= bits

    def record(self, name: str, part: str, place: int, form: str, number: int) -> None:
        """A field of a record."""
        struct.pack_into(form, self.content, self.start(name, part) + place, number)

    def readers(self, name: str) -> list[Any]:
        """Arguments of operations that are a value."""
        wanted = name.replace(".", "_")
        return [
            argument
            for operation in self.block.operations
            for given in operation.inputs.values()
            for argument in given.arguments
            if argument.name == wanted
        ]


@pytest.fixture
def package(written: Written, tmp_path: Path) -> Package:
    return Package(shutil.copytree(written[1], tmp_path / "copy"))


Change = Callable[[Package], Any]


def swap_names(package: Package, first: str, second: str) -> None:
    """What makes a weight makes the other one."""
    one, other = (package.made(name).outputs[0] for name in (first, second))
    one.name, other.name = other.name, one.name


def swap_uses(package: Package, first: str, second: str) -> None:
    """What reads a weight reads the other one."""
    one, other = package.readers(first), package.readers(second)
    assert one and other
    for each in one:
        each.name = second.replace(".", "_")
    for each in other:
        each.name = first.replace(".", "_")


def swap_places(package: Package, first: str, second: str, part: str) -> None:
    one, other = (package.value(name, part).blobFileValue for name in (first, second))
    one.offset, other.offset = other.offset, one.offset


def table(package: Package, name: str) -> int:
    """Where the numbers of a table that is no weight begin."""
    return int(package.made(name).attributes["val"].blobFileValue.offset) + 64


def change_zero(package: Package) -> None:
    package.content[table(package, "zeros_64_f2") + 1] = 0x3C  # 1.0


def change_rope(package: Package) -> None:
    """The sine of the second position becomes its cosine."""
    sines, cosines = table(package, "rope_0_sin") + 32, table(package, "rope_0_cos") + 32
    package.content[sines : sines + 4] = package.content[cosines : cosines + 4]


def swap_ropes(package: Package) -> None:
    swap_names(package, "rope_0_sin", "rope_0_cos")


def another_function(package: Package) -> None:
    """It reads the scales of another weight."""
    other = package.model.mlProgram.functions["other"]
    other.CopyFrom(package.function)
    block = other.block_specializations[other.opset]
    made = next(each for each in block.operations
                if each.outputs and each.outputs[0].name == K.replace(".", "_"))  # fmt: skip
    made.inputs["scale"].arguments[0].value.CopyFrom(package.value(V, "scale"))


def zero_point(package: Package) -> None:
    package.made(K).inputs["offset"].CopyFrom(package.made(K).inputs["scale"])


def retyped(package: Package, name: str, part: str, kind: str) -> None:
    found = messages("MIL").DataType.Value(kind)
    package.value(name, part).type.tensorType.dataType = found


def resized(package: Package, name: str, part: str, *sizes: int) -> None:
    dims = package.value(name, part).type.tensorType.dimensions
    for dimension, size in zip(dims, sizes, strict=True):
        dimension.constant.size = size


def inside(package: Package, name: str, part: str) -> None:
    """Numbers that lie in the program, as many as they should be, and all of them zeros."""
    value = package.value(name, part)
    sizes = [each.constant.size for each in value.type.tensorType.dimensions]
    value.immediateValue.tensor.bytes.values = bytes(int(np.prod(sizes)) * 2)


def codes_inside(package: Package) -> None:
    """Codes of 2 bits in the program, one to a byte: Core ML would read four in each."""
    value = package.value(UP, "codes")
    start = package.start(UP, "codes") + 64
    packed = np.frombuffer(bytes(package.content[start : start + 96 * 16]), np.uint8)
    codes = packed[:, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
    value.immediateValue.tensor.bytes.values = codes.tobytes()


def look_up(package: Package, key: str) -> Any:
    return package.made(package.made(UP).inputs["data"].arguments[0].name).inputs[key]


# Change: the error, and words of it.
DAMAGES: dict[str, tuple[Change, type[SlimportError], list[str]]] = {
    "a nibble of int4": (
        lambda p: p.flip(K, "codes", 33, 0x10),
        ValidationFailed,
        [K, "codes [1, 3]"],
    ),
    "the low nibble of NF4": (
        lambda p: p.flip(OUT, "codes", 32, 0x01),
        ValidationFailed,
        [OUT, "codes [1, 0]"],
    ),
    "two bits": (lambda p: p.flip(UP, "codes", 0, 0x80), ValidationFailed, [UP, "codes [0, 3]"]),
    "a byte": (lambda p: p.flip(TABLE, "codes", 65, 0x02), ValidationFailed, [TABLE, "[1, 1]"]),
    "a scale": (lambda p: p.flip(K, "scale", 5, 0x04), ValidationFailed, [K, "scale [1, 0]"]),
    "a scale of float32": (
        lambda p: p.flip(OUT, "scale", 6, 0x01),
        ValidationFailed,
        [OUT, "scale [1, 0]"],
    ),
    "the sign of a scale": (lambda p: p.flip(K, "scale", 1, 0x80), BadInput, [K, "a scale"]),
    "the sign of a scale that has one": (
        lambda p: p.flip(Q, "scale", 1, 0x80),
        ValidationFailed,
        [Q, "scale [0, 0]"],
    ),
    "a scale that is infinite": (
        lambda p: p.content.__setitem__(
            slice(p.start(K, "scale") + 64, p.start(K, "scale") + 66), bytes.fromhex("007c")
        ),
        BadInput,
        [K, "a scale"],
    ),
    "a scale that is no number": (
        lambda p: p.content.__setitem__(
            slice(p.start(K, "scale") + 64, p.start(K, "scale") + 66), bytes.fromhex("017e")
        ),
        BadInput,
        [K, "a scale"],
    ),
    "a norm that is no number": (
        lambda p: p.content.__setitem__(
            slice(p.start(NORM, "values") + 66, p.start(NORM, "values") + 68), b"\xc0\x7f"
        ),
        ValidationFailed,
        [NORM, "weight [0] reads nan"],
    ),
    "a float of a matrix": (
        lambda p: p.flip(DOWN, "values", 3, 0x01),
        ValidationFailed,
        [DOWN, "weight [0, 1]"],
    ),
    "a float of a norm": (
        lambda p: p.flip(NORM, "values", 4, 0x01),
        ValidationFailed,
        [NORM, "weight [1]"],
    ),
    "a float of a bias": (
        lambda p: p.flip(f"{ATTENTION}q_proj.bias", "values", 0, 0x01),
        ValidationFailed,
        ["q_proj.bias", "weight [0]"],
    ),
    "code -128": (
        lambda p: p.content.__setitem__(p.start(TABLE, "codes") + 64, 0x80),
        BadInput,
        [TABLE, "a code"],
    ),
    "a level": (
        lambda p: p.flip(OUT, "levels", 5, 0x01),
        BadInput,
        [OUT, "other levels than nf4-g64"],
    ),
    "the levels of two bits": (
        lambda p: setattr(p.value(UP, "levels").immediateValue.tensor.bytes, "values", b"\0\1\2\3"),
        BadInput,
        [UP, "other levels than int2-g64"],
    ),
    "levels that are too few": (
        lambda p: resized(p, OUT, "levels", 1, 1, 8, 1),
        BadInput,
        [OUT, "FLOAT32 (8,) does not fill 64 bytes"],
    ),
    "names of two weights": (lambda p: swap_names(p, K, V), ValidationFailed, [K, "codes"]),
    "names of two norms": (
        lambda p: swap_names(p, NORM, "model.layers.0.post_attention_layernorm.weight"),
        ValidationFailed,
        ["layers.0", "layernorm", "weight [0]"],
    ),
    "uses of two weights": (
        lambda p: swap_uses(p, K, V),
        BadInput,
        ["v_proj_weight in the place of", "k_proj_weight"],
    ),
    "names and uses of two weights": (
        lambda p: (swap_names(p, K, V), swap_uses(p, K, V)),
        BadInput,
        ["v_proj_weight in the place of", "k_proj_weight"],
    ),
    "codes in the program": (codes_inside, BadInput, [UP, "UINT2"]),
    "codes of two weights": (
        lambda p: swap_places(p, K, V, "codes"),
        ValidationFailed,
        [K, "codes"],
    ),
    "scales of two weights": (
        lambda p: swap_places(p, K, V, "scale"),
        ValidationFailed,
        [K, "scale"],
    ),
    "a weight that nothing reads": (
        lambda p: [setattr(each, "name", GATE.replace(".", "_")) for each in p.readers(UP)],
        BadInput,
        ["down_proj_weight in the place of", "up_proj_weight"],
    ),
    "a number of a rope": (change_rope, BadInput, ["rope_0_sin has other numbers"]),
    "sines for cosines": (swap_ropes, BadInput, ["rope_0_", "has other numbers"]),
    "a bias that adds something": (change_zero, BadInput, ["zeros_64_f2 has other numbers"]),
    "another function": (another_function, BadInput, [f"{K} is read from 2 different places"]),
    "a zero point": (zero_point, BadInput, [K]),
    "an unknown operation": (
        lambda p: setattr(p.made(K), "type", "constexpr_affine_dequantize"),
        BadInput,
        [K, "constexpr_affine_dequantize"],
    ),
    "an unknown look-up": (
        lambda p: setattr(
            p.made(p.made(UP).inputs["data"].arguments[0].name), "type", "constexpr_sparse_to_dense"
        ),
        BadInput,
        [UP, "constexpr_sparse_to_dense"],
    ),
    "vectors": (
        lambda p: look_up(p, "vector_axis").CopyFrom(look_up(p, "lut")),
        BadInput,
        [UP, "looked up"],
    ),
    "a float that is computed": (
        lambda p: setattr(p.made(DOWN), "type", "constexpr_cast"),
        BadInput,
        [DOWN, "constexpr_cast"],
    ),
    "a weight that is not there": (
        lambda p: setattr(p.made(K).outputs[0], "name", "another"),
        BadInput,
        [f"{K}: it is not there"],
    ),
    "another type in the program": (
        lambda p: retyped(p, K, "codes", "UINT4"),
        BadInput,
        [K, "type 11"],
    ),
    "a type that nothing has": (
        lambda p: retyped(p, K, "codes", "BOOL"),
        BadInput,
        [K, "of type BOOL"],
    ),
    "another type in the record": (
        lambda p: p.record(K, "codes", 4, "<I", 11),
        BadInput,
        [K, "there is no tensor of type 8"],
    ),
    "no mark": (
        lambda p: p.record(K, "codes", 0, "<I", 0xDEADBEEE),
        BadInput,
        [K, "there is no tensor of type 8"],
    ),
    "a size beyond the file": (
        lambda p: p.record(K, "codes", 8, "<Q", 1 << 60),
        BadInput,
        [K, f"has {1 << 60} bytes"],
    ),
    "a size that is too small": (
        lambda p: p.record(K, "codes", 8, "<Q", 1023),
        BadInput,
        [K, "INT4 (32, 64) does not fill 1023 bytes"],
    ),
    "bytes of another place": (
        lambda p: p.record(K, "codes", 16, "<Q", 128),
        BadInput,
        [K, "there is no tensor"],
    ),
    "bits of padding": (lambda p: p.record(K, "codes", 24, "<Q", 8), BadInput, [K, "1024 bytes"]),
    "a place beyond the file": (
        lambda p: setattr(p.value(K, "codes").blobFileValue, "offset", 1 << 40),
        BadInput,
        [K, f"a tensor lies at {1 << 40}"],
    ),
    "a place between records": (
        lambda p: setattr(p.value(K, "codes").blobFileValue, "offset", p.start(K, "codes") + 8),
        BadInput,
        [K, "a tensor lies at"],
    ),
    "the header": (
        lambda p: setattr(p.value(K, "codes").blobFileValue, "offset", 0),
        BadInput,
        [K, "a tensor lies at 0"],
    ),
    "another file": (
        lambda p: setattr(p.value(K, "codes").blobFileValue, "fileName", "@model_path/../x"),
        BadInput,
        [K, "a tensor lies in @model_path/../x"],
    ),
    "another shape": (lambda p: resized(p, K, "codes", 64, 32), BadInput, [K, "(64, 32)"]),
    "a huge shape": (
        lambda p: resized(p, K, "codes", 1 << 40, 1 << 40),
        BadInput,
        [K, "does not fill"],
    ),
    "groups of 64": (lambda p: resized(p, K, "scale", 64, 1), BadInput, [K, "(64,), not (32, 2)"]),
    "scales in the program": (lambda p: inside(p, K, "scale"), BadInput, [K, "a scale"]),
    "another version": (lambda p: struct.pack_into("<I", p.content, 4, 1), BadInput, ["version 1"]),
    "a cut weight file": (
        lambda p: p.content.__delitem__(slice(len(p.content) // 2, None)),
        BadInput,
        ["bytes"],
    ),
    "a header alone": (lambda p: p.content.__delitem__(slice(64, None)), BadInput, ["a tensor"]),
    "no weight file": (lambda p: p.content.clear(), BadInput, ["empty"]),
    "no function": (lambda p: p.model.mlProgram.functions.clear(), BadInput, ["no function"]),
    "no program": (lambda p: p.model.Clear(), BadInput, ["no function"]),
    "operations of another release": (
        lambda p: setattr(p.function, "opset", "CoreML8"),
        BadInput,
        [],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(damage: str, written: Written, package: Package) -> None:
    change, kind, words = DAMAGES[damage]
    change(package)
    package.save()
    with pytest.raises(kind) as failure:
        container.check(written[0], package.folder)
    error = failure.value
    assert type(error) is kind
    for word in words:
        assert word in f"{error.what}: {error.why}"
    if kind is BadInput:
        assert error.what == "Model.mlpackage is not a package that slimport wrote"
        assert len(error.why) > 8 and error.cure == "export it again"
        with pytest.raises(BadInput):
            dict(container.read_back(package.folder, written[0].decoder, written[0].grids))


def test_a_package_that_is_saved_again_is_whole(written: Written, package: Package) -> None:
    package.save()
    assert (package.folder / MODEL).read_bytes() == (written[1] / MODEL).read_bytes()
    assert container.check(written[0], package.folder).weights_digest == written[0].weights_digest


def test_a_second_function_of_the_same_weights(written: Written, package: Package) -> None:
    package.model.mlProgram.functions["other"].CopyFrom(package.function)
    package.save()
    assert container.check(written[0], package.folder).digests


@pytest.mark.parametrize("part", [MANIFEST, MODEL, WEIGHTS])
def test_a_missing_empty_or_foreign_file_is_refused(
    part: str, written: Written, package: Package
) -> None:
    file = package.folder / part
    whole = file.read_bytes()
    for content in (b"", b"\0", b"nothing of this kind", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(BadInput, match=r"Model\.mlpackage"):
            container.check(written[0], package.folder)
    file.unlink()
    with pytest.raises(BadInput, match=r"Model\.mlpackage"):
        container.check(written[0], package.folder)


@pytest.mark.parametrize(
    "path", ["com.apple.CoreML/other.mlmodel", "../../x", "/etc/passwd", "", None, 3]
)
def test_a_manifest_of_another_model_is_refused(
    path: Any, written: Written, package: Package
) -> None:
    file = package.folder / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path
    file.write_text(json.dumps(manifest))
    with pytest.raises(BadInput) as failure:
        container.check(written[0], package.folder)
    assert failure.value.why == f"its manifest names {path}"


@pytest.mark.parametrize("manifest", ["[]", "{}", "3", '{"itemInfoEntries": 3}', "[" * 2000])
def test_a_manifest_that_is_none_is_refused(
    manifest: str, written: Written, package: Package
) -> None:
    (package.folder / MANIFEST).write_text(manifest)
    with pytest.raises(BadInput, match="is not a package"):
        container.check(written[0], package.folder)


def test_another_grid_and_no_grid_are_refused(written: Written) -> None:
    model, folder = written
    for name in (K, OUT, UP):
        for grid in ("int4-g32", "int8-row", "int2-g64", "int2-g256", "nf4-g64", "int8-g32"):
            if grid != model.grids[name]:
                with pytest.raises(BadInput, match="is not a package"):
                    dict(container.read_back(folder, model.decoder, {**model.grids, name: grid}))
        fewer = {key: grid for key, grid in model.grids.items() if key != name}
        with pytest.raises(BadInput) as failure:
            dict(container.read_back(folder, model.decoder, fewer))
        assert name in failure.value.why
    with pytest.raises(BadInput) as failure:
        dict(container.read_back(folder, model.decoder, {**model.grids, DOWN: "int8-row"}))
    assert DOWN in failure.value.why


def test_any_flipped_bit_of_a_tensor_is_found(written: Written, package: Package) -> None:
    """Of weights, of tables of the rope and of zeros; not the highest of a byte, as -0.0 is 0.0."""
    chance, place, count = random.Random(0), 64, 0
    whole = bytes(package.content)
    while place < len(whole):
        size = struct.unpack_from("<Q", whole, place + 8)[0]
        package.content[:] = whole
        package.content[place + 64 + chance.randrange(size)] ^= 1 << chance.randrange(7)
        (package.folder / WEIGHTS).write_bytes(package.content)
        with pytest.raises((BadInput, ValidationFailed)):
            container.check(written[0], package.folder)
        place, count = -(-(place + 64 + size) // 64) * 64, count + 1
    assert count == struct.unpack_from("<I", whole)[0]


@pytest.mark.parametrize("part", [MODEL, WEIGHTS])
def test_bytes_changed_at_random_are_refused_or_mean_the_same(
    part: str, written: Written, package: Package
) -> None:
    """Of the program, and of the records; many bytes of a program are not read back."""
    chance, refused = random.Random(1), 0
    whole = (package.folder / part).read_bytes()
    places = list(range(len(whole)))
    if part == WEIGHTS:
        places, start = [], 64
        while start < len(whole):
            places += range(start, start + 32)
            size = struct.unpack_from("<Q", whole, start + 8)[0]
            start = -(-(start + 64 + size) // 64) * 64
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            content[chance.choice(places)] = chance.randrange(256)
        (package.folder / part).write_bytes(content)
        try:
            found = container.check(written[0], package.folder)
        except SlimportError as error:
            assert isinstance(error, (BadInput, ValidationFailed))
            refused += 1
        else:
            assert found.weights_digest == written[0].weights_digest
    assert refused > 20
