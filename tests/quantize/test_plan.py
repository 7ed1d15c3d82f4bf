import subprocess
import sys

import pytest

from slimport.architectures import decoder_config, weights
from slimport.errors import BadInput, UsageError
from slimport.quantize.grid import GRIDS, INT4_G32, INT8_ROW
from slimport.quantize.palette import LUT4_R16, LUT6_R16
from slimport.quantize.plan import PRESETS, Plan, grid_summary, make_plan

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 100,  # rows of down_proj do not divide into groups of 32
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def decoder(**changes):
    return decoder_config(CONFIG | changes)


def test_the_default():
    plan = make_plan(decoder())
    assert [c.weight for c in plan.choices] == [*weights(decoder())]
    assert (plan[UP].grid, plan[UP].method) == (INT4_G32, "gptq")
    assert (plan[EMBEDDING].grid, plan[EMBEDDING].method) == (INT8_ROW, "rtn")
    assert (plan[HEAD].grid, plan[HEAD].method) == (INT8_ROW, "rtn")
    norm = plan["model.norm.weight"]
    assert (norm.grid, norm.method) == (None, "")


def test_rows_that_do_not_divide_stay_float_with_the_reason():
    choice = make_plan(decoder())[DOWN]
    assert choice.grid is None
    assert "rows of 100" in choice.reason and "float16" in choice.reason
    assert make_plan(decoder(), "int8")[DOWN].grid is INT8_ROW


def test_mixed_promotes_values_and_down_projections():
    plan = make_plan(decoder(intermediate_size=96, num_hidden_layers=16), "mixed")
    promoted = {c.weight.name for c in plan.choices if c.reason == "preset mixed: promoted"}
    layers = (0, 1, 4, 7, 10, 13, 14, 15)
    modules = ("self_attn.v_proj", "mlp.down_proj")
    assert promoted == {f"model.layers.{i}.{m}.weight" for i in layers for m in modules}
    for choice in plan.choices:
        if choice.weight.is_linear:
            wanted = INT8_ROW if choice.weight.name in promoted else INT4_G32
            assert choice.grid is wanted


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "mixed"])
def test_presets(preset):
    plan = make_plan(decoder(intermediate_size=128), preset)
    linears = {c.grid for c in plan.choices if c.weight.is_linear}
    tables = {c.grid for c in plan.choices if c.weight.is_table}
    assert linears == {PRESETS[preset].linears}
    assert tables == {PRESETS[preset].tables}


def test_method_reaches_the_tables_unless_it_is_calibrated():
    assert make_plan(decoder(), method="rtn-absmax")[EMBEDDING].method == "rtn-absmax"
    assert make_plan(decoder(), "int4-all", "gptq")[EMBEDDING].method == "rtn"


@pytest.mark.parametrize(
    ("asked", "linears", "tables"),
    [
        ("gptq", "gptq", "rtn"),
        ("imatrix", "imatrix", "rtn"),
        ("kmeans", "kmeans", "rtn"),
        ("rtn", "kmeans", "rtn"),
    ],
)
def test_methods_of_palettized_grids(asked, linears, tables):
    plan = make_plan(decoder(intermediate_size=128), "lut4", asked)
    assert {c.method for c in plan.choices if c.weight.is_linear} == {linears}
    assert {c.grid for c in plan.choices if c.weight.is_linear} == {LUT4_R16}
    assert plan[HEAD].method == tables
    assert plan.calibrated == (asked in ("gptq", "imatrix"))


def test_rows_that_no_table_of_levels_fits_stay_float_with_the_reason():
    """50 rows of a table, and what k-means finds without importance where they divide."""
    plan = make_plan(decoder(), "lut6", "gptq", {EMBEDDING: "lut4-r16"})
    assert plan[EMBEDDING].grid is None
    assert plan[EMBEDDING].reason.startswith("50 rows do not divide into groups of 16")
    assert plan[DOWN].grid is LUT6_R16  # columns need not divide
    gate = plan["model.layers.0.mlp.gate_proj.weight"]
    assert gate.grid is None and "100 rows" in gate.reason
    table = make_plan(decoder(vocab_size=64), "lut6", "gptq", {EMBEDDING: "lut4-r16"})[EMBEDDING]
    assert (table.grid, table.method) == (LUT4_R16, "kmeans")
    data = plan.to_json()
    assert Plan.from_json(data, decoder()) == plan
    data["weights"][EMBEDDING] |= {"grid": "lut4-r16", "method": "kmeans"}
    with pytest.raises(BadInput, match="50"):
        Plan.from_json(data, decoder())


def test_sizes_of_palettized_grids():
    summary = grid_summary(make_plan(decoder(intermediate_size=128), "lut4", "kmeans"))
    codes = (64 * 2 + 32 * 2 + 128 * 2) * 64 // 2 + 64 * 128 // 2
    levels = (64 * 2 + 32 * 2 + 128 * 2 + 64) // 16 * 16 * 2
    found = {"grid": "lut4-r16", "method": "kmeans", "weights": 14, "bytes": 2 * (codes + levels)}
    assert found in summary


def test_patterns_and_the_last_one_decides():
    patterns = {"*.mlp.*": "int8-g32", UP: "float16", "*.q_proj.*": "int8-row"}
    plan = make_plan(decoder(), patterns=patterns)
    assert plan["model.layers.0.mlp.gate_proj.weight"].grid is GRIDS["int8-g32"]
    assert plan[UP].grid is None and plan[UP].reason.startswith(f"pattern {UP}")
    assert plan["model.layers.1.self_attn.q_proj.weight"].grid is INT8_ROW
    assert plan["model.layers.1.self_attn.k_proj.weight"].grid is INT4_G32
    assert plan[DOWN].grid is None  # 100 does not divide here either


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"preset": "int5"}, UsageError, "int4-all"),
        ({"method": "magic"}, UsageError, "gptq"),
        ({"patterns": {"*": "int5"}}, UsageError, "int4-g32-signed"),
        ({"patterns": {"*": "lut5-r16"}}, UsageError, "lut3-r16, lut4-r16, lut6-r16, ggml's"),
        ({"method": "kmeans"}, UsageError, "int4-g32 does not take method kmeans"),
        ({"preset": "Q8_0", "method": "kmeans"}, UsageError, "Q8_0 does not take method kmeans"),
        ({"preset": "lut4", "method": "rtn-absmax"}, UsageError, "--method kmeans"),
        ({"patterns": {"*.nothing.*": "int8-row"}}, UsageError, "*.nothing.*"),
        ({"patterns": {"*norm*": "int8-row"}}, UsageError, "matches no matrix"),
    ],
)
def test_refusals(arguments, error, named):
    with pytest.raises(error, match=r"(?s).*") as caught:
        make_plan(decoder(), **arguments)
    assert named in str(caught.value)


def test_json_round_trip():
    plan = make_plan(decoder(), patterns={UP: "float16"})
    assert Plan.from_json(plan.to_json(), decoder()) == plan


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"grid": "int5", "method": "rtn", "reason": ""},
        {"grid": "int4-g32", "method": "", "reason": ""},
        {"grid": None, "method": "rtn", "reason": ""},
        {"grid": ["int4-g32"], "method": "rtn", "reason": ""},
    ],
)
def test_malformed_json_is_refused(entry):
    data = make_plan(decoder()).to_json()
    data["weights"][UP] = entry
    with pytest.raises(BadInput):
        Plan.from_json(data, decoder())


def test_json_of_another_decoder_is_refused():
    data = make_plan(decoder()).to_json()
    with pytest.raises(BadInput):
        Plan.from_json(data, decoder(num_hidden_layers=1))
    with pytest.raises(BadInput):
        Plan.from_json(data, decoder(num_hidden_layers=3))
    data["weights"][DOWN]["grid"], data["weights"][DOWN]["method"] = "int4-g32", "rtn"
    with pytest.raises(BadInput, match="100"):
        Plan.from_json(data, decoder())


def test_planning_loads_nothing_heavy():
    code = "import sys, slimport.quantize.plan; print(sorted({'torch', 'numba'} & {*sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("asked", "grid", "linears", "tables"),
    [
        ("autoround", "int2-g64", "autoround", "rtn"),
        ("autoround", "nf4-g64", "rtn-absmax", "rtn"),
        ("autoround", "lut4-r16", "gptq", "rtn"),
        ("autoround", "Q4_0", "gptq", "rtn"),
        ("autoround", "IQ2_S", "imatrix", "rtn"),
        ("autoround", "IQ4_NL", "gptq", "rtn"),
        ("hqq", "int4-g32-signed", "hqq", "hqq"),
        ("hqq", "nf4-g64", "rtn-absmax", "hqq"),
        ("hqq", "lut4-r16", "kmeans", "hqq"),
        ("hqq", "Q4_0", "rtn", "hqq"),
        ("auto", "int2-g64", "auto", "rtn"),
        ("auto", "lut4-r16", "auto", "rtn"),
        ("auto", "Q4_0", "auto", "rtn"),
        ("auto", "nf4-g64", "rtn-absmax", "rtn"),  # nothing to choose from
    ],
)
def test_what_takes_the_place_of_a_method(asked, grid, linears, tables):
    config = decoder(hidden_size=256, intermediate_size=256)
    plan = make_plan(config, "int4", asked, {"model.layers.*": grid})
    assert {c.method for c in plan.choices if c.weight.is_linear} == {linears}
    assert {c.method for c in plan.choices if c.weight.is_table} == {tables}
    assert plan.by_layers == (linears in ("autoround", "gptq", "auto"))
    assert plan.holds == (linears in ("autoround", "auto"))
    assert Plan.from_json(plan.to_json(), config) == plan
