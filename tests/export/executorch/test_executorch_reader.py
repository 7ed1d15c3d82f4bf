"""Programs that lie, and damaged and hostile files: found, named, never a crash."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimport.errors import BadInput, DependencyMissing, SlimportError, ValidationFailed
from slimport.export import executorch as container
from slimport.export import flatbuffer
from slimport.export.container import Deployment
from slimport.export.executorch import opened, products, schema, tools
from slimport.export.executorch.products import Product
from slimport.export.executorch.reader import MODEL, open_file
from slimport.tokenizer.tokenizer import Tokenizer

Written = tuple[Any, Path]
Values = flatbuffer.Values
Change = Callable[[Values], None]
Lie = Callable[[flatbuffer.Schema, Change], Path]
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
UP, GATE = f"{MLP}up_proj", f"{MLP}gate_proj"
Q, K, V = (f"{ATTENTION}{name}_proj" for name in "qkv")
TABLE = "model.embed_tokens"
NONE = 2**32 - 1


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
    return model, write(model, source, tmp_path_factory.mktemp("executorch") / "files")


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


def place(graph: Values, tensor: str) -> int:
    """Where a stored tensor stands among the constants of a graph; 0: nowhere."""
    names = [constant.get("named_key", "") for constant in graph["constant_data"]]
    return next((at for at, name in enumerate(names) if name.startswith(f"{tensor}:")), 0)


def value(graph: Values, tensor: str) -> Values:
    at = place(graph, tensor)
    for each in graph["xvalues"]:
        found: Values = each["xvalue_union"][1]
        if at and found.get("tensor_value", found).get("constant_buffer_idx") == at:
            return found
    raise KeyError(tensor)


def product(graph: Values, stem: str) -> Values:
    held = value(graph, f"{stem}.codes")["tensor_value"]["id_out"]
    return next(
        node["xnode_union"][1]
        for node in graph["xnodes"]
        if node["xnode_union"][1].get("filter_id") == held
    )


def given_to(graph: Values, stem: str) -> Values:
    """The value that a matrix multiplies."""
    found: Values = graph["xvalues"][product(graph, stem)["input1_id"]]["xvalue_union"][1]
    return found


def exchange(graph: Values, first: str, second: str) -> None:
    one, other = (graph["constant_data"][place(graph, name)] for name in (first, second))
    one["named_key"], other["named_key"] = other["named_key"], one["named_key"]


def swap_matrices(graph: Values) -> None:
    for part in ("codes", "scale"):
        exchange(graph, f"{K}.{part}", f"{V}.{part}")


def other_group(graph: Values) -> None:
    means = value(graph, f"{UP}.codes")["quant_params"][1]
    means["group_size"], means["num_scales"] = 16, 2 * means["num_scales"]


def no_rounding(graph: Values) -> None:
    x = product(graph, UP)["input1_id"]
    graph["xnodes"] = [
        node
        for node in graph["xnodes"]
        if node["xnode_union"][0] != "XNNConvert" or node["xnode_union"][1]["output_id"] != x
    ]


def float_input(graph: Values) -> None:
    node = product(graph, UP)
    node["input1_id"] = next(
        n["xnode_union"][1]["input_id"]
        for n in graph["xnodes"]
        if n["xnode_union"][1]["output_id"] == node["input1_id"]
    )


def no_norm(graph: Values) -> None:
    """Taken off, and not multiplied by."""
    at = next(n for n, node in enumerate(graph["xnodes"]) if "Root" in node["xnode_union"][0])
    node = graph["xnodes"][at + 2]
    assert node["xnode_union"][0] == "XNNMultiply"
    node["xnode_union"] = ("XNNSubtract", node["xnode_union"][1])


GRAPHS: dict[str, tuple[str, Change]] = {
    "keys of two matrices": (K, swap_matrices),
    "the codes of another": (K, lambda g: exchange(g, f"{K}.codes", f"{V}.codes")),
    "the scales of another": (K, lambda g: exchange(g, f"{K}.scale", f"{V}.scale")),
    "another weight": (
        UP,
        lambda g: product(g, UP).update(filter_id=product(g, GATE)["filter_id"]),
    ),
    "another group": (UP, other_group),
    "a group of nothing": (
        UP,
        lambda g: value(g, f"{UP}.codes")["quant_params"][1].update(group_size=0),
    ),
    "another datatype": (UP, lambda g: value(g, f"{UP}.codes")["tensor_value"].update(datatype=8)),
    "another shape": (UP, lambda g: value(g, f"{UP}.codes")["tensor_value"].update(dims=[64, 96])),
    "a huge shape": (UP, lambda g: value(g, f"{UP}.codes")["tensor_value"].update(dims=[NONE] * 2)),
    "another channel": (
        UP,
        lambda g: value(g, f"{UP}.codes")["quant_params"][1].update(channel_dim=1),
    ),
    "other scales": (
        UP,
        lambda g: value(g, f"{UP}.codes")["quant_params"][1].update(scale=[1.0] * 192),
    ),
    "scales of the graph": (
        UP,
        lambda g: value(g, f"{UP}.codes")["quant_params"][1].update(scale_buffer_idx=0),
    ),
    "no scales": (
        UP,
        lambda g: value(g, f"{UP}.codes")["quant_params"][1].update(scale_buffer_idx=10**6),
    ),
    "transposed": (UP, lambda g: product(g, UP).update(flags=1)),
    "tokens that share a scale": (
        UP,
        lambda g: given_to(g, UP)["quant_params"][1].update(num_nonbatch_dims=2),
    ),
    "what nothing rounds": (UP, no_rounding),
    "floats by codes": (UP, float_input),
    "an id that is not there": (UP, lambda g: product(g, UP).update(filter_id=10**6)),
    "two values of an id": (UP, lambda g: g["xvalues"].append(g["xvalues"][1])),
    "numbers of its own": (
        UP,
        lambda g: g["constant_data"].append({"offset": 4, "size": 8}),
    ),
    "numbers beyond its own": (
        UP,
        lambda g: g["constant_data"].append({"offset": 0, "size": 1 << 40}),
    ),
    "a bias of another kind": (
        UP,
        lambda g: product(g, UP).update(
            bias_id=next(
                n["xnode_union"][1]["bias_id"]
                for n in g["xnodes"]
                if n["xnode_union"][1].get("bias_id", NONE) != NONE
            )
        ),
    ),
    "no bias": (Q, lambda g: product(g, Q).update(bias_id=NONE)),
    "the bias of another": (K, lambda g: exchange(g, f"{K}.bias", f"{V}.bias")),
    "no norm": (UP, no_norm),
    "no product": (
        UP,
        lambda g: g["xnodes"].remove(
            next(n for n in g["xnodes"] if n["xnode_union"][1] is product(g, UP))
        ),
    ),
    "no names": (UP, lambda g: g.pop("constant_data")),
    "inputs that are not numbered": (
        UP,
        lambda g: g["xvalues"][g["input_ids"][0]]["xvalue_union"][1].update(external_id=99),
    ),
    "a name that is not there": (
        UP,
        lambda g: g["constant_data"][place(g, f"{UP}.codes")].update(named_key="x" * 20),
    ),
    "a long name": (
        UP,
        lambda g: g["constant_data"][place(g, f"{UP}.codes")].update(named_key="x" * 1000),
    ),
}


@pytest.mark.parametrize(("stem", "change"), GRAPHS.values(), ids=GRAPHS)
def test_a_graph_that_computes_something_else_is_refused(
    stem: str, change: Change, lie: Lie, written: Written
) -> None:
    changed = []

    def change_one(graph: Values) -> None:
        if place(graph, f"{stem}.codes"):
            changed.append(graph)
            change(graph)

    folder = lie(schema.XNNPACK, change_one)
    assert changed
    with pytest.raises(BadInput, match=r"^model\.pte is not the program"):
        container.check(written[0], folder)


def test_a_writer_that_does_not_lie_writes_the_same(lie: Lie, written: Written) -> None:
    folder = lie(schema.XNNPACK, lambda graph: None)
    assert (folder / MODEL).read_bytes() == (written[1] / MODEL).read_bytes()


def tensors(program: Values, method: int = 0) -> list[Values]:
    """Constants of a method."""
    values = (each["val"] for each in program["execution_plan"][method]["values"])
    return [found for kind, found in values if kind == "Tensor" and found.get("data_buffer_idx")]


def table(program: Values) -> Values:
    return next(tensor for tensor in tensors(program) if tensor["sizes"] == [416, 64])


def lookup(program: Values) -> Values:
    plan = program["execution_plan"][0]
    at = next(n for n, each in enumerate(plan["operators"]) if "embedding" in each["name"])
    calls = (each["instr_args"] for each in plan["chains"][0]["instructions"])
    return next(c for kind, c in calls if kind == "KernelCall" and c["op_index"] == at)


def operator(program: Values, **fields: str) -> None:
    for each in program["execution_plan"][0]["operators"]:
        if "embedding" in each["name"]:
            each.update(fields)


def swap_norms(program: Values, *methods: int) -> None:
    for method in methods:
        norms = [each for each in tensors(program, method) if each["sizes"] == [64]]
        first, second = (norms[n]["data_buffer_idx"] for n in (0, 1))
        norms[0]["data_buffer_idx"], norms[1]["data_buffer_idx"] = second, first


def argument(program: Values, at: int, to: int) -> None:
    lookup(program)["args"][at] = to


def instructions(program: Values) -> list[Values]:
    found: list[Values] = program["execution_plan"][0]["chains"][0]["instructions"]
    return found


def swap_graphs(program: Values) -> None:
    first, second = (program["execution_plan"][1]["delegates"][at] for at in (0, -1))
    first["processed"], second["processed"] = second["processed"], first["processed"]


def inline(program: Values) -> None:
    program["execution_plan"][0]["delegates"][1]["processed"]["location"] = 0


PROGRAMS: dict[str, Change] = {
    "the norms of another place": lambda p: swap_norms(p, 0, 1),
    "another norm in one method": lambda p: swap_norms(p, 1),
    "another graph in one method": swap_graphs,
    "a norm of another size": lambda p: tensors(p)[-1].update(sizes=[63]),
    "a norm of another type": lambda p: tensors(p)[-1].update(scalar_type=3),
    "a norm that is written to": lambda p: tensors(p)[-1].update(
        allocation_info={"memory_id": 1, "memory_offset_low": 0}
    ),
    "a table in another order": lambda p: table(p).update(dim_order=[1, 0]),
    "a table of another shape": lambda p: table(p).update(sizes=[64, 416]),
    "a huge table": lambda p: table(p).update(sizes=[2**31 - 1, 2**31 - 1]),
    "a negative table": lambda p: table(p).update(sizes=[-416, -64]),
    "a table of another type": lambda p: table(p).update(scalar_type=0),
    "another constant": lambda p: table(p).update(data_buffer_idx=3),
    "no such constant": lambda p: table(p).update(data_buffer_idx=10**6),
    "another kernel": lambda p: operator(p, name="quantized_decomposed::embedding_4bit"),
    "an unknown kernel": lambda p: operator(p, name="quantized_decomposed::embedding_2bit"),
    "another overload": lambda p: operator(p, overload="dtype_out"),
    "zero points": lambda p: argument(p, 2, lookup(p)["args"][1]),
    "other ends": lambda p: argument(p, 3, lookup(p)["args"][4]),
    "other tokens": lambda p: argument(p, 5, 1),
    "a value that is not there": lambda p: argument(p, 0, 10**6),
    "a negative value": lambda p: argument(p, 0, -1),
    "two lookups": lambda p: instructions(p).append({"instr_args": ("KernelCall", lookup(p))}),
    "a layer twice": lambda p: instructions(p).append(instructions(p)[-1]),
    "a layer left out": lambda p: instructions(p).remove(instructions(p)[-1]),
    "no instruction": lambda p: instructions(p).clear(),
    "a graph in the tables": inline,
    "another backend": lambda p: p["execution_plan"][0]["delegates"][0].update(id="CoreML"),
    "no such graph": lambda p: p["execution_plan"][0]["delegates"][0]["processed"].update(
        index=10**6
    ),
    "two methods of a name": lambda p: p["execution_plan"][1].update(name="forward"),
    "no second method": lambda p: p["execution_plan"].remove(p["execution_plan"][1]),
    "two of a key": lambda p: p["named_data"].append(p["named_data"][0]),
    "a key that is no weight's": lambda p: p["named_data"][0].update(key="abc"),
    "a segment beyond the file": lambda p: p["segments"][-1].update(offset=2**40),
    "a segment of another size": lambda p: p["segments"][-1].update(size=2**40),
    "a segment that wraps round": lambda p: p["segments"][-1].update(offset=2**64 - 1),
    "no segments": lambda p: p.pop("segments"),
    "no constants": lambda p: p.pop("constant_segment"),
}


@pytest.mark.parametrize("change", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_computes_something_else_is_refused(
    change: Change, lie: Lie, written: Written
) -> None:
    folder = lie(schema.PROGRAM, change)
    assert (folder / MODEL).read_bytes() != (written[1] / MODEL).read_bytes()
    with pytest.raises(BadInput, match=r"^model\.pte is not the program"):
        container.check(written[0], folder)


def test_exchanged_segments_are_found(lie: Lie, written: Written) -> None:
    def exchanged(program: Values) -> None:
        keys = {each["key"].partition(":")[0]: each for each in program["named_data"]}
        first, second = keys[f"{K}.codes"], keys[f"{V}.codes"]
        both = second["segment_index"], first["segment_index"]
        first["segment_index"], second["segment_index"] = both

    folder = lie(schema.PROGRAM, exchanged)
    with pytest.raises(ValidationFailed, match=r"(?s)k_proj\.weight.*codes \["):
        container.check(written[0], folder)


def test_the_keys_of_another_model_are_found(
    make_model: Any, in_memory: Any, written: Written
) -> None:
    other = in_memory(make_model("llama", attention_bias=True, seed=1))
    with pytest.raises(ValidationFailed, match="its keys end in"):
        container.check(other, written[1])


def damaged(written: Written, target: Path, start: int, mask: int) -> Path:
    """A copy in which some bits of one byte are flipped."""
    content = bytearray((written[1] / MODEL).read_bytes())
    content[start] ^= mask
    (target / MODEL).write_bytes(content)
    return target


def product_of(written: Written, stem: str) -> tuple[int, int]:
    """Where codes and scales of a matrix begin."""
    file = open_file(written[1], written[0].decoder)
    found = file.uses[f"{stem}.weight"]
    assert isinstance(found, Product) and found.scale is not None
    return file.keys[found.weight].start, file.keys[found.scale].start


@pytest.mark.parametrize(("mask", "column"), [(0x01, 6), (0x10, 7)])
def test_one_flipped_nibble_is_found(
    mask: int, column: int, written: Written, tmp_path: Path
) -> None:
    codes, _ = product_of(written, UP)
    folder = damaged(written, tmp_path, codes + 32 + 3, mask)
    with pytest.raises(ValidationFailed) as failure:
        container.check(written[0], folder)
    assert failure.value.what.startswith(f"{UP}.weight")
    assert failure.value.why.startswith(f"codes [1, {column}] reads")


def test_a_flipped_and_a_negative_scale_are_found(written: Written, tmp_path: Path) -> None:
    _, scale = product_of(written, UP)
    with pytest.raises(ValidationFailed, match=r"(?s)up_proj.*scale \[0, 1\]"):
        container.check(written[0], damaged(written, tmp_path, scale + 2, 1))
    with pytest.raises(BadInput) as failure:
        container.check(written[0], damaged(written, tmp_path, scale + 1, 0x80))
    assert "not above 0" in failure.value.why and UP in failure.value.why


def test_both_copies_of_a_table_must_be_equal(source: Path, in_memory: Any, tmp_path: Path) -> None:
    for patterns in ({"*embed*": "int4-g32"}, {"*embed*": "float16"}):
        model = in_memory(source, "int4", patterns)
        folder = write(model, source, tmp_path / "files")
        file = open_file(folder, model.decoder)
        use = file.uses[f"{TABLE}.weight"]
        assert isinstance(use, Product)
        for start in (file.keys[use.weight].start + 2, file.lookup.table.place.start):
            damaged((model, folder), tmp_path, start, 0x10)
            with pytest.raises(BadInput) as failure:
                dict(container.read_back(tmp_path, model.decoder, model.grids))
            assert "another matrix as the head" in failure.value.why


def test_tables_and_numbers_are_what_their_keys_say(written: Written, tmp_path: Path) -> None:
    model, folder = written
    file = open_file(folder, model.decoder)
    keys = [key for key in file.keys if ":" not in key]
    assert {"rope.0.cos", "rope.0.sin"} < set(keys) and any("number." in key for key in keys)
    for key in keys:
        place = file.keys[key]
        damaged(written, tmp_path, place.stop - 1, 0x40)
        with pytest.raises(BadInput) as failure:
            open_file(tmp_path, model.decoder)
        assert f"{key} has other numbers" in failure.value.why


def test_what_a_graph_has_is_counted_before_it_is_read(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its constants too: segments may overlap, and be read again and again."""
    told: list[int] = []
    read = products.read_graph

    def counted(payload: Any, sizes: Any, spend: Any) -> Any:
        before = len(told)
        found = read(payload, sizes, lambda count: (told.append(count), spend(count)))
        assert len(told) == before + 1 and told[-1] > 1 + len(found.uses)
        return found

    monkeypatch.setattr(opened, "read_graph", counted)
    open_file(written[1], written[0].decoder)
    assert told


def test_a_grid_that_was_not_written_is_refused(written: Written) -> None:
    model, folder = written
    for name, grid in (
        *((f"{UP}.weight", grid) for grid in ("int8-row", "int2-g64", "nf4-g64", "what")),
        *((f"{TABLE}.weight", grid) for grid in ("int8-g32", "int4-g32")),
    ):
        with pytest.raises(BadInput):
            dict(container.read_back(folder, model.decoder, {**model.grids, name: grid}))
    for name in (f"{UP}.weight", f"{TABLE}.weight"):
        fewer = {key: grid for key, grid in model.grids.items() if key != name}
        with pytest.raises(BadInput):
            dict(container.read_back(folder, model.decoder, fewer))


def test_any_flipped_byte_of_a_weight_is_found(written: Written, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    file = open_file(written[1], written[0].decoder)
    for key, held in file.keys.items():
        start = held.start + int(random.integers(held.nbytes))
        folder = damaged(written, tmp_path, start, 1 << int(random.integers(8)))
        with pytest.raises((BadInput, ValidationFailed)) as failure:
            container.check(written[0], folder)
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
    (tmp_path / MODEL).unlink()
    (tmp_path / MODEL).mkdir()
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
    tables = min(held.start for held in file.keys.values())
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


@pytest.mark.parametrize(("module", "limit"), [(products, "MANY"), (opened, "MOST")])
def test_tables_that_take_too_long_are_refused(
    module: Any, limit: str, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector may name the same table again and again."""
    monkeypatch.setattr(module, limit, 30)
    with pytest.raises(BadInput, match="it cannot be read") as failure:
        container.check(*written)
    assert "it has " in failure.value.why or "too large" in failure.value.why


def test_without_executorch_nothing_is_read(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "find_spec", lambda name: None)
    tools.generated.cache_clear()
    with pytest.raises(DependencyMissing) as failure:
        container.check(*written)
    assert failure.value.exit_code == 6 and "pip install" in failure.value.cure


def test_a_compiler_that_fails_is_a_missing_library(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert importlib.util.find_spec("executorch") is not None
    tools.generated.cache_clear()
    monkeypatch.setattr(tools, "_COMPILER", "data")
    with pytest.raises(DependencyMissing, match="flatc"):
        container.check(*written)
    monkeypatch.setattr(tools.shutil, "which", lambda name, path: "/bin/false")
    with pytest.raises(DependencyMissing, match="fails"):
        container.check(*written)
