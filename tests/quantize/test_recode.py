"""Codes within ggml's blocks: where they stand and what they mean, held to ggml's dequantizers."""

from __future__ import annotations

import numpy as np
import pytest

from slimport.quantize import blocks
from slimport.quantize.blocks import BlockGrid, BlockTensor
from slimport.quantize.codes import CODES
from slimport.quantize.ggml import Type
from slimport.quantize.recode import low_and_step, replace_codes

KINDS = pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.name)


def solved(kind: Type) -> BlockTensor:
    weight = np.random.default_rng(1).normal(size=(5, 768)).astype(np.float32)
    return blocks.solve(weight, BlockGrid(kind), np.ones(768, np.float32))


@KINDS
def test_any_code_is_read_by_ggml_as_its_level(kind: Type) -> None:
    tensor, known = solved(kind), CODES[kind]
    low, step = (np.repeat(part, known.group, 1) for part in low_and_step(tensor))
    codes = np.random.default_rng(2).integers(0, len(known.levels), (5, 768)).astype(np.uint8)
    read = replace_codes(tensor, codes, np.arange(768)).dequantize()
    np.testing.assert_allclose(read, low + step * known.levels[codes], atol=1e-6)
    assert np.abs(step).min() > 0


@KINDS
def test_other_columns_and_all_scales_stay(kind: Type) -> None:
    tensor = solved(kind)
    columns = np.random.default_rng(3).permutation(768)[:300]
    codes = np.zeros((5, 300), np.uint8)
    changed = replace_codes(tensor, codes, columns)
    others = np.setdiff1d(np.arange(768), columns)
    np.testing.assert_array_equal(changed.dequantize()[:, others], tensor.dequantize()[:, others])
    for before, after in zip(low_and_step(tensor), low_and_step(changed), strict=True):
        np.testing.assert_array_equal(before, after)
    filled = replace_codes(tensor, np.zeros((5, 768), np.uint8), np.arange(768))
    again = replace_codes(changed, np.zeros((5, 468), np.uint8), others)
    np.testing.assert_array_equal(filled.blocks, again.blocks)


@KINDS
def test_codes_and_scales_fill_the_block(kind: Type) -> None:
    """Every bit of a code has a place of its own."""
    size = {32: 32, 16: 256}.get(CODES[kind].group, 256)
    places = [
        (int(byte), int(shift) + bit)
        for part in CODES[kind].parts
        for byte, shift in zip(part.byte, part.shift, strict=True)
        for bit in range(part.count)
    ]
    assert len(set(places)) == len(places)
    bits = len(CODES[kind].levels).bit_length() - 1
    assert len(places) == bits * len(CODES[kind].parts[0].byte)
    assert len(CODES[kind].parts[0].byte) in (size, 256)
