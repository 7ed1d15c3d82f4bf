"""ML Programs as a whole: states, rounding, refusals, and a Llama that coremltools converts."""

from __future__ import annotations

import math
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from slimport.errors import SlimportError, ValidationFailed
from slimport.validation.runtimes import mil_step
from slimport.validation.runtimes.mil import Interpreter, States, refuse_overflow
from slimport.validation.runtimes.mil_weights import Weight

patched = runpy.run_path(str(Path(__file__).parents[1] / "coremltools_patches.py"))["patched"]
CONTEXT = 64


class StateCache(Cache):  # type: ignore[misc]
    """Keys and values (layers, 1, heads, context, head_dim) of a model, written by slices."""

    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, past: Any) -> None:
        self.layers, self.keys, self.values, self.past = [], keys, values, past

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        end = self.past + keys.shape[-2]
        self.keys[layer, :, :, self.past : end] = keys
        self.values[layer, :, :, self.past : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def get_seq_length(self, *_: Any) -> Any:
        return self.past

    def get_mask_sizes(self, length: Any, layer: int = 0) -> Any:
        return self.past + length, 0


class Stateful(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, config = model, model.config
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 1, heads, CONTEXT, width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        past = mask.shape[-1] - ids.shape[-1]
        positions = torch.arange(mask.shape[-1])[past:].unsqueeze(0)
        cache = StateCache(self.keys, self.values, past)
        more = dict(attention_mask=mask, position_ids=positions, past_key_values=cache)
        return self.model(ids, use_cache=True, **more).logits


IDS = torch.randint(400, (1, 40), generator=torch.Generator().manual_seed(0))
PARTS = [10, 1, 1, 20, 8]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def converted(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """converted(precision) -> a package of the model with states, of 1 to 64 tokens a run."""
    made: dict[str, Path] = {}

    def convert(precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("coreml") / f"{precision}.mlpackage"
            with warnings.catch_warnings(action="ignore"), patched():
                _convert(model, precision, made[precision])
        return made[precision]

    return convert


def _convert(model: Any, precision: str, package: Path) -> None:
    import coremltools as ct

    module = Stateful(model).eval()
    with torch.no_grad():
        example = torch.tensor([[5, 6, 7]]), torch.zeros(1, 1, 3, 8)
        traced = torch.jit.trace(module, example, check_trace=False)
    tokens, seen = ct.RangeDim(1, CONTEXT, 1), ct.RangeDim(1, CONTEXT, 1)
    ct.convert(
        traced,
        inputs=[
            ct.TensorType(shape=(1, tokens), dtype=np.int32, name="ids"),
            ct.TensorType(shape=(1, 1, tokens, seen), dtype=np.float16, name="mask"),
        ],
        outputs=[ct.TensorType(dtype=np.float16, name="logits")],
        states=[
            ct.StateType(ct.TensorType(shape=module.keys.shape, dtype=np.float16), name=name)
            for name in ("keys", "values")
        ],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision(precision),
        skip_model_load=True,
    ).save(str(package))


def run_by_parts(interpreter: Interpreter, ids: Tensor, parts: list[int]) -> Tensor:
    past, found = 0, []
    for count in parts:
        mask = torch.full((count, past + count), -math.inf).triu(past + 1)[None, None]
        given = {"ids": ids[:, past : past + count], "mask": mask}
        found.append(interpreter.run(given)["logits"])
        past += count
    return torch.cat(found, 1)


@pytest.fixture(scope="module")
def expected(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS, use_cache=False).logits
    return logits


def test_a_converted_llama_means_what_torch_computes(
    converted: Callable[[str], Path], expected: Tensor
) -> None:
    interpreter = Interpreter(converted("float32"), rounding="fp32")
    assert str(interpreter.inputs["mask"]) == "FLOAT16 (1, 1, ?, ?)"
    assert {each.kind for each in interpreter.states.values()} == {"FLOAT16"}
    found = run_by_parts(interpreter, IDS, PARTS)
    assert (found - expected).abs().max() < 1e-4
    interpreter.reset()
    assert torch.equal(run_by_parts(interpreter, IDS, PARTS), found)


def test_a_converted_llama_rounded_to_float16(
    converted: Callable[[str], Path], expected: Tensor
) -> None:
    errors = {}
    for rounding in ("fp32", "fp16"):
        interpreter = Interpreter(converted("float16"), rounding=rounding)
        errors[rounding] = (run_by_parts(interpreter, IDS, PARTS) - expected).abs().max()
        refuse_overflow(interpreter.peaks)
    assert errors["fp32"] < errors["fp16"] < 0.05
    assert 1 < max(peak for _, peak in interpreter.peaks.values()) < 1e4


def test_coremltools_still_needs_its_patch() -> None:
    """If this fails, tests/coremltools_patches.py can go."""

    class Cut(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: x.shape[0] - int(torch.tensor([1]))]

    with warnings.catch_warnings(action="ignore"):
        import coremltools as ct

        traced = torch.jit.trace(Cut(), torch.zeros(3))
        wanted = {"inputs": [ct.TensorType(shape=(3,))], "skip_model_load": True}
        with pytest.raises(TypeError, match="0-dimensional"):
            ct.convert(traced, minimum_deployment_target=ct.target.iOS18, **wanted)
        with patched():
            ct.convert(traced, minimum_deployment_target=ct.target.iOS18, **wanted)


def counting(mil: Any, name: str, step: float) -> None:
    """A function that adds to the state `kept` and returns it, and what it was."""
    mil.function(name)
    mil.input("x", "FLOAT16", 2)
    mil.state("kept", "FLOAT16", 3, 2)
    mil.op("read_state", f"{name}_was", "FLOAT16", 3, 2, input="kept")
    mil.op("mul", f"{name}_more", "FLOAT16", 2, x="x", y=np.float16(step))
    mil.op("reshape", f"{name}_row", "FLOAT16", 1, 2, x=f"{name}_more", shape=ints(1, 2))
    part = {"x": f"{name}_was", "update": f"{name}_row", "begin": ints(1, 0), "end": ints(2, 2)}
    mil.op("slice_update", f"{name}_new", "FLOAT16", 3, 2, **part)
    mil.op("write_state", "", "", input="kept", data=f"{name}_new")
    mil.op("read_state", f"{name}_now", "FLOAT16", 3, 2, input="kept")


def ints(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


def test_functions_share_states_that_they_are_given(mil: Any) -> None:
    for name, step in (("main", 2), ("other", 3)):
        counting(mil, name, step)
        mil.returns(f"{name}_now")
    package, states = mil.save(), States()
    main, other = (
        Interpreter(package, name, rounding="fp16", states=states) for name in ("main", "other")
    )
    alone = Interpreter(package, "other", rounding="fp16")
    x = torch.tensor([1.0, 5.0])
    assert main.run({"x": x})["main_now"].tolist() == [[0, 0], [2, 10], [0, 0]]
    assert torch.equal(states.tensors["kept"][1], x * 2)
    assert other.run({"x": x})["other_now"].tolist() == [[0, 0], [3, 15], [0, 0]]
    assert torch.equal(states.tensors["kept"][1], x * 3)
    assert not alone._states.tensors["kept"].any()
    other.reset()
    assert not states.tensors["kept"].any()


def test_states_of_another_shape_are_not_shared(mil: Any) -> None:
    counting(mil, "main", 2)
    mil.returns("main_now")
    states = States()
    states.add("kept", mil_step.Type("FLOAT16", (3, 3)))
    with pytest.raises(ValidationFailed, match="state kept"):
        Interpreter(mil.save(), rounding="fp16", states=states)


@pytest.mark.parametrize("reads_old", [False, True])
def test_a_state_is_overwritten_where_it_lies_if_nobody_reads_what_it_was(
    mil: Any, reads_old: bool
) -> None:
    counting(mil, "main", 2)
    mil.op("mul", "twice", "FLOAT16", 3, 2, x="main_was", y=np.float16(2)) if reads_old else None
    mil.returns("main_now", *["twice"] * reads_old)
    interpreter, x = Interpreter(mil.save(), rounding="fp16"), torch.tensor([1.0, 5.0])
    kept = interpreter._states.tensors["kept"]
    first = interpreter.run({"x": x})
    assert (interpreter._states.tensors["kept"] is kept) != reads_old
    second = interpreter.run({"x": x * 2})
    assert first["main_now"].tolist() == [[0, 0], [2, 10], [0, 0]], "a result is no state"
    assert second["main_now"].tolist() == [[0, 0], [4, 20], [0, 0]]
    if reads_old:
        assert first["twice"].tolist() == [[0, 0]] * 3
        assert second["twice"].tolist() == [[0, 0], [4, 20], [0, 0]]


def test_an_update_that_is_not_written_back_leaves_the_state(mil: Any) -> None:
    counting(mil, "main", 2)
    del mil.block.operations[4:]  # write_state, and what reads behind it
    mil.returns("main_new")
    interpreter, x = Interpreter(mil.save(), rounding="fp16"), torch.tensor([1.0, 5.0])
    assert interpreter.run({"x": x})["main_new"].tolist() == [[0, 0], [2, 10], [0, 0]]
    assert not interpreter._states.tensors["kept"].any()


def test_a_view_of_what_a_state_was_is_not_overwritten(mil: Any) -> None:
    counting(mil, "main", 2)
    position = len(mil.block.operations) - 4
    mil.op("reshape", "flat", "FLOAT16", 6, x="main_was", shape=ints(6))
    moved = list(mil.block.operations)
    moved.insert(1, moved.pop())
    del mil.block.operations[:]
    mil.block.operations.extend(moved)
    mil.returns("main_now", "flat")
    interpreter, x = Interpreter(mil.save(), rounding="fp16"), torch.tensor([1.0, 5.0])
    assert position == 2
    assert not interpreter.run({"x": x})["flat"].any()
    assert interpreter.run({"x": x})["flat"].tolist() == [0, 0, 2, 10, 0, 0]


def test_what_a_caller_gives_is_no_state(mil: Any) -> None:
    mil.input("x", "FLOAT32", 2)
    mil.state("kept", "FLOAT32", 2)
    mil.op("read_state", "was", "FLOAT32", 2, input="kept")
    mil.op("write_state", "", "", input="kept", data="x")
    mil.returns("was")
    interpreter, x = Interpreter(mil.save(), rounding="fp32"), torch.tensor([1.0, 2.0])
    assert interpreter.run({"x": x})["was"].tolist() == [0, 0]
    x.zero_()
    assert interpreter.run({"x": x})["was"].tolist() == [1, 2]


def test_writing_beyond_a_state_is_refused(mil: Any) -> None:
    mil.input("x", "FLOAT16", 1)
    mil.input("at", "INT32", 1)
    mil.input("end", "INT32", 1)
    mil.state("kept", "FLOAT16", 4)
    mil.op("read_state", "was", "FLOAT16", 4, input="kept")
    part = {"x": "was", "update": "x", "begin": "at", "end": "end"}
    mil.op("slice_update", "new", "FLOAT16", 4, **part)
    mil.op("write_state", "", "", input="kept", data="new")
    mil.returns("new")
    interpreter, x = Interpreter(mil.save(), rounding="fp16"), torch.tensor([7.0])
    at = {"at": torch.tensor([3]), "end": torch.tensor([4])}
    assert interpreter.run({"x": x, **at})["new"].tolist() == [0, 0, 0, 7]
    for begin, end in ((4, 5), (3, 5), (2, 4), (3, 3)):
        given = {"x": x, "at": torch.tensor([begin]), "end": torch.tensor([end])}
        if (begin, end) == (3, 5):  # the end is cut, as in coremltools
            interpreter.run(given)
            continue
        with pytest.raises(ValidationFailed, match="slice_update new"):
            interpreter.run(given)


def test_rounding_happens_behind_each_operation_that_computes_float16(mil: Any) -> None:
    mil.input("x", "FLOAT16", 2)
    mil.op("add", "a", "FLOAT16", 2, x="x", y=np.float16(2048))
    mil.op("sub", "y", "FLOAT16", 2, x="a", y=np.float16(2048))
    mil.op("cast", "wide", "FLOAT32", 2, x="x", dtype=np.array("fp32"))
    mil.op("add", "b", "FLOAT32", 2, x="wide", y=np.float32(2048))
    mil.returns("y", "b")
    x = torch.tensor([0.75, 1.25])
    rounded = Interpreter(mil.save(), rounding="fp16").run({"x": x + 1e-5})
    meant = Interpreter(mil.save(), rounding="fp32").run({"x": x})
    assert rounded["y"].tolist() == [0, 2] and rounded["b"].tolist() == [2048.75, 2049.25]
    assert meant["y"].tolist() == [0.75, 1.25]


@pytest.mark.parametrize("rounding", ["fp16", "fp32"])
@pytest.mark.parametrize("value, overflows", [(250.0, False), (-257.0, True), (math.nan, True)])
def test_overflow_is_found_and_named(
    mil: Any, rounding: Any, value: float, overflows: bool
) -> None:
    mil.input("x", "FLOAT16", 1)
    mil.op("mul", "big", "FLOAT16", 1, x="x", y=np.float16(256))
    mil.op("tanh", "y", "FLOAT16", 1, x="big")
    mil.returns("y")
    interpreter = Interpreter(mil.save(), rounding=rounding)
    interpreter.run({"x": torch.tensor([1.0])})
    interpreter.run({"x": torch.tensor([value])})
    interpreter.run({"x": torch.tensor([2.0])})
    assert interpreter.peaks["big"][0] == "mul"
    if overflows:
        with pytest.raises(ValidationFailed, match="mul big") as found:
            refuse_overflow(interpreter.peaks)
        assert math.isnan(value) or "65792" in str(found.value)
    else:
        refuse_overflow(interpreter.peaks)
        assert interpreter.peaks["big"][1] == 64000


@pytest.mark.parametrize("masked", [-math.inf, -60000.0])
@pytest.mark.parametrize("read", [False, True])
def test_masked_scores_are_no_overflow(mil: Any, masked: float, read: bool) -> None:
    """Unless something else than the softmax reads them."""
    mil.input("x", "FLOAT16", 3)
    mask = np.array([0, masked, masked], np.float16)
    mil.op("add", "scores", "FLOAT16", 3, x="x", y=mask)
    mil.op("reshape", "rows", "FLOAT16", 1, 3, x="scores", shape=ints(1, 3))
    mil.op("softmax", "shares", "FLOAT16", 1, 3, x="rows")
    mil.returns("shares", *["rows"] * read)
    interpreter = Interpreter(mil.save(), rounding="fp16")
    found = interpreter.run({"x": torch.tensor([3.0, -9000.0, 1.0])})
    assert found["shares"].tolist() == [[1, 0, 0]]
    if read and masked > -math.inf:
        with pytest.raises(ValidationFailed, match="add scores"):
            refuse_overflow(interpreter.peaks)
    else:
        refuse_overflow(interpreter.peaks)
        assert interpreter.peaks["scores"] == ("add", 3)


def test_a_row_that_sees_nothing_is_an_overflow(mil: Any) -> None:
    mil.input("x", "FLOAT16", 2)
    mil.op("add", "scores", "FLOAT16", 2, x="x", y=np.full(2, -np.inf, np.float16))
    mil.op("softmax", "y", "FLOAT16", 2, x="scores")
    mil.returns("y")
    interpreter = Interpreter(mil.save(), rounding="fp16")
    interpreter.run({"x": torch.zeros(2)})
    with pytest.raises(ValidationFailed, match="softmax y"):
        refuse_overflow(interpreter.peaks)


def unknown(mil: Any) -> None:
    mil.op("while_loop", "y", "FLOAT16", 2, x="x")


def argument(mil: Any) -> None:
    mil.op("relu", "y", "FLOAT16", 2, x="x", alpha=np.float16(1))


def left_out(mil: Any) -> None:
    mil.op("matmul", "y", "FLOAT16", 2, x="x")


def batch(mil: Any) -> None:
    mil.op("gather", "y", "FLOAT16", 2, x="x", indices=ints(0, 1), batch_dims=np.int32(1))


def computed(mil: Any) -> None:
    mil.op("linear", "y", "FLOAT16", 2, x="x", weight="x")


def mixed(mil: Any) -> None:
    mil.op("add", "y", "FLOAT16", 2, x="x", y=np.float32(1))


def narrowed(mil: Any) -> None:
    mil.op("relu", "y", "FLOAT32", 2, x="x")


def absent(mil: Any) -> None:
    mil.op("relu", "y", "FLOAT16", 2, x="z")


def stateless(mil: Any) -> None:
    mil.op("read_state", "y", "FLOAT16", 2, input="x")


def twice(mil: Any) -> None:
    mil.op("relu", "y", "FLOAT16", 2, x="x")
    mil.op("relu", "y", "FLOAT16", 2, x="x")


def vectors(mil: Any) -> None:
    mil.blob("codes", "UINT1", b"\2", 1, 1, unused=7)
    table = np.zeros((1, 1, 2, 2), np.float16)
    more = {"indices": "codes", "lut": table, "vector_axis": np.int32(0)}
    mil.op("constexpr_lut_to_dense", "w", "FLOAT16", 2, 1, **more)


def blocks(mil: Any) -> None:
    mil.blob("codes", "INT8", bytes(6), 2, 3)
    more = {"data": "codes", "scale": np.ones((2, 2), np.float16)}
    mil.op("constexpr_blockwise_shift_scale", "w", "FLOAT16", 2, 3, **more)


def vast(mil: Any) -> None:
    mil.op("fill", "y", "FLOAT16", 1 << 40, shape=ints(1, 1))


REFUSED: dict[Callable[[Any], None], str] = {
    unknown: "while_loop y: no such operation",
    argument: "relu y: its argument alpha",
    left_out: "matmul y: it has no argument y",
    batch: "gather y: its batch_dims is 1",
    computed: "linear y: its weight is computed",
    mixed: "add y: it is given FLOAT16, FLOAT32",
    narrowed: "relu y: it is given FLOAT16, and makes FLOAT32",
    absent: "relu y reads 'z', which is not there",
    stateless: "read_state y: there is no state 'x'",
    twice: "two values of the name 'y'",
    vectors: "constexpr_lut_to_dense w: it has vectors of 2",
    blocks: "blockwise_shift_scale w: .* blocks do not divide",
    vast: "which no decoder has",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_what_cannot_be_run_is_refused_when_it_is_opened(
    mil: Any, write: Callable[[Any], None]
) -> None:
    mil.input("x", "FLOAT16", 2)
    write(mil)
    mil.returns("y")
    with pytest.raises(ValidationFailed, match=REFUSED[write]):
        Interpreter(mil.save(), rounding="fp16")


@pytest.mark.parametrize(
    "operation, shape, arguments, why",
    [
        ("reshape", (2, 3), {"shape": ints(3, 2)}, r"makes \(3, 2\)"),
        ("expand_dims", (6, 1), {"axes": ints(0)}, r"makes \(1, 6\)"),
        ("tile", (6,), {"reps": ints(1 << 30)}, "it makes"),
        ("reduce_sum", (), {"axes": ints(4)}, "cannot be run"),
        ("gather", (1,), {"indices": ints(6)}, "cannot be run"),
        ("gather", (1,), {"indices": ints(-1)}, "cannot be run"),
    ],
)
def test_what_contradicts_the_program_is_named_when_it_runs(
    mil: Any, operation: str, shape: tuple[int, ...], arguments: Any, why: str
) -> None:
    mil.input("x", "FLOAT16", 6)
    mil.op(operation, "y", "FLOAT16", *shape, x="x", **arguments)
    mil.returns("y")
    with pytest.raises(ValidationFailed, match=f"{operation} y: .*{why}"):
        Interpreter(mil.save(), rounding="fp16").run({"x": torch.zeros(6)})


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"x": torch.zeros(2, 3)},
        {"x": torch.zeros(2, 3), "ids": torch.zeros(2, 3)},
        {"x": torch.zeros(2, 4), "ids": torch.zeros(1, dtype=torch.int64)},
        {"x": torch.zeros(9, 3), "ids": torch.zeros(1, dtype=torch.int64)},
        {"x": torch.zeros(2, 3), "ids": torch.tensor([1 << 40])},
        {"x": torch.zeros(2, 3), "ids": torch.zeros(1, dtype=torch.int64), "z": torch.zeros(1)},
    ],
)
def test_inputs_are_held_to_what_the_program_declares(mil: Any, inputs: Any) -> None:
    mil.input("x", "FLOAT16", None, 3)
    mil.input("ids", "INT32", 1)
    mil.op("relu", "y", "FLOAT16", None, 3, x="x")
    mil.op("identity", "same", "INT32", 1, x="ids")
    mil.returns("y", "same")
    package = mil.save()
    sizes = mil.model.description.functions[0].input[0].type.multiArrayType.shapeRange.sizeRanges
    sizes[0].upperBound = 8
    mil.describe = lambda: None
    interpreter = Interpreter(mil.save(), rounding="fp16")
    interpreter.run({"x": torch.zeros(8, 3), "ids": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(ValidationFailed):
        interpreter.run(inputs)
    assert package.exists()


def test_the_description_is_held_to_the_program(mil: Any) -> None:
    mil.input("x", "FLOAT16", 2)
    mil.op("relu", "y", "FLOAT16", 2, x="x")
    mil.returns("y")
    mil.save()
    told = mil.model.description.functions[0].input[0]
    mil.describe = lambda: None
    told.type.multiArrayType.dataType = 65568
    with pytest.raises(ValidationFailed, match="description says FLOAT32"):
        Interpreter(mil.save(), rounding="fp16")
    told.name = "other"
    with pytest.raises(ValidationFailed, match="description names the inputs other"):
        Interpreter(mil.save(), rounding="fp16")


def test_weights_beyond_the_room_are_computed_again(
    mil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float16)
    mil.blob("w", "FLOAT16", table.tobytes(), *table.shape)
    mil.blob("v", "FLOAT16", (table * 2).tobytes(), *table.shape)
    mil.input("x", "FLOAT16", 1, 64)
    mil.input("ids", "INT32", 2)
    mil.op("linear", "a", "FLOAT16", 1, 300, x="x", weight="w")
    mil.op("linear", "b", "FLOAT16", 1, 300, x="x", weight="v")
    mil.op("gather", "rows", "FLOAT16", 2, 64, x="v", indices="ids")
    mil.returns("a", "b", "rows")
    computed: list[int] = []
    original = Weight._rows

    def rows(self: Any, places: Any) -> Tensor:
        computed.append(len(places))
        return original(self, places)

    monkeypatch.setattr(Weight, "_rows", rows)
    x, ids = torch.randn(1, 64), torch.tensor([7, 299])
    found = []
    for room, counts in ((1 << 30, [300, 300]), (300 * 64 * 4, [300, 300, 2, 300, 2]), (0, None)):
        interpreter = Interpreter(mil.save(), rounding="fp32", room=room)
        computed.clear()
        found += [interpreter.run({"x": x, "ids": ids}) for _ in range(2)]
        assert computed == (counts or [300, 300, 2] * 2)
    weight = torch.from_numpy(table).float()
    for each in found:
        torch.testing.assert_close(each["b"], x @ weight.T * 2)
        assert torch.equal(each["rows"], weight[ids] * 2)


def test_a_function_that_is_not_there(mil: Any) -> None:
    counting(mil, "main", 1)
    mil.returns("main_now")
    with pytest.raises(SlimportError, match="no function prefill"):
        Interpreter(mil.save(), "prefill", rounding="fp16")
