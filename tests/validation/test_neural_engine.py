"""Each rule on what the Neural Engine does not run, by a package that breaks it and no other."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import SlimportError, ValidationFailed
from slimport.export import coreml, coreml_ane
from slimport.export.container import Deployment
from slimport.export.coreml.proto import messages
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import coreml_ane as runtime
from slimport.validation.runtimes import neural_engine
from slimport.validation.runtimes.neural_engine import Inspection, inspect

HALF = np.float16
SHAPE = (1, 32, 1, 64)
NAME = "model.mlpackage main"


def product(mil: Any, made: str = "y", x: str = "x", rows: int = 32, columns: int = 32) -> str:
    """A convolution of one pixel, with a weight in the file."""
    content = np.ones((rows, columns), HALF).tobytes()
    weight = mil.blob(f"{made}_weight", "FLOAT16", content, rows, columns, 1, 1)
    name: str = mil.op("conv", made, "FLOAT16", 1, rows, 1, 64, x=x, weight=weight)
    return name


def given(mil: Any) -> str:
    """An input and a product of it, "y"."""
    mil.input("x", "FLOAT16", *SHAPE)
    return product(mil)


def inspected(mil: Any, *outputs: str) -> Inspection:
    mil.returns(*outputs)
    return inspect([mil.save()])


def test_what_runs_there_is_counted(mil: Any) -> None:
    """Two products of 32 x 32 float16 numbers, and what is made of them."""
    mil.input("ids", "INT32", 1, 64)
    table = mil.blob("table", "FLOAT16", np.ones((9, 32), HALF).tobytes(), 9, 32)
    rows = mil.op("gather", "rows", "FLOAT16", 1, 64, 32, x=table, indices="ids")  # before them
    mil.op("reshape", "x", "FLOAT16", *SHAPE, x=rows, shape=np.array(SHAPE, np.int32))
    product(mil)
    mil.op("silu", "z", "FLOAT16", *SHAPE, x="y")
    product(mil, "last", "z")
    found = inspected(mil, "last")
    assert found == Inspection(3, 3, 4096, 4096, ())


def broken(found: Inspection, words: str, source: str, *, bytes_too: bool = False) -> None:
    """One finding, which keeps one operation away."""
    (finding,) = found.findings
    assert (finding.level, finding.message) == ("refused", f"{NAME}: {words}")
    assert source in finding.source
    assert found.run == found.operations - 1
    assert (found.run_bytes < found.weight_bytes) == bytes_too


@pytest.mark.parametrize(
    ("kind", "arguments", "source"),
    [
        ("pow", {"x": "y", "y": HALF(2)}, "SqueezeBits"),
        ("gather", {"x": "y", "indices": np.zeros(1, np.int32)}, "coremltools#1103"),
        ("select", {"cond": "less", "a": "y", "b": "y"}, "reports of apps"),
        ("cumsum", {"x": "y", "axis": np.int32(1)}, "not among those that are known to run"),
    ],
)
def test_operations_that_run_elsewhere(
    kind: str, arguments: dict[str, Any], source: str, mil: Any
) -> None:
    given(mil)
    mil.op("less", "less", "BOOL", *SHAPE, x="x", y=HALF(0))  # of the input: before the layers
    mil.op(kind, "made", "FLOAT16", *SHAPE, **arguments)
    broken(inspected(mil, "made"), f"{kind} made does not run there", source)


def test_attention_in_one_operation(mil: Any) -> None:
    mil.input("x", "FLOAT16", *SHAPE)
    product(mil)
    heads = {"query": "y", "key": "y", "value": "y"}
    mil.op("scaled_dot_product_attention", "mixed", "FLOAT16", *SHAPE, **heads)
    words = "scaled_dot_product_attention mixed does not run there"
    broken(inspected(mil, "mixed"), words, "executorch#16057")


def test_sizes_that_are_not_fixed(mil: Any) -> None:
    given(mil)
    mil.op("silu", "made", "FLOAT16", 1, 32, 1, None, x="y")
    broken(inspected(mil, "made"), "silu made has a size that is not fixed", "forums 724930")


@pytest.mark.parametrize("kind", ["cast", "concat", "slice_by_index"])
def test_numbers_that_are_not_float16(kind: str, mil: Any) -> None:
    given(mil)
    mil.op(kind, "made", "FLOAT32", *SHAPE, x="y")
    broken(inspected(mil, "made"), f"{kind} made is FLOAT32", "coremltools#2585")


def test_products_of_five_dimensions(mil: Any) -> None:
    given(mil)
    mil.op("expand_dims", "wide", "FLOAT16", 1, *SHAPE, x="y", axes=np.zeros(1, np.int32))
    mil.op("mul", "made", "FLOAT16", 1, *SHAPE, x="wide", y="wide")
    broken(inspected(mil, "made"), "mul made has 5 dimensions", "5-D products")


def test_a_number_without_dimensions(mil: Any) -> None:
    given(mil)
    mil.op("reduce_sum", "made", "FLOAT16", x="y")
    found = inspected(mil, "made")
    assert (found.operations, found.run, found.findings) == (2, 2, ())


@pytest.mark.parametrize("shape", [(1, 65_537, 1, 1), (1, 32, 1, 16_385), (1, 2, 16_385, 32)])
def test_sizes_that_older_chips_do_not_take(shape: tuple[int, ...], mil: Any) -> None:
    mil.input("x", "FLOAT16", *SHAPE)
    weight = mil.blob("w", "FLOAT16", np.ones((32, 32), HALF).tobytes(), 32, 32, 1, 1)
    mil.op("conv", "y", "FLOAT16", *shape, x="x", weight=weight)
    found = inspected(mil, "y")
    (finding,) = found.findings
    assert (finding.level, found.run) == ("warning", 1)
    assert f"conv y makes {' x '.join(map(str, shape))}" in finding.message
    assert "ane-guide" in finding.source


def test_sizes_that_they_do(mil: Any) -> None:
    mil.input("x", "FLOAT16", *SHAPE)
    weight = mil.blob("w", "FLOAT16", np.ones((32, 32), HALF).tobytes(), 32, 32, 1, 1)
    mil.op("conv", "y", "FLOAT16", 1, 65_536, 1, 16_384, x="x", weight=weight)
    assert not inspected(mil, "y").findings


def test_several_scales_in_a_row(mil: Any) -> None:
    given(mil)
    codes = mil.blob("codes", "INT8", bytes(32 * 32), 32, 32, 1, 1)
    for columns, made in ((1, "rows"), (2, "blocks")):
        scale = np.ones((32, columns, 1, 1), HALF)
        packed = {"data": codes, "scale": scale}
        kind = "constexpr_blockwise_shift_scale"
        mil.op(kind, made, "FLOAT16", 32, 32, 1, 1, **packed)
    mil.op("conv", "fine", "FLOAT16", *SHAPE, x="y", weight="rows")
    mil.op("conv", "wrong", "FLOAT16", *SHAPE, x="fine", weight="blocks")
    words = "constexpr_blockwise_shift_scale blocks has several scales in a row"
    broken(inspected(mil, "wrong"), words, "coreai-models#279", bytes_too=True)


def looked_up(mil: Any, made: str, lut: Any, **more: Any) -> str:
    codes = mil.blob(f"{made}_codes", "UINT4", bytes(32 * 16), 32, 32, 1, 1)
    kind = "constexpr_lut_to_dense"
    name: str = mil.op(kind, made, "FLOAT16", 32, 32, 1, 1, indices=codes, lut=lut, **more)
    return name


def test_palettes(mil: Any) -> None:
    given(mil)
    looked_up(mil, "rows", np.ones((2, 1, 1, 1, 16, 1), HALF))
    looked_up(mil, "columns", np.ones((1, 2, 1, 1, 16, 1), HALF))
    mil.op("conv", "fine", "FLOAT16", *SHAPE, x="y", weight="rows")
    mil.op("conv", "wrong", "FLOAT16", *SHAPE, x="fine", weight="columns")
    words = "constexpr_lut_to_dense columns has tables along its columns"
    broken(inspected(mil, "wrong"), words, "palettization performance", bytes_too=True)


def test_a_palette_of_integers(mil: Any) -> None:
    given(mil)
    looked_up(mil, "weight", np.ones((1, 1, 1, 1, 16, 1), np.int8))
    mil.op("conv", "made", "FLOAT16", *SHAPE, x="y", weight="weight")
    words = "constexpr_lut_to_dense weight has a table of INT8"
    broken(inspected(mil, "made"), words, "tables of integers", bytes_too=True)


@pytest.mark.parametrize("order", ["a table times scales", "a table of what is scaled"])
def test_a_palette_with_scales(order: str, mil: Any) -> None:
    """In either order; and constants by their names, as other converters write them."""
    given(mil)
    kind = "constexpr_blockwise_shift_scale"
    if order == "a table times scales":
        mil.blob("ones", "FLOAT16", np.ones(32, HALF).tobytes(), 32, 1, 1, 1)
        levels = looked_up(mil, "levels", np.ones((1, 1, 1, 1, 16, 1), HALF))
        mil.op(kind, "weight", "FLOAT16", 32, 32, 1, 1, data=levels, scale="ones")
        words = f"{kind} weight is a look-up table times scales"
    else:
        numbers = {"data": np.ones((1, 1, 1, 1, 16, 1), np.int8), "scale": np.ones((1,) * 6, HALF)}
        mil.op(kind, "levels", "FLOAT16", 1, 1, 1, 1, 16, 1, **numbers)
        looked_up(mil, "weight", "levels")
        words = "constexpr_lut_to_dense weight is a look-up table times scales"
    mil.op("conv", "made", "FLOAT16", *SHAPE, x="y", weight="weight")
    broken(inspected(mil, "made"), words, "coremltools#2688", bytes_too=True)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 2, 64, 32), None),
        ((3, 1, 128, 64), None),  # the first may be any
        ((2, 2, 64, 48), "2 x 2 x 64 x 48"),
        ((2, 2, 64, 16), "2 x 2 x 64 x 16"),
        ((2, 3, 64, 32), "2 x 3 x 64 x 32"),
        ((2, 2, 90, 32), "2 x 2 x 90 x 32"),
        ((2, 1, 2, 64, 32), "2 x 1 x 2 x 64 x 32"),
        ((2, 64, 32), "2 x 64 x 32"),
    ],
)
def test_states(shape: tuple[int, ...], said: str | None, mil: Any) -> None:
    given(mil)
    mil.state("cache", "FLOAT16", *shape)
    found = inspected(mil, "y")
    if said is None:
        assert (found.run, found.findings) == (1, ())
        return
    (finding,) = found.findings
    assert (finding.level, finding.message) == ("refused", f"{NAME}: the state cache is {said}")
    assert "coremltools#2631" in finding.source
    assert (found.operations, found.run, found.run_bytes) == (1, 0, 0)  # nothing of the function


def test_three_states(mil: Any) -> None:
    given(mil)
    for name in ("one", "two"):
        mil.state(name, "FLOAT16", 2, 2, 64, 32)
    assert not inspected(mil, "y").findings
    mil.state("three", "FLOAT16", 2, 2, 64, 32)
    found = inspect([mil.save()])
    (finding,) = found.findings
    assert (finding.level, finding.message) == ("refused", f"{NAME} has 3 states")
    assert found.run == 0


def test_what_a_state_hands_on_is_of_the_layers(mil: Any) -> None:
    """What is read after layers wrote it is counted, and rules hold for it."""
    given(mil)
    mil.state("cache", "FLOAT16", *SHAPE)
    mil.op("read_state", "before", "FLOAT16", *SHAPE, input="cache")
    mil.op("write_state", "", "", input="cache", data="y")
    mil.op("read_state", "after", "FLOAT16", *SHAPE, input="cache")
    mil.op("pow", "made", "FLOAT16", *SHAPE, x="after", y=HALF(2))
    found = inspected(mil, "made")
    assert found.operations == 4  # not what was read before
    assert [each.message for each in found.findings] == [f"{NAME}: pow made does not run there"]


@pytest.mark.parametrize(
    ("size", "level"), [(900_000_000, None), (900_000_001, "warning"), (1_400_000_001, "refused")]
)
def test_large_packages(
    size: int, level: str | None, mil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(mil)
    mil.returns("y")
    weights = mil.save() / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    with weights.open("r+b") as file:
        file.truncate(size)  # a hole
    found = inspect([mil.folder])
    assert [each.level for each in found.findings] == ([level] if level else [])
    assert all("model.mlpackage has " in each.message for each in found.findings)
    assert found.run == (0 if level == "refused" else 1)


@pytest.mark.parametrize(("layers", "warned"), [(24, False), (25, True)])
def test_many_layers_in_a_program(layers: int, warned: bool, mil: Any) -> None:
    given(mil)
    for layer in range(layers):
        mil.op("softmax", f"shares_{layer}", "FLOAT16", *SHAPE, x="y", axis=np.int32(-1))
    found = inspected(mil, "y")
    assert found.run == layers + 1
    assert [each.level for each in found.findings] == ["warning"] * warned
    assert all("has 25 layers" in each.message for each in found.findings)


def test_each_function_and_package_is_looked_at(mil: Any, tmp_path: Path) -> None:
    given(mil)
    mil.returns("y")
    mil.function("other")
    given(mil)
    mil.op("pow", "made", "FLOAT16", *SHAPE, x="y", y=HALF(2))
    package = mil.save()
    again = shutil.copytree(package, tmp_path / "Model_2.mlpackage")
    found = inspect([package, again])
    assert [each.message.partition(":")[0] for each in found.findings] == [
        "model.mlpackage other",
        "Model_2.mlpackage other",
    ]
    assert (found.operations, found.run) == (6, 4)


def write(container: Any, model: Path, folder: Path, preset: str) -> Path:
    """The first package's model file."""
    checkpoint = Checkpoint.open(model)
    plan = make_plan(decoder_config(checkpoint.config), preset, "rtn", {})
    quantized = quantize(
        checkpoint,
        checkpoint.config,
        plan,
        folder / "quantized",
        calibration=None,
        tokenizer_folder=model,
        progress=lambda stage, done, total: None,
    )
    file: Path
    file, *_ = container.write(quantized, Tokenizer.open(model), folder / "out", Deployment(90))
    return file


@pytest.fixture(scope="module")
def shipped(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(coreml_ane, tiny_llama, tmp_path_factory.mktemp("shipped"), "lut4")


@pytest.fixture
def copied(shipped: Path, tmp_path: Path) -> Path:
    bundle = shutil.copytree(shipped.parents[3], tmp_path / "copy")
    return bundle / shipped.relative_to(shipped.parents[3])


def test_what_is_shipped_breaks_no_rule(shipped: Path) -> None:
    found = inspect([shipped.parents[2]])
    assert not found.findings and found.run == found.operations
    model = messages("Model").Model.FromString(shipped.read_bytes())
    codes = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) // 2
    tables = 2 * (2 * 4 + 2 * 2 + 2 * 6 + 4) * 16 * 2  # of 16 rows, 16 levels of float16
    head, norms = 416 * 64 + 416 * 2, 5 * 64 * 2
    # Norms before the first product, and the look-up's rows, are not of the layers.
    assert found.weight_bytes == 2 * (codes + tables + head + norms - 64 * 2)
    products = sum(
        operation.type in ("conv", "matmul")
        for function in model.mlProgram.functions.values()
        for operation in function.block_specializations["CoreML8"].operations
    )
    assert products == 2 * (2 * 9 + 1) and found.operations > 4 * products


@pytest.mark.parametrize("preset", ["int4", "nf4"])
def test_packages_for_the_gpu_break_several(preset: str, tiny_llama: Path, tmp_path: Path) -> None:
    found = runtime.accelerator(write(coreml, tiny_llama, tmp_path, preset))
    assert found.nodes == 0 and found.weight_bytes == 0  # its states have five dimensions
    said = "\n".join(each.message for each in found.findings)
    for words in ("has a size that is not fixed", "the state keyCache", "attention does not run"):
        assert words in said
    assert ("times scales" if preset == "nf4" else "several scales in a row") in said


Change = Callable[[Any, Any], Any]


def clear(key: str) -> Change:
    return lambda operation, block: operation.inputs[key].ClearField("arguments")


def take_itself(operation: Any, block: Any) -> None:
    arguments = operation.inputs["lut"]
    arguments.ClearField("arguments")
    arguments.arguments.add(name=operation.outputs[0].name)


CHANGES: dict[str, Change] = {
    "no argument": clear("indices"),
    "no input": lambda operation, block: operation.inputs.pop("lut"),
    "itself": take_itself,
    "no type": lambda operation, block: operation.outputs[0].ClearField("type"),
    "nothing at all": lambda operation, block: block.ClearField("operations"),
    "a table of texts": lambda operation, block: setattr(
        operation.inputs["indices"].arguments[0].value.type.tensorType, "dataType", 2
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_odd_programs_are_refused(change: str, copied: Path) -> None:
    model = messages("Model").Model.FromString(copied.read_bytes())
    for function in model.mlProgram.functions.values():
        block = function.block_specializations["CoreML8"]
        (operation, *_) = (each for each in block.operations if "_lut_" in each.type)
        CHANGES[change](operation, block)
    copied.write_bytes(model.SerializeToString())
    if change == "no type":  # only what operations make is of a type that matters
        assert runtime.accelerator(copied).nodes == 1
        return
    with pytest.raises(ValidationFailed, match="is not as Core ML reads them"):
        runtime.accelerator(copied)


def test_a_package_without_weights_is_refused(mil: Any) -> None:
    mil.input("x", "FLOAT16", *SHAPE)
    mil.op("silu", "y", "FLOAT16", *SHAPE, x="x")
    mil.returns("y")
    shutil.rmtree(mil.save() / "Data" / "com.apple.CoreML" / "weights")
    with pytest.raises(ValidationFailed) as failure:
        neural_engine.inspect([mil.folder])
    assert failure.value.why == "nothing in it is multiplied by a weight"


def test_no_program_crashes_it(copied: Path) -> None:
    """Operations of other types, without inputs, types or attributes, and of unknown types."""
    content, draw, seen = copied.read_bytes(), random.Random(0), set[str]()
    for _ in range(60):
        model = messages("Model").Model.FromString(content)
        block = model.mlProgram.functions["decode"].block_specializations["CoreML8"]
        packed = [each for each in block.operations if each.type.startswith("constexpr_")]
        for _ in range(3):
            operation = draw.choice(packed if draw.random() < 0.5 else block.operations)
            keys = sorted(operation.inputs)
            match draw.randrange(5):
                case 0:
                    operation.type = draw.choice(["conv", "const", "constexpr_lut_to_dense", ""])
                case 1 if keys:
                    del operation.inputs[draw.choice(keys)]
                case 2 if keys:
                    other = draw.choice(block.operations).outputs
                    argument = operation.inputs[draw.choice(keys)].arguments
                    argument.add(name=other[0].name if other else "nothing")
                case 3 if operation.outputs:
                    operation.outputs[0].type.tensorType.dataType = draw.randrange(60)
                case _:
                    operation.ClearField("attributes")
        copied.write_bytes(model.SerializeToString())
        try:
            found = runtime.accelerator(copied)
            seen.add("refused by rules" if found.nodes < 1 else "fine")
        except SlimportError:
            seen.add("malformed")
    assert seen == {"refused by rules", "fine", "malformed"}
