"""What is asked of a GPU stays within what every device takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimport.architectures import DecoderConfig, decoder_config
from slimport.checkpoint import read_json
from slimport.errors import Unsupported
from slimport.export.executorch_vulkan import limits
from slimport.quantize.grid import GRIDS, Grid


@pytest.fixture(scope="module")
def config(tiny_llama: Path) -> DecoderConfig:
    return decoder_config(read_json(tiny_llama / "config.json"))


def sized(config: DecoderConfig, **sizes: Any) -> DecoderConfig:
    return dataclasses.replace(config, **sizes)


@given(
    rows=st.integers(1, 70_000).map(lambda n: 4 * n),
    columns=st.integers(1, 512).map(lambda n: 32 * n),
    grid=st.sampled_from([None, GRIDS["int4-g32"], GRIDS["int8-row"]]),
    cut=st.integers(0, 3),
)
def test_the_parts_of_a_matrix(rows: int, columns: int, grid: Grid | None, cut: int) -> None:
    """They are all of its rows in order, end at every cut, and each is within the limits."""
    cuts = sorted({rows // 4 * n // 4 * 4 for n in range(1, cut + 1)} - {0})
    found = list(limits.ranges((rows, columns), grid, cuts))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == rows and {*cuts} <= {stop for _, stop in found}
    for start, stop in found:
        count = stop - start
        assert 0 < count <= limits.ROWS and start % 4 == stop % 4 == 0
        bits = 32 if grid is None else grid.bits
        assert count * columns * bits // 8 <= limits.BUFFER
        if grid is not None and grid.group is not None:
            assert count * (columns // grid.group) <= limits.ELEMENTS


@given(
    heads=st.sampled_from([1, 8, 32, 128]),
    shared=st.sampled_from([1, 2, 8]),
    head_dim=st.sampled_from([16, 64, 128, 256]),
    wide=st.sampled_from([64, 8192, 65_536]),
    context=st.integers(1, 40_000),
)
def test_chunks_and_caches(
    heads: int, shared: int, head_dim: int, wide: int, context: int, config: DecoderConfig
) -> None:
    given = sized(
        config,
        heads=heads,
        kv_heads=max(1, heads // shared),
        head_dim=head_dim,
        intermediate_size=wide,
        context_length=1 << 20,
    )
    limits.refuse_sizes(given)
    context = min(context, limits.longest_context(given))
    room, chunk = limits.room_of(context), limits.chunk_of(given, context)
    assert room >= context and room % 8 == chunk % 8 == 0 and 8 <= chunk <= min(128, room)
    assert 4 * heads * chunk * room <= limits.BUFFER
    assert 4 * given.kv_heads * head_dim * room <= limits.BUFFER
    assert chunk * wide <= limits.ELEMENTS and room * head_dim <= limits.ELEMENTS


def test_too_many_numbers_of_a_token_are_refused(config: DecoderConfig) -> None:
    with pytest.raises(Unsupported, match="cannot hold 1048576 numbers a token"):
        limits.refuse_sizes(sized(config, intermediate_size=1 << 20))


def test_a_real_size(config: DecoderConfig) -> None:
    """Llama 3.2 1B: a head of 128,256 rows in two parts, 1,024 tokens in eight chunks."""
    given = sized(config, heads=32, kv_heads=8, head_dim=64, intermediate_size=8192)
    assert limits.chunk_of(given, 1024) == 128
    assert list(limits.ranges((128_256, 2048), GRIDS["int8-row"])) == [
        (0, 65_536),
        (65_536, 128_256),
    ]
    assert len(list(limits.ranges((8192, 2048), GRIDS["int4-g32"]))) == 1
