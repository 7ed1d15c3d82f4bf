import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimport.quantize.grid import (
    GRIDS,
    INT4_G32,
    INT8_ROW,
    SCALE_CEILING,
    SCALE_FLOOR,
    Grid,
    listed,
    round_scale,
)

positive = st.floats(2.0**-60, 2.0**60, width=32)


@given(st.lists(positive, min_size=1, max_size=40), st.booleans())
def test_scales_are_exact_in_fp16_and_bf16(values, negative):
    scale = np.array(values, np.float32) * (-1 if negative else 1)
    rounded = round_scale(scale)
    assert np.array_equal(rounded.astype(np.float16).astype(np.float32), rounded)
    assert torch.equal(torch.from_numpy(rounded).bfloat16().float(), torch.from_numpy(rounded))
    assert np.array_equal(round_scale(rounded), rounded)
    assert np.array_equal(np.signbit(rounded), np.signbit(scale))
    assert (np.abs(rounded) >= SCALE_FLOOR).all() and (np.abs(rounded) <= SCALE_CEILING).all()


@given(st.floats(SCALE_FLOOR, SCALE_CEILING, width=32))
def test_rounding_moves_a_scale_by_half_a_step_at_most(value):
    rounded = float(round_scale(np.float32([value]))[0])
    assert abs(rounded - value) <= value * 2.0**-8  # 8 significant bits, nearest


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1 + 1 / 256, 1.0),  # half way: to the even one
        (1 + 3 / 256, 1 + 4 / 256),
        (1 + 1.01 / 256, 1 + 2 / 256),
        (0.0, 1.0),  # an all-zero group
        (-0.0, 1.0),
        (1e-30, SCALE_FLOOR),
        (-1e-30, -SCALE_FLOOR),
        (1e30, SCALE_CEILING),
    ],
)
def test_hand_computed_scales(scale, expected):
    assert round_scale(np.float32([[scale]])).tolist() == [[expected]]


def test_sizes():
    assert INT4_G32.bits_per_weight(4096) == 4.5
    assert INT8_ROW.bits_per_weight(512) == 8.03125
    assert INT4_G32.bytes_of((3, 64)) == 3 * (32 + 2 * 2)
    assert INT8_ROW.bytes_of((3, 65)) == 3 * (65 + 2)
    assert Grid("odd", bits=4, low=-8, high=7, group=None).bytes_of((2, 5)) == 2 * (3 + 2)


def test_what_fits():
    assert INT4_G32.fits((1, 96)) and not INT4_G32.fits((96, 100))
    assert INT8_ROW.fits((1, 100)) and INT8_ROW.groups(100) == 1


def test_names_are_keys():
    assert all(name == grid.name for name, grid in GRIDS.items())


def test_zero_points_are_the_smallest_that_leave_no_code_below_0():
    grid = GRIDS["uint4-g16"]
    codes = np.int8([[-3] + [12] * 15 + [2] * 16, [-15] * 16 + [0] * 16])
    assert grid.zero_points(codes).tolist() == [[3, 0], [15, 0]]


def test_zero_points_cost_as_many_bits_as_codes():
    grid = GRIDS["uint4-g32"]
    assert grid.bits_per_weight(4096) == 4.625
    assert grid.bytes_of((3, 96)) == 3 * (48 + 3 * 2 + 2)  # three points in two bytes


def test_scales_of_others_have_a_grid_of_their_own():
    for group in ("g16", "g32", "g64", "g128", "row"):
        for kind in ("int4", "uint4", "int8"):
            portable, wide = (GRIDS[f"{kind}-{group}{end}"] for end in ("", "-f16"))
            assert (portable.scale_bits, wide.scale_bits) == (8, 11)
            assert not portable.signed_scale and wide.signed_scale
            assert portable.group == wide.group
    assert (GRIDS["int8-row"].low, GRIDS["int8-row-f16"].low) == (-127, -128)


def test_names_for_people():
    assert listed(["int4-g32", "int4-row", "nf4-g64"]) == "int4-{g32,row}, nf4-g64"
    wide = ["uint4-g16", "uint4-g16-f16", "uint4-g32", "uint4-g32-f16", "int8-row"]
    assert listed(wide) == "uint4-{g16,g32}[-f16], int8-row"
