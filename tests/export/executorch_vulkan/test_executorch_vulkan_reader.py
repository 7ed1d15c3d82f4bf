"""Programs that lie, and damaged and hostile files: found, named, never a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimport.errors import BadInput, SlimportError, ValidationFailed
from slimport.export import executorch_vulkan as container
from slimport.export import flatbuffer
from slimport.export.container import Deployment
from slimport.export.executorch import schema
from slimport.export.executorch_vulkan import blob, limits
from slimport.export.executorch_vulkan.reader import MODEL, open_file
from slimport.export.executorch_vulkan.schema import VULKAN
from slimport.tokenizer.tokenizer import Tokenizer

Written = tuple[Any, Path]
Values = flatbuffer.Values
Change = Callable[[Values], Any]
Lie = Callable[[flatbuffer.Schema, Change], Path]
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
UP = f"{MLP}up_proj"
Q, K, V = (f"{ATTENTION}{name}_proj" for name in "qkv")
NORM = "model.layers.0.input_layernorm"


@pytest.fixture(scope="module")
def source(make_model: Any) -> Path:
    """A tied Llama with biases."""
    found: Path = make_model("llama", attention_bias=True)
    return found


def write(model: Any, source: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    container.write(model, Tokenizer.open(source), folder, Deployment(64))
    return folder


@pytest.fixture(scope="module")
def written(source: Path, in_memory: Any, tmp_path_factory: Any) -> Written:
    """int4-g32 matrices, an int8-row table."""
    model = in_memory(source)
    return model, write(model, source, tmp_path_factory.mktemp("vulkan") / "files")


@pytest.fixture
def lie(written: Written, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lie:
    """lie(schema, change) -> a folder by a writer whose tables of this schema are changed."""
    encode = flatbuffer.encode

    def call(kind: flatbuffer.Schema, change: Change) -> Path:
        def changed(given: flatbuffer.Schema, values: Values, *more: Any) -> bytes:
            if given is kind:
                change(values)
            return encode(given, values, *more)

        monkeypatch.setattr(flatbuffer, "encode", changed)
        return write(written[0], source, tmp_path / "lie")

    return call


def entry(graph: Values, tensor: str) -> Values:
    """A constant of the graph."""
    names = (each for each in graph["constants"] if each["named_key"].startswith(f"{tensor}:"))
    found: Values = next(names)
    return found


def value(graph: Values, tensor: str) -> Values:
    at = graph["constants"].index(entry(graph, tensor))
    tables = (each["value"][1] for each in graph["values"])
    found: Values = next(each for each in tables if each.get("constant_id") == at)
    return found


def call_of(graph: Values, name: str) -> Values:
    """An operator by its name, or by what it is given."""
    for call in graph["chain"]:
        if name in call["name"]:
            found: Values = call
            return found
    held = value(graph, name)
    for call in graph["chain"]:
        if any(graph["values"][id]["value"][1] is held for id in call["args"]):
            found: Values = call
            return found
    raise KeyError(name)


def new(graph: Values, kind: str, **fields: Any) -> int:
    graph["values"].append({"value": (kind, fields)})
    return len(graph["values"]) - 1


def argument(graph: Values, call: str, at: int, kind: str, **fields: Any) -> None:
    call_of(graph, call)["args"][at] = new(graph, kind, **fields)


def exchange(graph: Values, first: str, second: str) -> None:
    one, other = entry(graph, first), entry(graph, second)
    one["named_key"], other["named_key"] = other["named_key"], one["named_key"]


def swap_matrices(graph: Values) -> None:
    for part in ("codes", "scale"):
        exchange(graph, f"{K}.{part}", f"{V}.{part}")


def made(graph: Values, call: str) -> Values:
    """The tensor that an operator fills."""
    found: Values = graph["values"][call_of(graph, call)["args"][-1]]["value"][1]
    return found


def drop(graph: Values, call: str) -> None:
    """What an operator is given takes the place of what it made."""
    gone = call_of(graph, call)
    graph["chain"].remove(gone)
    for other in graph["chain"]:
        other["args"] = [gone["args"][0] if id == gone["args"][-1] else id for id in other["args"]]


def one_cache(graph: Values) -> None:
    calls = [call for call in graph["chain"] if "update_cache" in call["name"]]
    calls[1]["args"][1] = calls[0]["args"][1]


def shared_cache(graph: Values) -> None:
    graph["values"][call_of(graph, "update_cache")["args"][1]]["value"][1]["mem_obj_id"] = 9


def same_memory(graph: Values) -> None:
    for each in graph["values"]:
        if each["value"][1].get("mem_obj_id", -1) >= 0:
            each["value"][1]["mem_obj_id"] = 0


GRAPHS: dict[str, Change] = {
    "keys of two matrices": swap_matrices,
    "the codes of another": lambda g: exchange(g, f"{K}.codes", f"{V}.codes"),
    "the scales of another": lambda g: exchange(g, f"{K}.scale", f"{V}.scale"),
    "the bias of another": lambda g: exchange(g, f"{K}.bias", f"{V}.bias"),
    "no bias": lambda g: argument(g, f"{Q}.codes", 4, "Null"),
    "another group": lambda g: argument(g, f"{UP}.codes", 3, "Int", int_val=16),
    "a group of nothing": lambda g: argument(g, f"{UP}.codes", 3, "Int", int_val=0),
    "scales across": lambda g: value(g, f"{UP}.scale").update(dims=[96, 2]),
    "another shape": lambda g: value(g, f"{UP}.codes").update(dims=[32, 96]),
    "a huge shape": lambda g: value(g, f"{UP}.codes").update(dims=[2**32 - 1] * 2),
    "a short constant": lambda g: value(g, f"{NORM}.weight").update(dims=[65]),
    "another datatype": lambda g: value(g, f"{UP}.codes").update(datatype=2),
    "an image": lambda g: value(g, f"{UP}.codes").update(storage_type=1),
    "a default storage": lambda g: value(g, f"{UP}.codes").pop("storage_type"),
    "another layout": lambda g: value(g, f"{UP}.codes").update(memory_layout=1),
    "numbers of another type": lambda g: made(g, "sigmoid").update(datatype=4),
    "no norm": lambda g: drop(g, "rms_norm"),
    "no product": lambda g: drop(g, f"{ATTENTION}o_proj.codes"),
    "a norm of another place": lambda g: exchange(
        g, f"{NORM}.weight", "model.layers.0.post_attention_layernorm.weight"
    ),
    "a weight that is added": lambda g: call_of(g, "add.Tensor")["args"].__setitem__(
        1, call_of(g, f"{NORM}.weight")["args"][1]
    ),
    "an unknown operator": lambda g: call_of(g, "sigmoid").update(name="aten.relu.default"),
    "too few arguments": lambda g: call_of(g, "sigmoid")["args"].pop(),
    "a value that is not there": lambda g: call_of(g, "sigmoid")["args"].__setitem__(0, 10**6),
    "a scale of attention": lambda g: argument(g, "sdpa", 7, "Double", double_val=0.25),
    "a mask": lambda g: argument(g, "sdpa", 4, "Bool", bool_val=True),
    "a fixed position": lambda g: argument(g, "sdpa", 3, "Int", int_val=0),
    "the same memory": same_memory,
    "one cache for keys and values": one_cache,
    "a cache in shared memory": shared_cache,
    "a tensor that nothing fills": lambda g: g["chain"].remove(call_of(g, "sigmoid")),
    "constants inside": lambda g: entry(g, f"{UP}.codes").update(offset=0),
    "another length": lambda g: entry(g, f"{UP}.codes").update(length=8),
    "a name that is not there": lambda g: entry(g, f"{UP}.codes").update(named_key="x" * 20),
    "a long name": lambda g: entry(g, f"{UP}.codes").update(named_key="x" * 1000),
    "no constants": lambda g: g.pop("constants"),
    "inputs in another order": lambda g: g["input_ids"].reverse(),
    "one input": lambda g: g["input_ids"].pop(),
    "two outputs": lambda g: g["output_ids"].append(g["output_ids"][0]),
    "an input that nothing is copied to": lambda g: g["values"][g["input_ids"][0]]["value"][
        1
    ].update(staging_datatype=127),
}


@pytest.mark.parametrize("change", GRAPHS.values(), ids=GRAPHS)
def test_a_graph_that_computes_something_else_is_refused(
    change: Change, lie: Lie, written: Written
) -> None:
    folder = lie(VULKAN, change)
    assert (folder / MODEL).read_bytes() != (written[1] / MODEL).read_bytes()
    with pytest.raises(BadInput, match=r"^model\.pte is not the program"):
        container.check(written[0], folder)


def test_a_writer_that_does_not_lie_writes_the_same(lie: Lie, written: Written) -> None:
    folder = lie(VULKAN, lambda graph: None)
    assert (folder / MODEL).read_bytes() == (written[1] / MODEL).read_bytes()


def steps(program: Values) -> list[Values]:
    found: list[Values] = program["execution_plan"][0]["chains"][0]["instructions"]
    return found


def step(program: Values, at: int) -> Values:
    found: Values = steps(program)[at]["instr_args"][1]
    return found


def values_of(program: Values) -> list[Values]:
    found: list[Values] = program["execution_plan"][0]["values"]
    return found


def number(program: Values, number: int) -> int:
    values_of(program).append({"val": ("Int", {"int_val": number})})
    return len(values_of(program)) - 1


def put(program: Values, at: int, place: int, new: int) -> None:
    step(program, at)["args"][place] = new


PROGRAMS: dict[str, Change] = {
    "a loop that begins elsewhere": lambda p: step(p, 9).update(destination_instruction=0),
    "a loop that asks something else": lambda p: step(p, 9).update(cond_value_index=0),
    "no loop": lambda p: steps(p).pop(),
    "a loop that stands still": lambda p: step(p, 7).update(move_from=step(p, 1)["move_to"]),
    "a loop from the second token": lambda p: step(p, 1).update(move_from=number(p, 1)),
    "a loop that begins where it ended": lambda p: step(p, 1).update(
        move_from=step(p, 0)["args"][-1]
    ),
    "longer steps": lambda p: put(p, 2, 1, number(p, 65)),
    "every second token": lambda p: put(p, 3, 4, number(p, 2)),
    "the same part again and again": lambda p: put(p, 3, 2, number(p, 0)),
    "parts without a position": lambda p: put(p, 4, 1, number(p, 0)),
    "all tokens at once": lambda p: put(p, 5, 5, p["execution_plan"][0]["inputs"][0]),
    "the position of the prompt": lambda p: put(p, 6, 1, p["execution_plan"][0]["inputs"][1]),
    "another output": lambda p: p["execution_plan"][0].update(outputs=[step(p, 3)["args"][-1]]),
    "two inputs in one": lambda p: p["execution_plan"][0]["inputs"].pop(),
    "another comparison": lambda p: p["execution_plan"][0]["operators"][-1].update(overload="x"),
    "another lookup": lambda p: p["execution_plan"][0]["operators"][4].update(name="aten::add"),
    "another backend": lambda p: p["execution_plan"][0]["delegates"][0].update(id="XnnpackBackend"),
    "a graph that lies in the tables": lambda p: p["execution_plan"][0]["delegates"][0][
        "processed"
    ].update(location=0),
    "a segment that is not there": lambda p: p["execution_plan"][0]["delegates"][0][
        "processed"
    ].update(index=10**6),
    "a segment beyond the file": lambda p: p["segments"][0].update(size=1 << 50),
    "no method": lambda p: p["execution_plan"][0].update(name="backward"),
    "two methods of a name": lambda p: p["execution_plan"].append(p["execution_plan"][0]),
    "a table of other codes": lambda p: p["constant_segment"]["offsets"].__setitem__(1, 64),
}


@pytest.mark.parametrize("change", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_runs_otherwise_is_refused(
    change: Change, lie: Lie, written: Written
) -> None:
    folder = lie(schema.PROGRAM, change)
    with pytest.raises(BadInput, match=r"^model\.pte"):
        container.check(written[0], folder)


def test_rows_in_another_order_are_refused(
    source: Path, in_memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a matrix that is multiplied in parts."""
    monkeypatch.setattr(limits, "ROWS", 40)
    encode, model = flatbuffer.encode, in_memory(source, "int8")

    def changed(given: flatbuffer.Schema, values: Values, *more: Any) -> bytes:
        if given is VULKAN:
            for part in ("codes", "scale"):
                exchange(values, f"{UP}.{part}[0:40]", f"{UP}.{part}[40:80]")
        return encode(given, values, *more)

    assert container.check(model, write(model, source, tmp_path / "true")).digests
    monkeypatch.setattr(flatbuffer, "encode", changed)
    with pytest.raises(BadInput, match="rows 0 to 40"):
        try:
            container.check(model, write(model, source, tmp_path / "lie"))
        except BadInput as error:
            raise BadInput(error.why, error.why, error.cure) from error


def test_another_grid_and_no_grid_are_refused(written: Written) -> None:
    model, folder = written
    name = f"{UP}.weight"
    for grid in ("int8-row", "int2-g64", "unheard"):
        with pytest.raises(BadInput):
            dict(container.read_back(folder, model.decoder, {**model.grids, name: grid}))
    for name in (f"{UP}.weight", "model.embed_tokens.weight"):
        fewer = {key: grid for key, grid in model.grids.items() if key != name}
        with pytest.raises(BadInput):
            dict(container.read_back(folder, model.decoder, fewer))


def test_any_flipped_byte_of_a_weight_is_found(written: Written, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole = (written[1] / MODEL).read_bytes()
    file = open_file(written[1], written[0].decoder)
    for key, held in file.held.keys.items():
        if ":" not in key:
            continue  # a rope or a number: judged, and not read back
        content = bytearray(whole)
        content[held.start + int(random.integers(held.nbytes))] ^= 1 << int(random.integers(8))
        (tmp_path / MODEL).write_bytes(content)
        with pytest.raises((BadInput, ValidationFailed)) as failure:
            container.check(written[0], tmp_path)
        said = f"{failure.value.what} {failure.value.why}"
        assert key.partition(":")[0].rpartition(".")[0] in said, key


def test_a_missing_empty_cut_long_or_foreign_file_is_refused(
    written: Written, tmp_path: Path
) -> None:
    model = written[0]
    with pytest.raises(BadInput, match=r"model\.pte"):
        container.check(model, tmp_path)
    content = (written[1] / MODEL).read_bytes()
    whole = [content[:size] for size in (0, 1, 7, 39, 40, 100, 5000, len(content) - 64)]
    for other in (*whole, b"\0" * 4096, content[4:], content + b"\0" * 64):
        (tmp_path / MODEL).write_bytes(other)
        with pytest.raises(BadInput, match=r"model\.pte"):
            container.check(model, tmp_path)


Damage = list[tuple[float, int]]


@settings(max_examples=100, deadline=None)
@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1)
)
def test_damaged_tables_never_crash(damage: Damage, written: Written) -> None:
    model, folder = written
    content = bytearray((folder / MODEL).read_bytes())
    file = open_file(folder, model.decoder)
    tables = min(held.start for held in file.held.keys.values())
    for where, byte in damage:
        content[int(where * tables)] = byte
    target = folder.parent / "damaged"
    target.mkdir(exist_ok=True)
    (target / MODEL).write_bytes(content)
    try:
        found = container.check(model, target)
    except SlimportError as error:
        assert isinstance(error, (BadInput, ValidationFailed))
        return
    assert found.weights_digest == model.weights_digest


def test_tables_that_take_too_long_are_refused(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector may name the same table again and again."""
    monkeypatch.setattr(blob, "MANY", 30)
    with pytest.raises(BadInput, match="it cannot be read") as failure:
        container.check(*written)
    assert "it has " in failure.value.why
