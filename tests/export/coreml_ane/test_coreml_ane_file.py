"""Packages for the Neural Engine: what they hold, byte for byte, and what is refused."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, Unsupported, ValidationFailed
from slimport.export import coreml_ane as container
from slimport.export.container import Deployment
from slimport.export.coreml import packing, reader
from slimport.export.coreml.package import package_name, paths
from slimport.export.coreml.proto import blob_library, messages
from slimport.export.coreml_ane import layout
from slimport.export.layout import UINT3, UINT4, UINT6, Stored
from slimport.quantize.palette import LUT3_R16, LUT4_R16, LUT6_R16, PaletteTensor
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.tokenizer.tokenizer import Tokenizer

CONTEXT = 90  # no power of two
DEPLOYMENT = Deployment(CONTEXT)
HALVES = {"*": "float16"}
# Every grid, and what of a family changes the layout.
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
    "lut4": ("lut4", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "lut4, q and k normed": ("lut4", "qwen3", {}, {}),
    "lut3": ("lut3", "qwen2", {"tie_word_embeddings": False}, {}),
    "lut3, rows end within a byte": ("lut3", "llama", {"intermediate_size": 90}, {}),
    "lut6": ("lut6", "qwen2", {"tie_word_embeddings": False}, {}),
    "lut6, rows end within a byte": ("lut6", "llama", {"intermediate_size": 90}, {}),
    "lut4, rows end within a byte": ("lut4", "llama", {"intermediate_size": 45}, {}),
    "int8": ("int8", "olmo2", {}, {}),
    "float16": ("int8", "phi3", {}, HALVES),
    "mixed": ("lut4", "llama", {}, {"*down_proj*": "int8-row", "*layers.0.*": "float16"}),
}


@dataclass(frozen=True)
class Exported:
    """A model folder, its quantized checkpoint, and the folder of the packages made of it."""

    model: Path
    quantized: QuantizedCheckpoint
    folder: Path
    files: list[Path]

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.open(self.model)

    @property
    def grids(self) -> dict[str, str]:
        return {c.weight.name: c.grid.name for c in self.quantized.plan.choices if c.grid}

    def again(self, folder: Path) -> list[Path]:
        return container.write(self.quantized, self.tokenizer, folder, DEPLOYMENT)


def export(model: Path, folder: Path, preset: str, patterns: Mapping[str, str] = {}) -> Exported:
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
    tokenizer = Tokenizer.open(model)
    container.refuse(quantized.decoder, plan, tokenizer)
    out = folder / "out"
    return Exported(model, quantized, out, container.write(quantized, tokenizer, out, DEPLOYMENT))


@pytest.fixture(scope="module")
def small(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """In 4 bits; one package. Copy it before changing it."""
    return export(tiny_llama, tmp_path_factory.mktemp("small"), "lut4")


@contextmanager
def small_packages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "parts", partial(layout.parts, limit=90_000))
        yield


@pytest.fixture(scope="module")
def halves(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Five layers and a tied table, in two packages."""
    model = make_model("llama", num_hidden_layers=5)
    with small_packages():
        return export(model, tmp_path_factory.mktemp("halves"), "lut4")


def functions_of(file: Path) -> Any:
    return messages("Model").Model.FromString(file.read_bytes()).mlProgram.functions


def operations_of(function: Any) -> Any:
    return function.block_specializations[function.opset].operations


def stored_in(function: Any) -> dict[tuple[str, str], tuple[int, int]]:
    """{(what is made, of what): (data type, offset)} of all that is in the weight file."""
    found = {}
    for operation in operations_of(function):
        values = {"val": operation.attributes["val"]} if operation.type == "const" else {}
        values |= {key: each.arguments[0].value for key, each in operation.inputs.items()}
        for key, value in values.items():
            if value.WhichOneof("value") == "blobFileValue":
                kind = value.type.tensorType.dataType
                found[operation.outputs[0].name, key] = kind, value.blobFileValue.offset
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_is_what_was_quantized(kind: str, make_model: Any, tmp_path: Path) -> None:
    preset, family, config, patterns = MODELS[kind]
    made = export(make_model(family, **config), tmp_path, preset, patterns)
    quantized, plan = made.quantized, made.quantized.plan
    found = container.check(quantized, made.folder)
    assert found.weights_digest == quantized.weights_digest
    assert found.digests == {name: quantized.records[name].digest for name in made.grids}
    assert max(found.float_errors.values()) < 1e-3  # float16 near 1
    read = dict(container.read_back(made.folder, quantized.decoder, made.grids))
    assert list(read) == [choice.weight.name for choice in plan.choices]
    for name, value in read.items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, quantized.rows(name).astype(np.float16))
        else:
            assert value.digest(name) == quantized.records[name].digest
    given = (quantized.decoder, plan, made.tokenizer, quantized.name, DEPLOYMENT)
    sizes = {path.relative_to(made.folder).as_posix(): path.stat().st_size for path in made.files}
    assert container.predict(*given) == sizes
    assert {*sizes} == {
        path.relative_to(made.folder).as_posix()
        for path in made.folder.rglob("*")
        if path.is_file()
    }
    weights = made.folder / paths().weights
    tensors = container.tensor_bytes(quantized.decoder, plan)
    assert tensors.keys() == read.keys()
    assert 0.7 * weights.stat().st_size < sum(tensors.values()) < weights.stat().st_size


def test_two_writes_are_the_same_bytes(small: Exported, tmp_path: Path) -> None:
    for one, other in zip(small.files, small.again(tmp_path), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_functions_share_every_weight(small: Exported) -> None:
    functions = functions_of(small.files[0])
    assert sorted(functions) == ["decode", "prefill"]
    decode, prefill = (stored_in(functions[name]) for name in ("decode", "prefill"))
    assert decode == prefill
    weights = (small.folder / paths().weights).read_bytes()
    count = int.from_bytes(weights[:4], "little")
    assert len(set(decode.values())) == count  # and nothing else is in the file
    table = {key[0] for key, place in decode.items() if key[1] == "data" and place[1] == 64}
    assert table == {"model_embed_tokens_weight", "model_embed_tokens_weight_again"}


@pytest.mark.parametrize(
    ("config", "context", "state"),
    [
        ({}, 90, (4, 2, 128, 32)),
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 24, "hidden_size": 96},
         128, (4, 4, 128, 32)),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 80, "hidden_size": 80},
         129, (4, 8, 256, 128)),
        ({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}, 1, (4, 1, 64, 64)),
    ],
)  # fmt: skip
def test_states_are_as_the_neural_engine_takes_them(
    config: dict[str, int], context: int, state: tuple[int, ...], make_model: Any, tmp_path: Path
) -> None:
    model = make_model("llama", **config)
    checkpoint = Checkpoint.open(model)
    decoder = decoder_config(checkpoint.config)
    plan = make_plan(decoder, "int8", "rtn", {})
    (part,) = layout.parts(decoder, plan, Deployment(context))
    assert layout.state_of(decoder, part, context) == state
    for tokens in (1, layout.CHUNK):
        function = container.decoder_function(decoder, part, context, tokens, container.IOS18)
        message = function.message()
        ids, position, cache = message.inputs
        wrapped = cache.type.stateType.wrappedType.tensorType
        assert tuple(each.constant.size for each in wrapped.dimensions) == state
        assert [ids.name, position.name] == ["inputIds", "position"]
        dimensions = ids.type.tensorType.dimensions
        assert [each.constant.size for each in dimensions] == [1, tokens]


def test_a_description_says_what_functions_take(halves: Exported) -> None:
    for place, given in enumerate(("inputIds", "hidden")):
        file = halves.folder / paths(package_name(place)).model
        description = messages("Model").Model.FromString(file.read_bytes()).description
        assert description.defaultFunctionName == "decode"
        for function, tokens in zip(description.functions, (1, 64), strict=True):
            assert [each.name for each in function.input] == [given, "position"]
            (state,) = function.state
            assert list(state.type.stateType.arrayType.shape) == [2 * (3, 2)[place], 2, 128, 32]
            (output,) = function.output
            shape = [1, 64, 1, tokens] if place == 0 else [1, tokens, 416]
            assert list(output.type.multiArrayType.shape) == shape
            assert output.name == ("hiddenOut", "logits")[place]


def test_a_large_model_is_several_packages(halves: Exported) -> None:
    quantized, plan = halves.quantized, halves.quantized.plan
    given = (quantized.decoder, plan, halves.tokenizer, quantized.name, DEPLOYMENT)
    with small_packages():
        found = layout.parts(quantized.decoder, plan, DEPLOYMENT)
        predicted = container.predict(*given)
    assert [part.name for part in found] == ["Model.mlpackage", "Model_2.mlpackage"]
    assert [part.layers for part in found] == [range(3), range(3, 5)]
    assert [(part.first, part.last) for part in found] == [(True, False), (False, True)]
    assert all(part.layout.nbytes < 90_000 + 64 * 100 for part in found)  # and tables of ropes
    assert container.check(quantized, halves.folder).weights_digest == quantized.weights_digest
    read = dict(container.read_back(halves.folder, quantized.decoder, halves.grids))
    assert len(read) == len(plan.choices)
    for path in halves.files:
        assert predicted.pop(path.relative_to(halves.folder).as_posix()) == path.stat().st_size
    assert not predicted


def test_no_package_is_beyond_the_limit(make_model: Any) -> None:
    """The copy of a tied table in the last one counts, which follows from all of the model."""
    decoder = decoder_config(Checkpoint.open(make_model("llama", num_hidden_layers=9)).config)
    plan = make_plan(decoder, "lut4", "rtn", {})
    for limit in range(63_000, 240_000, 7_000):  # a layer and the table are 62,848 bytes
        found = layout.parts(decoder, plan, DEPLOYMENT, limit=limit)
        assert [n for part in found for n in part.layers] == list(range(9))
        for part in found:
            held = [tensor for tensor in part.layout.tensors if not tensor.name.startswith("rope")]
            assert sum(64 + tensor.nbytes for tensor in held) <= limit


def change(folder: Path, copy: Path, name: str, at: Callable[[bytes], int]) -> Path:
    """The packages with one bit flipped in the weights of one."""
    shutil.copytree(folder, copy)
    file = copy / paths(name).weights
    content = bytearray(file.read_bytes())
    content[at(bytes(content))] ^= 1
    file.write_bytes(bytes(content))
    return copy


def codes_of(file: Path, made: str) -> int:
    """Where the codes of a weight begin in the weight file."""
    stored = stored_in(functions_of(file)["decode"])
    found = {key[1]: place[1] for key, place in stored.items() if key[0] == made}
    return found.get("data", found.get("indices", 0)) + 64


@pytest.mark.parametrize("name", ["Model.mlpackage", "Model_2.mlpackage"])
def test_a_damaged_copy_of_a_tied_table_is_refused(
    name: str, halves: Exported, tmp_path: Path
) -> None:
    start = codes_of(halves.folder / paths(name).model, "model_embed_tokens_weight")
    folder = change(halves.folder, tmp_path / "copy", name, lambda _: start + 1000)
    with pytest.raises(BadInput, match=r"Model_2\.mlpackage is not a package") as failure:
        dict(container.read_back(folder, halves.quantized.decoder, halves.grids))
    assert "its model.embed_tokens.weight is not that of Model.mlpackage" in failure.value.why
    with pytest.raises(BadInput):
        container.check(halves.quantized, folder)


def test_a_damaged_palette_is_found(small: Exported, tmp_path: Path) -> None:
    made = "model_layers_1_mlp_up_proj_weight"
    start = codes_of(small.files[0], made)
    folder = change(small.folder, tmp_path / "codes", "Model.mlpackage", lambda _: start)
    with pytest.raises(ValidationFailed, match=r"layers\.1\.mlp\.up_proj"):
        container.check(small.quantized, folder)
    levels = stored_in(functions_of(small.files[0])["decode"])[made, "lut"][1] + 64
    folder = change(small.folder, tmp_path / "levels", "Model.mlpackage", lambda _: levels)
    with pytest.raises(ValidationFailed, match=r"layers\.1\.mlp\.up_proj"):
        container.check(small.quantized, folder)


def test_a_table_of_ropes_that_does_not_turn_is_refused(small: Exported, tmp_path: Path) -> None:
    stored = stored_in(functions_of(small.files[0])["decode"])
    start = stored["rope_0_sin", "val"][1] + 64
    folder = change(small.folder, tmp_path / "copy", "Model.mlpackage", lambda _: start + 20)
    with pytest.raises(BadInput) as failure:
        container.check(small.quantized, folder)
    assert failure.value.why == "rope_0_sin has other numbers"


@pytest.mark.parametrize("missing", ["decode", "prefill"])
def test_packages_have_the_same_functions(missing: str, halves: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(halves.folder, tmp_path / "copy")
    file = folder / paths("Model_2.mlpackage").model
    model = messages("Model").Model.FromString(file.read_bytes())
    del model.mlProgram.functions[missing]
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BadInput) as failure:
        container.check(halves.quantized, folder)
    assert failure.value.why == "it has other functions than Model.mlpackage"


@pytest.mark.parametrize(
    ("grid", "codes", "expected"),
    [
        # The first code of a byte is in its low bits; 8 and more do not become negative.
        (LUT4_R16, [0, 1, 2, 3, 14, 15, 8, 7], "1032fe78"),
        # 0 + 1 * 8 + 2 * 64 + ... + 7 * 8 ** 7
        (LUT3_R16, [0, 1, 2, 3, 4, 5, 6, 7], "88c6fa"),
        # 1 + 2 * 64 + 3 * 64 ** 2 + 63 * 64 ** 3, three bytes, the low one first.
        (LUT6_R16, [1, 2, 3, 63, 0, 63, 0, 63], "8130fcc00ffc"),
    ],
    ids=["lut4", "lut3", "lut6"],
)
def test_bytes_worked_by_hand(grid: Any, codes: list[int], expected: str) -> None:
    weight = PaletteTensor(
        grid,
        np.array([codes] * 16, np.int8),
        np.arange(grid.size, dtype=np.float32)[None] / 8,
    )
    choice = SimpleNamespace(weight=SimpleNamespace(name="w"), grid=grid)
    model: Any = SimpleNamespace(load=lambda name: weight, decoder=None)
    given: dict[str, Any] = {"name": "w", "shape": (16, 8), "choices": (choice,)}
    stored = Stored(dtype={3: UINT3, 4: UINT4, 6: UINT6}[grid.bits], part="codes", **given)
    content = b"".join(part.tobytes() for part in packing.parts(stored, model))
    assert content.hex() == expected * 16 and len(content) == stored.nbytes
    levels = Stored(dtype="<f2", part="levels", **given)
    (part,) = packing.parts(levels, model)
    assert part.tobytes()[:6].hex() == "000000300034"  # 0, 1/8, 1/4


@pytest.mark.parametrize(
    ("preset", "read"), [("lut3", "uint3"), ("lut4", "uint4"), ("lut6", "uint6")]
)
def test_the_file_as_apples_library_reads_it(
    preset: str, read: str, tiny_llama: Path, tmp_path: Path
) -> None:
    made = export(tiny_llama, tmp_path, preset)
    name = "model.layers.1.self_attn.k_proj.weight"
    stored = stored_in(functions_of(made.files[0])["prefill"])
    indices, levels = (stored[name.replace(".", "_"), key][1] for key in ("indices", "lut"))
    weight = made.quantized.load(name)
    assert isinstance(weight, PaletteTensor) and weight.codes.max() > 2 ** (weight.grid.bits - 1)
    library = blob_library()._BlobStorageReader(str(made.folder / paths().weights))
    found = getattr(library, f"read_{read}_data")(indices)[: weight.codes.size]
    assert np.array_equal(np.asarray(found).reshape(weight.shape), weight.codes)
    found = np.asarray(library.read_fp16_data(levels)).view(np.float16)
    assert np.array_equal(found.reshape(weight.levels.shape), weight.levels)
    content = (made.folder / paths().weights).read_bytes()[indices + 64 :]
    bits, codes = weight.grid.bits, [int(code) for code in weight.codes[0][:8]]
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    assert content[:bits] == number.to_bytes(bits, "little")


def test_types_are_those_that_coremltools_infers(
    small: Exported, make_model: Any, tmp_path: Path
) -> None:
    """Of what every operation makes, in both functions, for palettes and for scales of rows."""
    with warnings.catch_warnings(action="ignore"):
        import coremltools
        from coremltools.converters.mil.frontend.milproto import load

        kinds = {"int32": "INT32", "fp16": "FLOAT16", "bool": "BOOL", "string": "STRING"}
        biased = export(make_model("qwen2"), tmp_path, "int8")
        for made in (small, biased):
            package = made.folder / "Model.mlpackage"
            model = coremltools.utils.load_spec(str(package))
            weights = str(made.folder / Path(paths().weights).parent)
            program = load.load(model, model.specificationVersion, weights)
            for name, function in model.mlProgram.functions.items():
                declared, inferred, names = {}, {}, messages("MIL").DataType
                for operation in operations_of(function):
                    for output in operation.outputs:
                        kind = output.type.tensorType
                        sizes = tuple(each.constant.size for each in kind.dimensions)
                        declared[output.name] = names.Name(kind.dataType), sizes
                for operation in program.functions[name].operations:
                    for output in operation.outputs:
                        if output.name in declared:
                            dtype = coremltools.converters.mil.mil.types.builtin_to_string(
                                output.dtype
                            )
                            inferred[output.name] = kinds.get(dtype, dtype), tuple(output.shape)
                assert inferred == {each: declared[each] for each in inferred}
                assert len(inferred) > 0.9 * len(declared)


@pytest.mark.parametrize(
    ("preset", "patterns", "said"),
    [
        ("int4", {}, "the Neural Engine cannot multiply the grid int4-g32"),
        ("int2", {}, "the Neural Engine cannot multiply the grid int2-g64"),
        ("nf4", {}, "the Neural Engine cannot multiply the grid nf4-g64"),
        ("int8", {"*embed_tokens*": "int8-g32"}, "embed_tokens.weight: the Neural Engine cannot"),
    ],
)
def test_grids_that_it_does_not_multiply_are_refused(
    preset: str, patterns: dict[str, str], said: str, tiny_llama: Path
) -> None:
    decoder = decoder_config(Checkpoint.open(tiny_llama).config)
    plan = make_plan(decoder, preset, "rtn", patterns)
    with pytest.raises(Unsupported, match=said) as failure:
        container.refuse(decoder, plan, Tokenizer.open(tiny_llama))
    assert "lut3-r16, lut4-r16, lut6-r16, int8-row" in failure.value.why
    assert "--target ios18-gpu" in failure.value.cure


def test_an_epsilon_that_float16_does_not_have_is_refused(make_model: Any) -> None:
    for epsilon, refused in ((2e-8, True), (1e-6, False)):
        model = make_model("llama", rms_norm_eps=epsilon)
        decoder = decoder_config(Checkpoint.open(model).config)
        plan = make_plan(decoder, "lut4", "rtn", {})
        if refused:
            with pytest.raises(Unsupported, match="cannot add 2e-08 to the mean of a norm"):
                container.refuse(decoder, plan, Tokenizer.open(model))
        else:
            container.refuse(decoder, plan, Tokenizer.open(model))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_families_that_leave_float16_are_refused(family: str, make_model: Any) -> None:
    model = make_model(family)
    decoder = decoder_config(Checkpoint.open(model).config)
    plan = make_plan(decoder, "lut4", "rtn", {})
    with pytest.raises(Unsupported, match=f"cannot compute {family}") as failure:
        container.refuse(decoder, plan, Tokenizer.open(model))
    assert "--target ios18-gpu" in failure.value.cure


def test_contexts_end_with_the_longest_dimension(make_model: Any) -> None:
    for given, expected in ((256, 256), (40_000, 16_384)):
        model = make_model("llama", max_position_embeddings=given)
        decoder = decoder_config(Checkpoint.open(model).config)
        assert container.context_length(decoder) == expected
    assert layout.room_of(16_384) == 16_384


def test_a_package_of_another_format_is_refused(small: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "copy")
    (folder / paths().model).write_bytes(b"nothing")
    with pytest.raises(BadInput, match="not a package that slimport wrote"):
        reader.File(folder / "Model.mlpackage", "<f2")
