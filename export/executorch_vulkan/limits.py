"""How large things may be for ExecuTorch's Vulkan runtime, which notices too late or never.

Facts are of its sources, release 1.4.1. A shader that runs once for each element is dispatched as
one row of workgroups, and every device has at least 65,535 of 64 threads; it is not asked for more.
A buffer of 128 MiB is what every device must take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...architectures import DecoderConfig
from ...errors import Unsupported
from ...quantize.grid import Grid
from ..layout import shortest_window

ELEMENTS = 65_535 * 64
BUFFER = 1 << 27  # bytes
ROWS = 65_536  # of one product: four to a texel, of which an image has at least 16,384
CHUNK = 128  # tokens of a prompt that are computed at a time, at most
STEP = 8  # chunks and caches are multiples of it: attention stores scores by fours
_FLOAT = 4
_ROPE, _HEAD, _LINEAR = 8, 4, 4  # what rotated numbers, heads, rows and columns are multiples of


def longest_context(config: DecoderConfig) -> int:
    """Up to a window, and what a buffer or a table of a rope holds."""
    ropes = [rope.rotated(config.head_dim) for rope in config.ropes]
    cache = BUFFER // (_FLOAT * config.kv_heads * config.head_dim)
    scores = BUFFER // (_FLOAT * config.heads * STEP)
    room = min([cache, scores, *(ELEMENTS // rotated for rotated in ropes)])
    return min(shortest_window(config), room // STEP * STEP)


def room_of(context: int) -> int:
    """Positions of a cache for `context` tokens."""
    return -(-context // STEP) * STEP


def chunk_of(config: DecoderConfig, context: int) -> int:
    """Tokens that are computed at a time."""
    room = room_of(context)
    scores = BUFFER // (_FLOAT * config.heads * room)
    most = min(CHUNK, room, scores, ELEMENTS // _widest(config))
    return most // STEP * STEP


def refuse_sizes(config: DecoderConfig) -> None:
    """Raise Unsupported for sizes that the shaders compute wrongly, without a word."""
    if config.head_dim % _HEAD:
        raise _odd(f"heads of {config.head_dim} numbers", _HEAD)
    for rope in config.ropes:
        if (rotated := rope.rotated(config.head_dim)) % _ROPE:
            raise _odd(f"ropes that turn {rotated} numbers of a head", _ROPE)
    if _widest(config) > ELEMENTS // STEP:
        raise Unsupported(
            f"ExecuTorch's Vulkan backend cannot hold {_widest(config)} numbers a token",
            f"its shaders are dispatched for {ELEMENTS} numbers, of {STEP} tokens at least",
            "write it for the CPU: --container executorch",
        )


def refuse_matrix(name: str, shape: tuple[int, int]) -> None:
    """Raise Unsupported for a matrix whose rows or columns do not divide by four."""
    for count, what in zip(shape, ("rows", "columns"), strict=True):
        if count % _LINEAR:
            raise _odd(f"{name} with {count} {what}", _LINEAR)


def ranges(
    shape: tuple[int, int], grid: Grid | None, cuts: Iterable[int] = ()
) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of a matrix that one product may have, in order.

    Args:
        cuts: rows at which a part ends in any case, in order; the last is that of the matrix.
    """
    rows, columns = shape
    most = min(ROWS, BUFFER * 8 // (columns * (32 if grid is None else grid.bits)))
    if grid is not None and grid.group is not None:
        most = min(most, ELEMENTS // grid.groups(columns))
    most = most // STEP * STEP
    start = 0
    for cut in (*cuts, rows):
        while start < cut:
            stop = min(cut, start + most)
            yield start, stop
            start = stop


def _widest(config: DecoderConfig) -> int:
    """Numbers of a token, at most."""
    return max(config.hidden_size, config.intermediate_size, config.heads * config.head_dim)


def _odd(what: str, step: int) -> Unsupported:
    return Unsupported(
        f"ExecuTorch's Vulkan backend cannot hold {what}",
        f"its shaders read {step} numbers at a time, and do not check that nothing is left over",
        "write it for the CPU: --container executorch",
    )
