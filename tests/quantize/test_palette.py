"""Palettized grids: sizes, values, digests, what is no such tensor, the way through the store."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint, Weights
from slimport.errors import BadInput, Unsupported
from slimport.quantize import quantizer
from slimport.quantize.grid import Float32, Int8
from slimport.quantize.methods import gptq, kmeans
from slimport.quantize.packing import unpack_unsigned
from slimport.quantize.palette import (
    LARGEST_LEVEL,
    LUT4_R16,
    LUT6_R16,
    PALETTE_GRIDS,
    PaletteGrid,
    PaletteTensor,
    round_levels,
)
from slimport.quantize.plan import Plan, make_plan
from slimport.quantize.quantizer import quantize, restore
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.windows import Windows, windows_of

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
SMALL = PaletteGrid("small", bits=1, group=2)
GRIDS = pytest.mark.parametrize("grid", PALETTE_GRIDS.values(), ids=PALETTE_GRIDS)


def small() -> PaletteTensor:
    codes = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]], np.int8)
    return PaletteTensor(SMALL, codes, np.array([[-0.5, 2], [0.25, 8]], np.float32))


def test_each_row_group_has_levels_of_its_own() -> None:
    tensor = small()
    assert tensor.shape == (4, 3)
    expected = [[-0.5, 2, 2], [2, -0.5, -0.5], [0.25, 0.25, 8], [8, 8, 8]]
    assert tensor.dequantize().dtype == np.float32
    assert tensor.dequantize().tolist() == expected


def test_sizes_by_hand() -> None:
    assert LUT4_R16.bytes_of((32, 64)) == 32 * 32 + 2 * 16 * 2
    assert LUT6_R16.bytes_of((32, 64)) == 32 * 48 + 2 * 64 * 2
    assert LUT6_R16.bytes_of((16, 5)) == 16 * 4 + 64 * 2  # 30 bits to a row
    assert LUT4_R16.bits_per_weight(64) == 4 + 16 / 64
    assert LUT6_R16.bits_per_weight(64) == 6 + 64 / 64
    for grid in PALETTE_GRIDS.values():
        assert grid.bits_per_weight(576) == 8 * grid.bytes_of((1536, 576)) / (1536 * 576)
    assert LUT4_R16.fits((48, 7)) and not LUT4_R16.fits((40, 64))


def test_digest_by_hand() -> None:
    content = b"a.weight\nsmall\n4 3\n" + small().codes.tobytes()
    content += struct.pack("<4f", -0.5, 2, 0.25, 8)
    assert small().digest("a.weight") == hashlib.sha256(content).hexdigest()


def test_every_part_counts_in_the_digest_and_memory_order_does_not() -> None:
    base = small()
    codes, levels = base.codes.copy(), base.levels.copy()
    codes[3, 2] ^= 1
    levels[0, 0] = -0.25
    other = PaletteGrid("other", bits=1, group=2)
    digests = {
        base.digest("a"),
        base.digest("b"),
        PaletteTensor(SMALL, codes, base.levels).digest("a"),
        PaletteTensor(SMALL, base.codes, levels).digest("a"),
        PaletteTensor(other, base.codes, base.levels).digest("a"),
    }
    assert len(digests) == 5
    turned = PaletteTensor(SMALL, np.asfortranarray(base.codes), np.asfortranarray(base.levels))
    assert turned.digest("a") == base.digest("a")


ZEROS, FLAT = np.zeros((32, 8), np.int8), np.zeros((2, 16), np.float32)


@pytest.mark.parametrize(
    ("codes", "levels", "why"),
    [
        (ZEROS.astype(np.uint8), FLAT, "codes are uint8"),
        (ZEROS, FLAT.astype(np.float16), "levels float16"),
        (ZEROS, FLAT[:1], r"need levels \(2, 16\)"),
        (ZEROS, np.zeros((2, 64), np.float32), r"need levels \(2, 16\)"),
        (ZEROS[:24], FLAT[:1], "on lut4-r16"),
        (ZEROS + np.int8(16), FLAT, "codes 16 to 16"),
        (ZEROS - np.int8(1), FLAT, "codes -1 to -1"),
        (ZEROS, FLAT + np.float32(0.1), "not exact in float16"),
        (ZEROS, FLAT + np.float32(np.inf), "not exact in float16"),
        (ZEROS, FLAT * np.float32(np.nan), "not exact in float16"),
    ],
)
def test_what_is_no_such_tensor_is_refused(codes: Int8, levels: Float32, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        PaletteTensor(LUT4_R16, codes, levels)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (1 + 2.0**-11, 1.0),  # half way: to the even one
        (1 + 3 * 2.0**-11, 1 + 2.0**-9),
        (1e9, LARGEST_LEVEL),
        (-65519.0, -LARGEST_LEVEL),
        (2.0**-25, 0.0),
        (2.0**-24, 2.0**-24),
    ],
)
def test_levels_are_rounded_to_float16(level: float, expected: float) -> None:
    assert round_levels(np.array([level], np.float32)).tolist() == [expected]


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def windows() -> Windows:
    return windows_of(np.random.default_rng(0).integers(0, 400, (12, 64)))


def made(
    source: Checkpoint,
    folder: Path,
    windows: Windows | None = None,
    weights: Weights | None = None,
    **plan: Any,
) -> QuantizedCheckpoint:
    return quantize(
        weights or source,
        source.config,
        make_plan(decoder_config(source.config), **plan),
        folder,
        calibration=windows,
        tokenizer_folder=source.folder,
        progress=lambda stage, done, total: None,
    )


@settings(deadline=None, max_examples=15, suppress_health_check=[*HealthCheck])
@given(seed=st.integers(0, 2**32), preset=st.sampled_from(["lut4", "lut6"]))
def test_any_codes_and_levels_come_back_from_the_store(
    seed: int, preset: str, source: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = make_plan(decoder_config(source.config), preset, patterns={EMBEDDING: "lut6-r16"})
    rng = np.random.default_rng(seed)
    tensors = {}
    for choice in plan.choices:
        shape, grid = choice.weight.shape, choice.grid
        if not isinstance(grid, PaletteGrid):
            tensors[choice.weight.name] = np.ones(shape, np.float32)
            continue
        codes = rng.integers(0, grid.size, shape).astype(np.int8)
        bits = rng.integers(0, 2**16, (shape[0] // 16, grid.size)).astype(np.uint16)
        levels = np.nan_to_num(bits.view(np.float16).astype(np.float32), posinf=0, neginf=0)
        tensors[choice.weight.name] = PaletteTensor(grid, codes, levels)  # type: ignore[assignment]
    folder = tmp_path_factory.mktemp("store")
    restore(tensors.items(), source.config, plan, folder, tokenizer_folder=source.folder)
    found = QuantizedCheckpoint.open(folder)
    found.verify()
    for name, expected in tensors.items():
        loaded = found.load(name)
        if isinstance(expected, PaletteTensor):
            assert isinstance(loaded, PaletteTensor) and loaded.grid is expected.grid
            np.testing.assert_array_equal(loaded.codes, expected.codes)
            np.testing.assert_array_equal(loaded.levels, expected.levels)
            assert found.records[name].digest == expected.digest(name)


@GRIDS
def test_the_store_as_documented(grid: PaletteGrid, source: Checkpoint, tmp_path: Path) -> None:
    model = made(source, tmp_path / "out", method="rtn", patterns={"*.mlp.*": grid.name})
    expected = kmeans.solve(source.rows(UP), grid)
    shard = load_file(model.folder / "model-00003-of-00004.safetensors")
    assert shard[f"{UP}.levels"].dtype == np.float16
    np.testing.assert_array_equal(shard[f"{UP}.levels"].astype(np.float32), expected.levels)
    codes, columns = shard[f"{UP}.codes"], expected.shape[1]
    np.testing.assert_array_equal(unpack_unsigned(codes, grid.bits, columns), expected.codes)
    assert codes.nbytes + shard[f"{UP}.levels"].nbytes == grid.bytes_of(expected.shape)
    content = json.loads((model.folder / "quantization.json").read_text())
    assert content["plan"]["weights"][UP]["grid"] == grid.name
    assert Plan.from_json(content["plan"], model.decoder) == model.plan
    error = np.linalg.norm(expected.dequantize() - source.rows(UP))
    assert model.errors[UP] == pytest.approx(error / np.linalg.norm(source.rows(UP)), rel=1e-5)
    assert model.records[UP].added == 0


def test_rows_are_dequantized_wherever_they_begin(source: Checkpoint, tmp_path: Path) -> None:
    model = made(source, tmp_path / "out", preset="lut4", method="rtn")
    loaded = model.load(UP)
    assert isinstance(loaded, PaletteTensor)
    whole = loaded.dequantize()
    np.testing.assert_array_equal(model.rows(UP), whole)
    for start, stop in ((3, 7), (15, 17), (16, 32), (5, 96), (90, 1000), (-3, None), (7, 7)):
        np.testing.assert_array_equal(model.rows(UP, start, stop), whole[start:stop])


@pytest.mark.parametrize("part", ["codes", "levels"])
def test_verify_sees_one_flipped_bit(part: str, source: Checkpoint, tmp_path: Path) -> None:
    model = made(source, tmp_path / "out", preset="lut6", method="rtn")
    path = model.folder / "model-00003-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    content[8 + size + header[f"{UP}.{part}"]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"{UP} was changed after it was quantized"):
        QuantizedCheckpoint.open(model.folder).verify()


@pytest.mark.parametrize("method", ["kmeans", "imatrix", "gptq"])
def test_any_number_of_threads_and_size_of_blocks_gives_the_same_bytes(
    method: str,
    source: Checkpoint,
    windows: Windows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = {"preset": "lut4", "method": method, "patterns": {EMBEDDING: "lut6-r16"}}
    digests = set()
    for threads, block in ((1, 1 << 20), (1, 1000), (4, 1000), (3, 5000)):
        monkeypatch.setattr(quantizer, "_BLOCK", block)
        monkeypatch.setattr(quantizer, "_threads", lambda count=threads: count)
        model = made(source, tmp_path / "out", windows, **plan)
        digests.add(model.weights_digest)
    assert len(digests) == 1
    assert model.calibration == (None if method == "kmeans" else windows.digest)


def test_gptq_is_given_what_earlier_layers_lost(
    source: Checkpoint, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    solve = gptq.solve

    def counted(weight: Float32, grid: Any, *statistics: Float32) -> Any:
        seen[grid.name] = seen.get(grid.name, 0) + 1
        return solve(weight, grid, *statistics)

    monkeypatch.setattr(gptq, "solve", counted)
    model = made(source, tmp_path / "out", windows, preset="lut4", patterns={UP: "int4-g32"})
    assert seen == {"lut4-r16": 13, "int4-g32": 1}
    model.verify()


class Changed:
    """Weights of which one is multiplied."""

    def __init__(self, base: Checkpoint, factor: float) -> None:
        self.base, self.factor = base, np.float32(factor)

    def names(self) -> tuple[str, ...]:
        return tuple(self.base.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        values = self.base.rows(name, start, stop)
        return values * self.factor if name == UP else values


@pytest.mark.parametrize("factor", [1e-12, 1e-7, 1e8, 1e18, 1e30])
def test_weights_that_no_float16_is_near_are_refused(
    factor: float, source: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=f"{UP}: .*(float16 holds no such levels|are no numbers)"):
        made(source, tmp_path / "out", weights=Changed(source, factor), preset="lut6", method="rtn")
    assert not (tmp_path / "out").exists()
