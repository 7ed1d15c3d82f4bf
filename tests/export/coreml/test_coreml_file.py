"""Whole packages: exact sizes, exact codes, the same bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from slimport.architectures import weights
from slimport.errors import BadInput, Unsupported
from slimport.export import coreml as container
from slimport.export.container import Deployment
from slimport.export.coreml.proto import messages
from slimport.quantize.grid import GRIDS, Grid
from slimport.quantize.plan import make_plan
from slimport.quantize.tensor import QuantizedTensor, weights_digest
from slimport.tokenizer.tokenizer import Tokenizer

Variant = tuple[str, dict[str, Any]]
# In each of them some weights are in float16; qkv_proj and gate_up_proj are those of Phi 3.
PLANS: dict[str, dict[str, str]] = {
    "iOS 18": {
        "*.q_proj.*": "int4-g32-signed",
        "*.k_proj.*": "int8-g32",
        "*.o_proj.*": "int8-row",
        "*.up_proj.*": "float16",
        "*.qkv_proj.*": "float16",
    },
    "iOS 26": {
        "*.q_proj.*": "nf4-g64",
        "*.v_proj.*": "int2-g64",
        "*.gate_up_proj.*": "nf4-g64",
        "*embed_tokens*": "float16",
    },
}
GRID_NAMES = [
    *("int4-g32", "int4-g32-signed", "int8-row", "int8-g32", "int2-g64", "int2-g256", "nf4-g64"),
    *("uint4-g16", "uint4-row", "uint4-g64-f16", "int4-g64", "int8-g16-f16", "fp4-g64"),
    *("int3-g64", "float16"),
]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
Q = "model.layers.0.self_attn.q_proj.weight"
TABLE = "model.embed_tokens.weight"


def export(model: Any, source: Path, target: Path, context: int = 64) -> Path:
    """Write the files, hold them to their predicted sizes, and give back their folder."""
    target.mkdir(exist_ok=True)
    tokenizer, deployment = Tokenizer.open(source), Deployment(context, ios=26)
    container.refuse(model.decoder, model.plan, tokenizer)
    container.refuse_deployment(model.plan, deployment)
    predicted = container.predict(model.decoder, model.plan, tokenizer, model.name, deployment)
    files = container.write(model, tokenizer, target, deployment)
    assert predicted == {str(file.relative_to(target)): file.stat().st_size for file in files}
    assert files[0] == target / container.FILE
    assert set(files) == {path for path in target.rglob("*") if path.is_file()}
    return target


def spread(model: Any) -> Any:
    """Every code that a grid has, and scales of both signs where it has them."""
    random = np.random.default_rng(0)
    for tensor in model.tensors.values():
        if isinstance(tensor, QuantizedTensor):
            grid, shape = tensor.grid, tensor.codes.shape
            if grid.asymmetric:
                zero_points = random.integers(0, 16, tensor.scale.shape).repeat(
                    shape[1] // tensor.scale.shape[1], axis=1
                )
                tensor.codes[:] = random.integers(0, 16, shape) - zero_points
            else:
                tensor.codes[:] = random.integers(grid.low, grid.high + 1, shape)
            if grid.signed_scale:
                tensor.scale[::2] *= -1
    return model


def require_equal(model: Any, folder: Path) -> None:
    """Both ways of reading give what was written."""
    found, digests = container.check(model, folder), {}
    for name, tensor in container.read_back(folder, model.decoder, model.grids):
        expected = model.tensors[name]
        if isinstance(expected, QuantizedTensor):
            assert isinstance(tensor, QuantizedTensor) and tensor.grid is expected.grid
            np.testing.assert_array_equal(tensor.codes, expected.codes)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
            assert tensor.codes.flags.c_contiguous and tensor.scale.flags.c_contiguous
            digests[name] = expected.digest(name)
        else:
            halved = expected.ndim == 2
            assert (found.float_errors[name] > 0) == halved
            np.testing.assert_array_equal(tensor, expected.astype("<f2") if halved else expected)
    assert found.digests == digests and found.weights_digest == model.weights_digest
    assert found.weights_digest == weights_digest(digests)
    assert set(found.float_errors) | set(digests) == {w.name for w in weights(model.decoder)}


def message(folder: Path) -> Any:
    return messages("Model").Model.FromString((folder / container.FILE).read_bytes())


def operation(folder: Path, made: str) -> Any:
    """That which makes a value."""
    function = message(folder).mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    (found,) = [each for each in block.operations if made in [out.name for out in each.outputs]]
    return found


@pytest.mark.parametrize("plan", PLANS)
def test_every_code_comes_back(
    plan: str, variant: Variant, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    family, overrides = variant
    source = make_model(family, **overrides)
    names = in_memory(source).tensors
    patterns = {key: grid for key, grid in PLANS[plan].items() if fnmatch.filter(names, key)}
    model = spread(in_memory(source, "int4", patterns))
    require_equal(model, export(model, source, tmp_path / "files"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grid", GRID_NAMES)
def test_every_grid_in_every_place(
    grid: str, tied: bool, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    """Tables too, of one use and of two."""
    source = make_model("llama", tie_word_embeddings=tied, attention_bias=True, **WIDE)
    model = spread(in_memory(source, "int4", {"*": grid}))
    matrices = [weight for weight in weights(model.decoder) if weight.is_matrix]
    assert len(matrices) == 7 + 1 + (not tied)
    assert len(model.grids) == (0 if grid == "float16" else len(matrices))
    require_equal(model, export(model, source, tmp_path))


def test_bytes_of_weights(make_model: Any, in_memory: Any) -> None:
    """As grids say: codes and scales; float16 for matrices, float32 for what is added."""
    source = make_model("llama", attention_bias=True)
    model = in_memory(source, "int4", {"*.q_proj.*": "nf4-g64", "*.k_proj.*": "float16"})
    expected = {}
    for choice in model.plan.choices:
        size = (2 if choice.weight.is_matrix else 4) * int(np.prod(choice.weight.shape))
        if isinstance(choice.grid, Grid):
            size = choice.grid.bytes_of(choice.weight.shape)
        expected[choice.weight.name] = size
    assert expected[Q] == 64 * 32 + 64 * 4 and expected[TABLE] == 416 * 64 + 416 * 2
    assert container.tensor_bytes(model.decoder, model.plan) == expected


def test_two_exports_have_the_same_bytes(make_model: Any, in_memory: Any, tmp_path: Path) -> None:
    source = make_model("gemma2", num_hidden_layers=3)
    folders = [export(in_memory(source), source, tmp_path / name) for name in "ab"]
    first, second = (
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in folders
    )
    assert first == second and len(first) == 6
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_the_manifest_has_names_that_are_not_random(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    folder = export(in_memory(tiny_llama), tiny_llama, tmp_path)
    manifest = json.loads((folder / "Model.mlpackage/Manifest.json").read_text())
    entries = manifest["itemInfoEntries"]
    assert manifest.keys() == {"fileFormatVersion", "itemInfoEntries", "rootModelIdentifier"}
    assert [UUID(key).version for key in entries] == [5, 5]
    root = entries.pop(manifest["rootModelIdentifier"])
    (other,) = entries.values()
    for entry, name in ((root, "model.mlmodel"), (other, "weights")):
        assert entry["path"] == f"com.apple.CoreML/{name}" and entry["name"] == name
        assert entry.keys() == {"author", "description", "name", "path"}


def bytes_at(folder: Path, value: Any, count: int) -> tuple[bytes, bytes]:
    """The record of a tensor, and the first bytes of it."""
    content = (folder / container.package.paths().weights).read_bytes()
    start = value.blobFileValue.offset
    return content[start : start + 64], content[start + 64 : start + 64 + count]


def record(kind: int, size: int, offset: int) -> bytes:
    """As Apple's StorageFormat.hpp has it, by hand."""
    return struct.pack("<4sIQQQ32x", b"\xef\xbe\xad\xde", kind, size, offset + 64, 0)


# Grid: (codes, scale, bytes of the codes, bytes of the scale, types and sizes of both), by hand.
BY_HAND: dict[str, tuple[list[int], float, str, str, tuple[int, int], tuple[int, int]]] = {
    # two's complement, the first code lowest: 1, 14 | 3, 8
    "int4-g32": ([1, -2, 3, -8], 0.5, "e1 83", "0038", (8, 64 * 32), (1, 64 * 2 * 2)),
    "int4-g32-signed": ([7, -1, 0, -8], -0.5, "f7 80", "00b8", (8, 64 * 32), (1, 64 * 2 * 2)),
    "int8-g32": ([1, -2, 127, -127], 2.0, "01fe7f81", "0040", (4, 64 * 64), (1, 64 * 2 * 2)),
    "int8-row": ([0, -1, 5, 127], 1.0, "00ff057f", "003c", (4, 64 * 64), (1, 64 * 2)),
    # places in the table of -1, 0, 1, 2: 3, 2, 1, 0 and 0, 1, 2, 3
    "int2-g64": ([2, 1, 0, -1, -1, 0, 1, 2], 0.5, "1b e4", "0038", (10, 64 * 16), (1, 64 * 2)),
    # places in the table of 16 levels: 0, 15 | 1, 8; scales as they are in float32
    "nf4-g64": ([-8, 7, -7, 0], 0.5, "f0 81", "0000003f", (11, 64 * 32), (2, 64 * 4)),
}


@pytest.mark.parametrize("grid", BY_HAND)
def test_codes_and_scales_lie_as_apple_says(
    grid: str, tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    codes, scale, packed, scaled, held, scales = BY_HAND[grid]
    model = in_memory(tiny_llama, "int4", {Q: grid})
    tensor = model.tensors[Q]
    tensor.codes[0, : len(codes)], tensor.scale[0, 0] = codes, scale
    folder = export(model, tiny_llama, tmp_path)
    made = operation(folder, Q.replace(".", "_"))
    assert made.type == "constexpr_blockwise_shift_scale" and {*made.inputs} == {"data", "scale"}
    data = made.inputs["data"].arguments[0]
    if GRIDS[grid].bits == 2 or GRIDS[grid].levels:
        looked_up = operation(folder, data.name)
        assert looked_up.type == "constexpr_lut_to_dense"
        assert {*looked_up.inputs} == {"indices", "lut"}
        require_levels(folder, grid, looked_up.inputs["lut"].arguments[0].value)
        data = looked_up.inputs["indices"].arguments[0]
    for value, (kind, size), expected in (
        (data.value, held, packed),
        (made.inputs["scale"].arguments[0].value, scales, scaled),
    ):
        expected_bytes = bytes.fromhex(expected)
        found, first = bytes_at(folder, value, len(expected_bytes))
        assert found == record(kind, size, value.blobFileValue.offset)
        assert first == expected_bytes


def require_levels(folder: Path, grid: str, value: Any) -> None:
    dims = [each.constant.size for each in value.type.tensorType.dimensions]
    if grid == "int2-g64":
        assert dims == [1, 1, 4, 1]
        assert value.immediateValue.tensor.bytes.values == b"\xff\x00\x01\x02"
        return
    assert dims == [1, 1, 16, 1]
    found, first = bytes_at(folder, value, 64)
    assert found == record(2, 64, value.blobFileValue.offset)
    assert first[:4] == bytes.fromhex("000080bf") and first[28:32] == bytes(4)  # -1, 0
    assert first[4:8] == bytes.fromhex("b13932bf")  # -0.6961928009986877, as bitsandbytes has it


def test_tensors_lie_one_after_the_other(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    """A header, then a record and a tensor at multiples of 64, up to the end of the file."""
    folder = export(in_memory(tiny_llama), tiny_llama, tmp_path)
    content = (folder / container.package.paths().weights).read_bytes()
    count, version = struct.unpack_from("<II", content)
    assert version == 2 and content[8:64] == bytes(56)
    assert content[64:128] == record(4, 416 * 64, 64)  # codes of the embedding come first
    place = 64
    for _ in range(count):
        mark, kind, size, start, padding = struct.unpack_from("<IIQQQ", content, place)
        assert (mark, start, padding) == (0xDEADBEEF, place + 64, 0) and kind in (1, 2, 4, 8)
        place = -(-(start + size) // 64) * 64
        assert content[start + size : place] == bytes(place - start - size)
    assert place == len(content)


def test_a_tied_table_lies_in_the_file_once(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    content = (export(model, tiny_llama, tmp_path) / container.package.paths().weights).read_bytes()
    assert content.count(model.tensors[TABLE].codes.tobytes()) == 1


LAYERED = {"num_hidden_layers": 3}
# Masks that each (family, context) needs: a window counts where it is shorter than the context.
MASKS: dict[str, tuple[str, dict[str, Any], int, list[str], str | None]] = {
    "no window": ("llama", {}, 64, ["full"], None),
    "windows and none": ("gemma2", LAYERED, 64, ["full", "sliding"], "24"),
    "windows as long": ("gemma2", LAYERED, 24, ["full"], None),
    "only windows": ("phi3", {"sliding_window": 24}, 64, ["sliding"], "24"),
    "a longer window": ("phi3", {}, 64, ["full"], None),
}


@pytest.mark.parametrize("case", MASKS)
def test_inputs_states_and_outputs(
    case: str, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    """Names, ranges and types that swift-transformers knows."""
    family, config, context, masks, window = MASKS[case]
    source = make_model(family, **config)
    model = in_memory(source)
    described = message(export(model, source, tmp_path, context)).description
    arrays = messages("FeatureTypes").ArrayFeatureType

    def ranges(feature: Any) -> list[tuple[int, int]]:
        sizes = feature.type.multiArrayType.shapeRange.sizeRanges
        return [(each.lowerBound, each.upperBound) for each in sizes]

    ids, *given = described.input
    assert ids.name == "inputIds" and ranges(ids) == [(1, 1), (1, context)]
    assert ids.type.multiArrayType.dataType == arrays.INT32
    assert {each.name for each in given} == {f"{mask}AttentionMask" for mask in masks}
    for mask in given:
        assert ranges(mask) == [(1, 1), (1, 1), (1, context), (1, context)]
        assert mask.type.multiArrayType.dataType == arrays.FLOAT16
    decoder = model.decoder
    for state, name in zip(described.state, ("keyCache", "valueCache"), strict=True):
        array = state.type.stateType.arrayType
        assert state.name == name and array.dataType == arrays.FLOAT16
        shape = [decoder.layers, 1, decoder.kv_heads, context, decoder.head_dim]
        assert list(array.shape) == shape
    (output,) = described.output
    assert output.name == "logits" and output.type.multiArrayType.dataType == arrays.FLOAT16
    told = dict(described.metadata.userDefined)
    assert told.pop("co.huggingface.exporters.sliding_window", None) == window


def test_metadata(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    model = in_memory(tiny_llama)
    folder = export(model, tiny_llama, tmp_path, 96)
    tokenizer = Tokenizer.open(tiny_llama)
    assert len(tokenizer.eos_ids) == 2
    assert dict(message(folder).description.metadata.userDefined) == {
        "co.huggingface.exporters.name": model.name,
        "slimport.context_length": "96",
        "slimport.heads": "4",
        "slimport.vocab_size": "416",
        "slimport.stop_tokens": ",".join(map(str, tokenizer.eos_ids)),
        "slimport.bos_token": str(tokenizer.bos_id),
        "slimport.weights_digest": model.weights_digest,
    }


def test_the_tokenizer_beside_it(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    """It loads in transformers, whose classes swift-transformers follows."""
    folder = export(in_memory(tiny_llama), tiny_llama, tmp_path)
    assert (folder / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    source = Tokenizer.open(tiny_llama)
    assert settings["chat_template"] == source.chat_template
    assert settings["bos_token"] == source.special["bos_token"] and settings["add_bos_token"]
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "model_type": "llama",
        "bos_token_id": source.bos_id,
        "eos_token_id": list(source.eos_ids),
    }


RELEASES: dict[str, tuple[Mapping[str, str], int, int, str]] = {
    "codes and scales": ({"*.q_proj.*": "int8-g32"}, 18, 9, "CoreML8"),
    "floats": ({"*": "float16"}, 18, 9, "CoreML8"),
    "one weight of nf4": ({"*.0.*q_proj.*": "nf4-g64"}, 26, 10, "CoreML9"),
    "one weight of int2": ({"*.1.*q_proj.*": "int2-g64"}, 26, 10, "CoreML9"),
}


@pytest.mark.parametrize("case", RELEASES)
def test_the_oldest_release_that_has_the_operations(
    case: str, tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    patterns, release, specification, opset = RELEASES[case]
    model = in_memory(tiny_llama, "int4", patterns)
    written = message(export(model, tiny_llama, tmp_path))
    assert written.specificationVersion == specification
    assert [each.opset for each in written.mlProgram.functions.values()] == [opset]
    minimum = container.minimum_runtime(
        model.decoder, model.plan, Tokenizer.open(tiny_llama), False
    )
    assert (minimum.runtime, minimum.build) == ("iOS", str(release))
    for ios in (None, 26):
        container.refuse_deployment(model.plan, Deployment(64, ios=ios))
    if release == 18:
        container.refuse_deployment(model.plan, Deployment(64, ios=18))
        return
    with pytest.raises(Unsupported, match="iOS 18 cannot decompress the grid") as failure:
        container.refuse_deployment(model.plan, Deployment(64, ios=18))
    grid = next(iter(patterns.values()))
    assert grid in failure.value.what and "iOS 26" in failure.value.why
    assert "--preset int4" in failure.value.cure and "--target ios26" in failure.value.cure


@pytest.mark.parametrize("grid", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_ggml_are_refused(grid: str, make_model: Any, in_memory: Any) -> None:
    source = make_model("llama", **WIDE)
    config = in_memory(source).decoder
    plan = make_plan(config, "int4", "rtn", {Q: grid})
    with pytest.raises(Unsupported, match=f"{Q}: Core ML cannot hold the grid {grid}") as failure:
        container.refuse(config, plan, Tokenizer.open(source))
    assert "--preset int4" in failure.value.cure and "--container gguf" in failure.value.cure
    with pytest.raises(Unsupported, match=grid):
        container.predict(config, plan, Tokenizer.open(source), "name", Deployment(64))


def test_a_model_without_tokenizer_json_is_refused(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    shutil.copy(tiny_llama / "config.json", tmp_path)
    data = Path(__file__).parents[2] / "data"
    shutil.copy(data / "llama.tokenizer.model", tmp_path / "tokenizer.model")
    with pytest.raises(Unsupported, match=r"no tokenizer\.json") as failure:
        container.refuse(model.decoder, model.plan, Tokenizer.open(tmp_path))
    assert "save_pretrained" in failure.value.cure


def test_a_vocabulary_that_is_too_small_is_refused(tiny_llama: Path, in_memory: Any) -> None:
    model = in_memory(tiny_llama)
    small = dataclasses.replace(model.decoder, vocab_size=300)
    with pytest.raises(BadInput, match="300"):
        container.refuse(small, model.plan, Tokenizer.open(tiny_llama))


def test_numbers_beyond_float16_are_refused(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    """Of a matrix; what is added is float32 and holds them."""
    model = in_memory(tiny_llama, "int4", {Q: "float16"})
    model.tensors["model.norm.weight"][0] = 7e4
    require_equal(model, export(model, tiny_llama, tmp_path / "norm"))
    model.tensors[Q][3, 5] = -65520.0
    with pytest.raises(Unsupported, match=f"{Q}: its largest weight 65520 does not fit"):
        export(model, tiny_llama, tmp_path / "matrix")


def test_a_scale_that_float16_does_not_hold_is_refused(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    model.tensors[Q].scale[0, 0] = np.float32(1 / 3)
    with pytest.raises(Unsupported, match="not exact in fp16"):
        export(model, tiny_llama, tmp_path)


def test_windows_and_ropes_leave_the_context_as_it_is(make_model: Any, in_memory: Any) -> None:
    decoder = in_memory(make_model("mistral", sliding_window=24), "int8").decoder
    assert container.context_length(decoder) == decoder.context_length == 256
    assert {container.kv_cache(wanted) for wanted in ("f16", "f32", "q8_0")} == {"f16"}
