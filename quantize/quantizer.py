"""Quantize a model: full-precision weights in, a quantized checkpoint on disk out.

Everything streams in the order of the forward pass. RTN works on blocks of rows in threads, GPTQ
on one decoder layer; anonymous memory does not depend on the number of layers.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..architectures import DecoderConfig, decoder_config
from ..checkpoint import Weights
from ..errors import Unsupported, UsageError
from . import blocks as ggml_blocks
from . import loss, store
from .blocks import BlockGrid, BlockTensor, Quantized
from .floats import half
from .given import Given
from .grid import SCALE_CEILING, Float32, Grid, Int8
from .imatrix import Imatrix
from .loss import NOTHING, Loss
from .methods import codebook, hqq, kmeans, kquants, rtn
from .packing import UInt8, pack, pack_unsigned
from .palette import LARGEST_LEVEL, LEVEL_DTYPE, PaletteGrid, PaletteTensor
from .plan import BY_LAYERS, FLOAT, GIVEN, Choice, Plan
from .store import Origin, QuantizedCheckpoint, Record, Shard
from .tensor import QuantizedTensor, start_digest
from .unfinished import Journal, run_of
from .windows import Windows

Progress = Callable[[str, int, int], None]

Importance = Mapping[str, Float32]

_BLOCK = 1 << 20  # weights in one block of rows: 4 MB as float32
_ADDED_LIMIT = 0.01  # relative RMSE that the floor of the scales may add


def quantize(
    weights: Weights,
    config: dict[str, Any],
    plan: Plan,
    folder: Path,
    *,
    calibration: Windows | Imatrix | None,
    tokenizer_folder: Path,
    progress: Progress,
    origin: Callable[[], Origin] = Origin,
    resumes: bool = False,
) -> QuantizedCheckpoint:
    """Quantize `weights` by `plan` into `folder`, which is emptied first and gone if that fails.

    A checkpoint that must not be lost is replaced as `bundle.replacing` does.

    Args:
        weights: full precision, adapters merged, or Given; `rows` is called from several threads.
        config: config.json of these weights.
        calibration: windows for calibrated methods, or for method imatrix alone an importance
            matrix; not used without one.
        tokenizer_folder: where tokenizer and licence files are copied from.
        progress: called with (stage, weights done, weights in all).
        origin: called when the first layer is done, so that hashing the base may go on meanwhile.
        resumes: go on where an equal run was stopped in `folder`, to the same bytes. Its journal
            `bundle.UNFINISHED` stays there, for the caller to remove; other files do not.

    Raises:
        UsageError: a calibrated method without windows, gptq with an importance matrix in their
            place, or `folder` holds something else.
        Unsupported: scales of a weight are outside of what every container holds.
        EnvironmentFailed: the disk is full or read-only.
    """
    if not plan.calibrated:
        calibration = None
    elif calibration is None:
        raise UsageError(
            "a calibrated method has no calibration windows",
            "it chooses codes by what the layers receive for real text",
            "give a text with --calibration FILE, or choose --method rtn",
        )
    elif isinstance(calibration, Imatrix) and plan.by_layers:
        method = next(filter(plan.uses, BY_LAYERS))
        raise UsageError(
            f"method {method} cannot start from an importance matrix",
            "it needs how inputs vary together, and the matrix holds their squares only",
            "choose --method imatrix, or leave --imatrix away",
        )
    digest = calibration.digest if calibration else None
    with store.filling(folder, resumes), ThreadPoolExecutor(_threads()) as pool:
        decoder, journal = decoder_config(config), None
        told: dict[str, Any] = {}
        if resumes:
            journal = Journal(folder, plan, lambda: run_of(plan, config, digest, origin()))
            told |= journal.told
        blocks = _blocks(weights, decoder, plan, calibration, pool, progress, told, journal)
        with closing(blocks):
            records = _write(blocks, plan, folder, progress, told, journal)
        with store.writing(folder):
            store.write_metadata(
                folder, config, plan, origin(), digest, records, tokenizer_folder, told
            )
    return QuantizedCheckpoint.open(folder)


def restore(
    tensors: Iterable[tuple[str, Quantized | Float32]],
    config: dict[str, Any],
    plan: Plan,
    folder: Path,
    *,
    tokenizer_folder: Path,
    origin: Origin | None = None,
    calibration: str | None = None,
    originals: Weights | None = None,
) -> QuantizedCheckpoint:
    """Write weights that are quantized already, such as those read back from a container.

    Args:
        tensors: every weight of the plan, in its order.
        calibration: digest of the text that they were calibrated or trained on.
        originals: their full-precision weights; without them their errors are not known.
    """
    origin = origin or Origin()
    with store.filling(folder):
        records = _write(
            _restored(tensors, originals), plan, folder, lambda stage, done, total: None
        )
        with store.writing(folder):
            store.write_metadata(
                folder, config, plan, origin, calibration, records, tokenizer_folder
            )
    return QuantizedCheckpoint.open(folder)


def _restored(
    tensors: Iterable[tuple[str, Quantized | Float32]], originals: Weights | None
) -> Iterator[_Block]:
    for name, tensor in tensors:
        if originals is not None and not isinstance(tensor, np.ndarray):
            yield _quantized_block(name, originals.rows(name), tensor)
        elif isinstance(tensor, BlockTensor):
            blocks = np.ascontiguousarray(tensor.blocks)
            yield _Block(name, math.prod(tensor.shape), blocks, blocks)
        elif isinstance(tensor, QuantizedTensor | PaletteTensor):
            yield _coded_block(name, tensor)
        else:
            values = np.ascontiguousarray(tensor, "<f4")
            yield _Block(name, values.size, values, values)


def _threads() -> int:
    shared = hasattr(os, "sched_getaffinity")  # not everywhere
    return min(len(os.sched_getaffinity(0)) if shared else os.cpu_count() or 1, 8)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of a weight, done.

    Attributes:
        weights: how many.
        values: int8 codes, ggml's blocks, or float32 values of a weight without a grid.
        stored: the same as they are written.
        scale: of codes, or their levels.
        zero_points: packed, where the grid has them.
        lost: by rounding.
    """

    name: str
    weights: int
    values: Int8 | UInt8 | Float32
    stored: UInt8 | Float32
    scale: Float32 | None = None
    zero_points: UInt8 | None = None
    lost: Loss = NOTHING


def _blocks(
    weights: Weights,
    config: DecoderConfig,
    plan: Plan,
    calibration: Windows | Imatrix | None,
    pool: ThreadPoolExecutor,
    progress: Progress,
    told: dict[str, Any],
    journal: Journal | None,
) -> Generator[_Block, None, None]:
    """All blocks in the order of the plan, but for those of finished shards.

    What was measured of layers is added to `told`.
    """
    shards = store.shards(plan)[len(journal.done) if journal else 0 :]
    if not shards:
        return
    if isinstance(calibration, Windows) and plan.by_layers:
        before = _finished_layers(journal, config, plan, progress) if journal else []
        yield from _by_layers(weights, config, plan, shards, calibration, pool, told, before)
        return
    importance: Importance = {}
    if isinstance(calibration, Imatrix):
        importance = calibration.importance
    elif calibration is not None:
        from .calibration import importance as measure  # torch is loaded only to calibrate

        importance = measure(weights, config, calibration, progress).importance
    yield from _by_rows(weights, chain.from_iterable(shards), pool, importance)


def _finished_layers(
    journal: Journal, config: DecoderConfig, plan: Plan, progress: Progress
) -> list[Callable[[], Mapping[str, Float32]]]:
    """What `layer_statistics` asks of each layer that an earlier run finished."""
    made = journal.open(config, plan)
    layers = [shard for shard in journal.done if shard[0].weight.layer is not None]

    def dequantized(done: int, shard: Shard) -> Mapping[str, Float32]:
        progress("through finished layers", done, len(layers))
        return {c.weight.name: made.rows(c.weight.name) for c in shard if c.grid is not None}

    return [partial(dequantized, *each) for each in enumerate(layers, 1)]


def _by_layers(
    weights: Weights,
    config: DecoderConfig,
    plan: Plan,
    shards: Iterable[Shard],
    windows: Windows,
    pool: ThreadPoolExecutor,
    told: dict[str, Any],
    before: Sequence[Callable[[], Mapping[str, Float32]]],
) -> Generator[_Block, None, None]:
    """Layers in order, each calibrated on what the quantized ones before it give."""
    from . import layers
    from .calibration import Statistics, layer_statistics, same_threads
    from .methods import gptq

    def solve(values: Float32, choice: Choice, seen: Statistics) -> Quantized:
        assert choice.grid is not None
        if choice.method == "gptq":
            return gptq.solve(values, choice.grid, *seen)
        diagonal = np.ascontiguousarray(seen.hessian.diagonal())
        if choice.method == "imatrix" and isinstance(choice.grid, BlockGrid):
            return _in_parts(values, choice, diagonal, pool)
        return rounded(values, choice, diagonal)

    solver = layers.Solver(weights, config, solve)
    stream = layer_statistics(weights, config, windows, plan.holds, before)
    with same_threads(), closing(stream):
        solved: dict[str, Float32] | None = None
        for shard in shards:
            if shard[0].weight.layer is None:
                yield from _by_rows(weights, shard, pool, {})
                continue
            passage, statistics = next(stream) if solved is None else stream.send(solved)
            found = solver.layer(shard, passage, statistics)
            if found.told:
                told[str(passage.index)] = found.told
            solved = {}
            for choice in shard:
                name = choice.weight.name
                if choice.grid is None:
                    yield from _by_rows(weights, (choice,), pool, {})
                    continue
                tensor = found.tensors.pop(name)
                solved[name] = tensor.dequantize()
                yield _quantized_block(name, weights.rows(name), tensor)


def _in_parts(
    values: Float32, choice: Choice, importance: Float32, pool: ThreadPoolExecutor
) -> BlockTensor:
    """By ggml's kernel, some rows at a time in threads."""
    assert isinstance(choice.grid, BlockGrid)
    solve = partial(ggml_blocks.solve, grid=choice.grid, importance=importance)
    parts = pool.map(solve, np.array_split(values, min(len(values), 4 * _threads())))
    return BlockTensor(choice.grid, np.concatenate([part.blocks for part in parts]))


def _by_rows(
    weights: Weights, choices: Iterable[Choice], pool: ThreadPoolExecutor, importance: Importance
) -> Iterator[_Block]:
    """Blocks of rows in order, solved a few ahead in threads."""
    waiting: deque[Future[_Block]] = deque()
    for choice in choices:
        if choice.method == GIVEN:
            waiting.append(pool.submit(_carried, weights, choice))
            continue
        rows, *rest = choice.weight.shape
        step = max(1, _BLOCK // math.prod(rest))
        if isinstance(choice.grid, PaletteGrid):  # whole groups
            step += -step % choice.grid.group
        weighed = importance.get(choice.weight.name)
        for start in range(0, rows, step):
            waiting.append(pool.submit(_solve_rows, weights, choice, weighed, start, start + step))
            if len(waiting) > _threads():
                yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _carried(weights: Weights, choice: Choice) -> _Block:
    """A whole weight with the codes that it came with."""
    assert isinstance(weights, Given), "only they are planned so"
    (block,) = _restored([(choice.weight.name, weights.load(choice.weight.name))], None)
    return block


def _solve_rows(
    weights: Weights, choice: Choice, importance: Float32 | None, start: int, stop: int
) -> _Block:
    name = choice.weight.name
    values = weights.rows(name, start, stop)
    if choice.grid is None:
        if choice.weight.is_matrix:  # rounded once, so that every container holds the same numbers
            values = half(name, values).astype(np.float32)
        values = np.ascontiguousarray(values, "<f4")
        return _Block(name, values.size, values, values)
    return _quantized_block(name, values, rounded(values, choice, importance))


def rounded(values: Float32, choice: Choice, importance: Float32 | None) -> Quantized:
    """A weight by a method that knows nothing of other rows; `importance` is (columns,)."""
    assert choice.grid is not None
    if isinstance(choice.grid, PaletteGrid):
        return kmeans.solve(values, choice.grid, importance if choice.method == "imatrix" else None)
    if isinstance(choice.grid, Grid):
        if choice.grid.levels is not None:
            return codebook.solve(values, choice.grid)
        if choice.method == "hqq":
            return hqq.solve(values, choice.grid)
        return rtn.solve(values, choice.grid, search=choice.method != "rtn-absmax")
    if choice.method == "imatrix":
        return ggml_blocks.solve(values, choice.grid, importance)
    return kquants.round_blocks(values, choice.grid)


def _quantized_block(name: str, values: Float32, tensor: Quantized) -> _Block:
    lost = loss.measure(np.ascontiguousarray(values), tensor)
    if isinstance(tensor, BlockTensor):
        return _Block(name, values.size, tensor.blocks, tensor.blocks, lost=lost)
    return replace(_coded_block(name, tensor), lost=lost)


def _coded_block(name: str, tensor: QuantizedTensor | PaletteTensor) -> _Block:
    codes, bits = np.ascontiguousarray(tensor.codes), tensor.grid.bits
    if isinstance(tensor, PaletteTensor):
        return _Block(name, codes.size, codes, pack_unsigned(codes, bits), tensor.levels)
    if tensor.grid.asymmetric:
        counted, zero_points = tensor.from_zero()
        points = pack_unsigned(zero_points.view(np.int8), bits)
        packed = pack_unsigned(counted, bits)
        return _Block(name, codes.size, codes, packed, tensor.scale, points)
    return _Block(name, codes.size, codes, pack(codes, bits), tensor.scale)


def _write(
    blocks: Iterator[_Block],
    plan: Plan,
    folder: Path,
    progress: Progress,
    told: Mapping[str, Any] | None = None,
    journal: Journal | None = None,
) -> dict[str, Record]:
    """Write every shard that is not finished; {name: record} in the order of the plan."""
    total = plan.parameters
    finished = journal.finished if journal else []
    records = {name: record for part in finished for name, record in part.items()}
    done = sum(math.prod(plan[name].weight.shape) for name in records)

    def counted(choice: Choice) -> Iterator[_Block]:
        """The blocks of a weight: not one of the next is asked for before its shard is done."""
        nonlocal done
        left = math.prod(choice.weight.shape)
        while left:
            block = next(blocks, None)
            if block is None or block.name != choice.weight.name or block.weights > left:
                found = block.name if block else "nothing"
                raise ValueError(f"{found} comes where the plan has {choice.weight.name}")
            yield block
            left -= block.weights
            done += block.weights
            progress("quantize", done, total)

    shards = store.shards(plan)
    for index, shard in [*enumerate(shards)][len(finished) :]:
        part = {}
        with store.open_shard(folder, index, len(shards), shard) as append:
            for choice in shard:
                part[choice.weight.name] = _write_weight(choice, counted(choice), append)
        records |= part
        if journal is not None:
            journal.add(part, told or {})
    return records


def _write_weight(choice: Choice, blocks: Iterable[_Block], append: store.Append) -> Record:
    weight, grid = choice.weight, choice.grid
    digest = start_digest(weight.name, grid.name if grid else "float32", weight.shape)
    scales: list[Float32] = []
    zero_points: list[UInt8] = []
    lost = NOTHING
    for block in blocks:
        append(block.stored.data)
        digest.update(block.values.data)
        lost += block.lost
        if block.scale is not None:
            scales.append(block.scale)
        if block.zero_points is not None:
            zero_points.append(block.zero_points)
    if grid is None:
        return Record(digest.hexdigest())
    if not isinstance(grid, BlockGrid):
        scale = np.concatenate(scales)
        dtype = LEVEL_DTYPE if isinstance(grid, PaletteGrid) else grid.scale_dtype
        append(scale.astype(dtype).data)
        digest.update(scale.astype("<f4").data)
    for points in zero_points:
        append(points.data)
    record = Record(digest.hexdigest(), lost.relative, lost.relative - lost.without_limits)
    return _checked(choice, record)


def _checked(choice: Choice, record: Record) -> Record:
    name = choice.weight.name
    if not math.isfinite(record.error):
        raise Unsupported(
            f"{name}: rounding made weights of it that are no numbers",
            "its values or their importance are beyond what float16 scales or float32 sums hold",
            f'leave it as it is: "{name}" = "{FLOAT}"',
        )
    if record.added <= _ADDED_LIMIT:
        return record
    what, ends = "scales", f"2^-17 to {SCALE_CEILING:.0f}"
    if isinstance(choice.grid, PaletteGrid):
        what, ends = "levels", f"2^-14 to {LARGEST_LEVEL:.0f}, where float16 has all its bits"
    raise Unsupported(
        f"{name}: float16 holds no such {what} as it needs",
        f"they lie outside of {ends}; the nearest ones add {record.added:.1%} relative error",
        f'rescale the weight in training, or leave it as it is: "{name}" = "{FLOAT}"',
    )
