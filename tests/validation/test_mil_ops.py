"""Each operation of ML Programs against coremltools' own inference of values, or worked by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from slimport.validation.runtimes.mil import Interpreter
from slimport.validation.runtimes.mil_ops import OPERATORS

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
Y = RNG.standard_normal((3, 1)).astype(np.float32)
P = np.abs(X) + np.float32(0.1)
N = RNG.integers(-5, 6, (2, 3)).astype(np.int32)
D = np.array([[2, -3, 5], [-2, 3, 4]], np.int32)
B = N > 0
Q, K, V = (RNG.standard_normal((1, 2, 3, 4)).astype(np.float32) for _ in range(3))
I1, I2 = np.array([0, 2], np.int32), np.array([[1, 0], [2, 2]], np.int32)


def ints(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


def bools(*values: bool) -> Any:
    return np.array(values, np.bool_)


def one(value: float) -> Any:
    return np.float32(value)


# what a run computes; all else is a constant of the program
COMPUTED = set("x y a b values indices update query key value_ begin end size shape reps".split())
COMPUTED |= {"attn_mask", "ref_tensor", "start", "step", "one_hot_vector_size"}
UNARY = "abs ceil cos erf exp exp2 floor relu round sigmoid sign sin square tanh".split()
BINARY = "add sub mul real_div maximum minimum".split()
COMPARED = "equal not_equal less less_equal greater greater_equal".split()
REDUCED = "reduce_max reduce_mean reduce_min reduce_sum reduce_sum_square reduce_l2_norm".split()
REDUCED.append("reduce_log_sum_exp")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"x": X * 2}) for name in UNARY),
    *((name, {"x": X, "y": Y}) for name in (*BINARY, *COMPARED)),
    *((name, {"x": N, "y": D}) for name in ("add", "sub", "mul", "floor_div", "mod", "equal")),
    *((name, {"x": B, "y": ~B[:, :1]}) for name in ("logical_and", "logical_or", "logical_xor")),
    *((name, {"x": X, "axes": ints(-1, 0), "keep_dims": True}) for name in REDUCED),
    *((name, {"x": X, "axes": ints(1)}) for name in REDUCED),
    ("reduce_sum", {"x": N, "axes": ints(0)}),
    ("reduce_argmax", {"x": X, "axis": 1, "keep_dims": True}),
    ("reduce_argmax", {"x": X}),
    ("reduce_argmin", {"x": X, "axis": 0}),
    ("logical_not", {"x": B}),
    ("pow", {"x": P, "y": Y}),
    ("floor_div", {"x": X, "y": Y}),
    ("mod", {"x": X, "y": Y}),
    ("sqrt", {"x": P}),
    ("rsqrt", {"x": P, "epsilon": one(0.25)}),
    ("rsqrt", {"x": P}),
    ("inverse", {"x": P, "epsilon": one(0.5)}),
    ("inverse", {"x": P}),
    ("log", {"x": P, "epsilon": one(0.5)}),
    ("log", {"x": P}),
    ("clip", {"x": X, "alpha": one(-0.5), "beta": one(0.75)}),
    *(("gelu", {"x": X, "mode": f"{mode}"})
      for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    ("gelu", {"x": X}),
    ("softmax", {"x": X, "axis": 1}),
    ("linear", {"x": X, "weight": RNG.standard_normal((5, 4)).astype(np.float32),
                "bias": RNG.standard_normal(5).astype(np.float32)}),
    ("linear", {"x": X, "weight": RNG.standard_normal((5, 4)).astype(np.float32)}),
    ("matmul", {"x": X, "y": X, "transpose_y": True}),
    ("matmul", {"x": X, "y": X, "transpose_x": True}),
    ("layer_norm", {"x": X, "axes": ints(1, -1), "epsilon": one(0.1),
                    "gamma": RNG.standard_normal((3, 4)).astype(np.float32),
                    "beta": RNG.standard_normal((3, 4)).astype(np.float32)}),
    ("l2_norm", {"x": X, "epsilon": one(0.5)}),
    ("l2_norm", {"x": Q[[0, 0]] * [[[[1]]], [[[2]]]]}),
    ("scaled_dot_product_attention", {"query": Q, "key": K, "value": V}),
    ("scaled_dot_product_attention",
     {"query": Q, "key": K, "value": V, "attn_mask": np.tri(3, dtype=np.bool_)}),
    ("scaled_dot_product_attention",
     {"query": Q, "key": K[:, :, :2], "value": V[:, :, :2], "attn_mask": Y[:, [0, 0]]}),
    ("select", {"cond": B, "a": N, "b": ints(7, 8, 9)}),
    ("select", {"cond": B, "a": X[:, :, 0], "b": one(-1)}),
    *(("cast", {"x": X * 3, "dtype": dtype}) for dtype in ("int32", "bool", "fp32", "fp16")),
    *(("cast", {"x": N, "dtype": dtype}) for dtype in ("int8", "int16", "fp32", "bool")),
    ("cast", {"x": np.abs(N), "dtype": "uint16"}),
    ("cast", {"x": np.abs(N), "dtype": "uint8"}),
    ("reshape", {"x": X, "shape": ints(4, -1)}),
    ("reshape", {"x": X, "shape": ints(0, -1)}),
    ("reshape", {"x": X, "shape": ints(1, 0, 0, 0)}),
    ("expand_dims", {"x": X, "axes": ints(0, -1, 2)}),
    ("squeeze", {"x": X[:1, :, :1], "axes": ints(0, -1)}),
    ("squeeze", {"x": X[:1, :, :1]}),
    ("transpose", {"x": X, "perm": ints(2, 0, 1)}),
    ("slice_by_index", {"x": X, "begin": ints(0, -2, 1), "end": ints(2, 3, -1)}),
    ("slice_by_index", {"x": X, "begin": ints(1, 0, 0), "end": ints(0, 0, 0),
                        "stride": ints(1, 2, 3), "begin_mask": bools(False, True, False),
                        "end_mask": bools(False, True, True),
                        "squeeze_mask": bools(True, False, False)}),
    ("slice_by_index", {"x": X, "begin": ints(0, 2, 3), "end": ints(1, 0, 0),
                        "stride": ints(1, -1, -2), "end_mask": bools(False, False, True)}),
    ("slice_by_size", {"x": X, "begin": ints(1, 0, -2), "size": ints(1, -1, 2)}),
    ("slice_update", {"x": X, "update": X[:1, :2] * 5, "begin": ints(1, 0, 0),
                      "end": ints(2, 3, 9), "stride": ints(1, 2, 1),
                      "end_mask": bools(False, False, True)}),
    ("gather", {"x": X, "indices": I2[:, ::-1], "axis": -1}),
    ("gather", {"x": X, "indices": I2, "axis": 1}),
    ("gather", {"x": N, "indices": np.int32(1)}),
    ("gather_along_axis", {"x": N, "indices": I2[:, [0, 1, 1]] % 2, "axis": 0}),
    ("concat", {"values": [X, X * 2], "axis": -2}),
    ("concat", {"values": [np.int32(3), np.int32(4)], "axis": 0}),
    ("split", {"x": X, "num_splits": 2, "axis": -1}),
    ("split", {"x": X, "split_sizes": ints(1, 2), "axis": 1}),
    ("stack", {"values": [X, X * 2], "axis": -1}),
    ("tile", {"x": X, "reps": ints(2, 1, 3)}),
    ("pad", {"x": X, "pad": ints(1, 0, 2, 1), "constant_val": one(9)}),
    ("pad", {"x": X, "pad": ints(1, 2, 0, 1, 0, 0)}),
    ("range_1d", {"start": np.int32(2), "end": np.int32(11), "step": np.int32(3)}),
    ("range_1d", {"start": one(2), "end": one(0), "step": one(-0.5)}),
    ("fill", {"shape": ints(2, 3), "value": one(1.5)}),
    ("fill", {"shape": ints(2), "value": np.int32(4)}),
    ("fill_like", {"ref_tensor": N, "value": one(2)}),
    ("shape", {"x": X}),
    ("identity", {"x": X}),
    ("band_part", {"x": X, "lower": 1, "upper": 0}),
    ("band_part", {"x": X, "lower": -1, "upper": 1}),
    ("cumsum", {"x": X, "axis": 1}),
    ("cumsum", {"x": N, "axis": 1, "reverse": True}),
    ("topk", {"x": X, "k": 2, "axis": 1, "ascending": True}),
    ("topk", {"x": X, "k": 3}),
]  # fmt: skip
# Those of which coremltools infers no value, or a wrong one.
BY_HAND: list[tuple[str, dict[str, Any], Any]] = [
    ("silu", {"x": X}, X / (1 + np.exp(-X))),
    ("softplus", {"x": X}, np.log1p(np.exp(X))),
    ("cumsum", {"x": N, "axis": 1, "exclusive": True},
     np.stack([0 * N[:, 0], N[:, 0], N[:, 0] + N[:, 1]], 1)),
    ("cumsum", {"x": N, "axis": 1, "exclusive": True, "reverse": True},
     np.stack([N[:, 1] + N[:, 2], N[:, 2], 0 * N[:, 0]], 1)),
    ("one_hot", {"indices": ints(2, 0), "one_hot_vector_size": np.int32(3), "axis": 0,
                 "on_value": one(5), "off_value": one(1)},
     np.array([[1, 5], [1, 1], [5, 1]], np.float32)),
    ("real_div", {"x": ints(12, -8), "y": ints(4, 4)}, ints(3, -2)),
    ("conv", {"x": X, "weight": np.eye(3, dtype=np.float32)[::-1, :, None].copy(),
              "bias": np.ones(3, np.float32)}, X[:, ::-1] + 1),
    ("conv", {"x": X, "weight": np.ones((3, 1, 2), np.float32), "groups": 3,
              "pad_type": "custom", "pad": ints(1, 0)},
     X + np.pad(X, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]),
    ("conv", {"x": X, "weight": np.ones((3, 1, 2), np.float32), "groups": 3, "pad_type": "same"},
     X + np.pad(X, ((0, 0), (0, 0), (0, 1)))[:, :, 1:]),
    ("conv", {"x": X, "weight": np.ones((3, 1, 2), np.float32), "groups": 3,
              "pad_type": "same_lower"}, X + np.pad(X, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]),
    ("conv", {"x": X[:, :, :, None], "weight": np.ones((1, 3, 2, 1), np.float32),
              "strides": ints(1, 1), "dilations": ints(2, 1)},
     (X[:, :, :2] + X[:, :, 2:]).sum(1)[:, None, :, None]),
]  # fmt: skip
Oracle = Callable[[str, dict[str, Any]], list[np.ndarray[Any, Any]]]


@pytest.fixture(scope="module")
def coremltools() -> Any:
    with warnings.catch_warnings(action="ignore"):
        import coremltools

        return coremltools


@pytest.fixture(scope="module")
def infer(coremltools: Any) -> Oracle:
    """infer(operation, arguments) -> its outputs, as coremltools folds constants."""
    from coremltools.converters.mil import Builder

    def call(operation: str, arguments: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
        found: list[np.ndarray[Any, Any]] = []

        def program() -> Any:
            made = getattr(Builder, operation)(**arguments)
            several = made if isinstance(made, tuple | list) else [made]
            found.extend(np.asarray(each.val) for each in several)
            return made

        target = coremltools.target.iOS18
        with warnings.catch_warnings(action="ignore"):
            Builder.program(input_specs=[], opset_version=target)(program)
        assert all(each.dtype != object for each in found), "coremltools infers nothing"
        return found

    return call


def kind_of(array: np.ndarray[Any, Any]) -> str:
    kinds = {"f": "FLOAT", "i": "INT", "u": "UINT", "b": "BOOL"}
    bits = "" if array.dtype.kind == "b" else str(8 * array.itemsize)
    return (kinds[array.dtype.kind] + bits).replace("64", "32")


def run(mil: Any, operation: str, arguments: dict[str, Any], made: list[Any]) -> list[Any]:
    """What the interpreter makes of one operation, its operands given when it runs."""
    inputs, given = dict[str, torch.Tensor](), dict[str, Any]()

    def operand(name: str, value: Any) -> Any:
        array = np.asarray(value)
        if array.dtype.kind not in "fi" or isinstance(value, str | bool):
            return array
        inputs[name] = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
        return mil.input(name, kind_of(array), *array.shape)

    attention = operation == "scaled_dot_product_attention"
    for key, value in arguments.items():
        computed = key in COMPUTED or (attention and key == "value")
        if isinstance(value, list):
            given[key] = [operand(f"{key}{index}", each) for index, each in enumerate(value)]
        else:
            given[key] = operand(key, value) if computed else np.asarray(value)
        if not computed and isinstance(value, int) and not isinstance(value, bool):
            given[key] = np.int32(value)
    names = [f"made{index}" for index in range(len(made))]
    mil.op(operation, names[0], kind_of(made[0]), *made[0].shape, **given)
    for name, array in zip(names[1:], made[1:], strict=True):
        output = mil.block.operations[-1].outputs.add(name=name)
        mil._type(output.type.tensorType, kind_of(array), array.shape)
    for index, array in enumerate(made):
        if kind_of(array) not in ("FLOAT16", "FLOAT32", "INT32"):  # which no function returns
            given = {"x": names[index], "dtype": np.array("int32")}
            names[index] = mil.op("cast", f"whole{index}", "INT32", *array.shape, **given)
    mil.returns(*names)
    found = Interpreter(mil.save(), rounding="fp32").run(inputs)
    return [found[name].numpy() for name in names]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name for name, _ in CASES])
def test_operation_as_coremltools_infers_it(mil: Any, infer: Oracle, index: int) -> None:
    operation, arguments = CASES[index]
    expected = infer(operation, arguments)
    if operation == "cast":  # numpy infers uint8 where it is told to, and int64 of Python's ints
        kinds = {"bool": np.bool_, "fp16": np.float16, "fp32": np.float32}
        expected = [expected[0].astype(kinds.get(arguments["dtype"], arguments["dtype"]))]
    elif expected[0].dtype == np.float64:
        expected = [each.astype(np.float32) for each in expected]
    if operation == "topk":
        expected[1] = expected[1].astype(np.int32)
    for found, each in zip(run(mil, operation, arguments, expected), expected, strict=True):
        tolerance = 1e-3 if each.dtype == np.float16 else 2e-6
        np.testing.assert_allclose(found, each, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("index", range(len(BY_HAND)), ids=[name for name, *_ in BY_HAND])
def test_operation_worked_by_hand(mil: Any, index: int) -> None:
    operation, arguments, expected = BY_HAND[index]
    (found,) = run(mil, operation, arguments, [expected])
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8"])
@pytest.mark.parametrize("blocks", [(1, 1), (6, 1), (6, 4), (3, 2), (1, 4)])
def test_scaled_codes_as_coremltools_computes_them(
    mil: Any, coremltools: Any, kind: str, blocks: tuple[int, int]
) -> None:
    from coremltools.converters.mil.mil.ops.defs.iOS18 import constexpr_blockwise_shift_scale

    low, high = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-128, 128)}[kind]
    codes = RNG.integers(low, high, (6, 8)).astype(np.uint8 if kind == "UINT4" else np.int8)
    scale = RNG.standard_normal(blocks).astype(np.float16)
    offset = RNG.integers(low, high, blocks).astype(codes.dtype)
    expected = constexpr_blockwise_shift_scale.decompress(codes, scale, offset)
    packed = (codes.view(np.uint8) & 15).reshape(-1, 2) << np.array([0, 4], np.uint8)
    content = codes.tobytes() if kind == "INT8" else packed.sum(1, dtype=np.uint8).tobytes()
    mil.blob("codes", kind, content, 6, 8)
    zeros = offset.reshape(-1).view(np.uint8) & (255 if kind == "INT8" else 15)
    if kind != "INT8":
        zeros = np.append(zeros, np.zeros(zeros.size % 2, np.uint8)).reshape(-1, 2)
        zeros = (zeros << np.array([0, 4], np.uint8)).sum(1, dtype=np.uint8)
    unused = 0 if kind == "INT8" else offset.size % 2 * 4
    mil.blob("zeros", kind, zeros.tobytes(), *blocks, unused=unused)
    parts = {"data": "codes", "scale": scale, "offset": "zeros"}
    mil.op("constexpr_blockwise_shift_scale", "w", "FLOAT16", 6, 8, **parts)
    mil.input("places", "INT32", 3)
    mil.op("identity", "all", "FLOAT16", 6, 8, x="w")
    mil.op("gather", "some", "FLOAT16", 3, 8, x="w", indices="places")
    mil.returns("all", "some")
    places = torch.tensor([5, 0, 3])
    found = Interpreter(mil.save(), rounding="fp16").run({"places": places})
    np.testing.assert_array_equal(found["all"].numpy(), expected.astype(np.float32))
    assert torch.equal(found["some"], found["all"][places])
    meant = Interpreter(mil.save(), rounding="fp32").run({"places": places})["all"]
    exact = constexpr_blockwise_shift_scale.decompress(
        codes.astype(np.float64), scale.astype(np.float64), offset.astype(np.float64)
    )
    np.testing.assert_array_equal(meant.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("groups", [(1, 1), (6, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize("scaled", [False, True])
def test_tables_as_coremltools_reads_them(
    mil: Any, coremltools: Any, groups: tuple[int, int], scaled: bool
) -> None:
    from coremltools.converters.mil.mil.ops.defs.iOS18 import constexpr_lut_to_dense

    codes = RNG.integers(0, 4, (6, 8)).astype(np.uint8)
    table = RNG.standard_normal((*groups, 4, 1)).astype(np.float16)
    expected = constexpr_lut_to_dense.decompress(codes, table, None)
    shifts = np.array([0, 2, 4, 6], np.uint8)
    packed = (codes.reshape(-1, 4) << shifts).sum(1, dtype=np.uint8)
    mil.blob("codes", "UINT2", packed.tobytes(), 6, 8)
    mil.op("constexpr_lut_to_dense", "w", "FLOAT16", 6, 8, indices="codes", lut=table)
    if scaled:
        scale = RNG.standard_normal((6, 2)).astype(np.float16)
        expected = expected * np.repeat(scale, 4, 1)
        parts = {"data": "w", "scale": scale}
        mil.op("constexpr_blockwise_shift_scale", "s", "FLOAT16", 6, 8, **parts)
    mil.op("identity", "y", "FLOAT16", 6, 8, x="s" if scaled else "w")
    mil.returns("y")
    found = Interpreter(mil.save(), rounding="fp16").run({})["y"]
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))


def test_every_operation_is_tested() -> None:
    assert {name for name, *_ in (*CASES, *BY_HAND)} == set(OPERATORS)
