"""What an app feeds the graphs with: `tables.data`, and `qnn.json` that says where all of it lies.

The embedding stays out of the graphs: the NPU has no lookup that holds our codes and scales. Its
row of a token is codes * scale * multiplier, encoded as `hidden` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from ...architectures import DecoderConfig, Kind
from ...bundle import canonical_json
from ...quantize import packing
from ...quantize.grid import Grid
from ...quantize.plan import Choice, Plan
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ...tokenizer.tokenizer import Tokenizer
from ..container import Deployment
from ..file import Parts
from ..layout import padded
from .calibration import turns
from .chips import chip_of
from .decoder import COS, MASK, MASKED, SIN
from .encoding import Encodings
from .layout import chunk_of
from .static import Static

SCHEMA = "slimport.qnn/1"
TABLES, DESCRIPTION = "tables.data", "qnn.json"
CODES, SCALE = "embedding.codes", "embedding.scale"


@dataclass(frozen=True, slots=True)
class Table:
    """An array in tables.data, rows one after the other, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def tables(config: DecoderConfig, plan: Plan, context: int) -> dict[str, Table]:
    """Where everything lies: the embedding's codes and scales, cosines and sines of each rope."""
    choice = _embedding(plan)
    grid, (rows, columns) = choice.grid, choice.weight.shape
    assert isinstance(grid, Grid), "layout refuses everything else"
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        CODES: ("|u1" if grid.bits == 4 else "|i1", (rows, columns * grid.bits // 8)),
        SCALE: ("<f4", (rows, grid.groups(columns))),
    }
    for index, _ in enumerate(config.ropes):
        shapes[COS.format(index)] = shapes[SIN.format(index)] = ("<u2", (context, config.head_dim))
    found: dict[str, Table] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        found[name] = Table(dtype, shape, end)
        end = padded(end + found[name].nbytes)
    return found


def tables_bytes(placed: dict[str, Table]) -> int:
    return max(padded(table.offset + table.nbytes) for table in placed.values())


def data(
    model: QuantizedCheckpoint, placed: dict[str, Table], encodings: Encodings, context: int
) -> Iterator[tuple[str, int, Parts]]:
    """Name, bytes and content of every table."""
    weight = model.load(_embedding(model.plan).weight.name)
    assert isinstance(weight, QuantizedTensor), "layout refuses everything else"
    contents = {
        CODES: packing.pack(weight.codes, weight.grid.bits),
        SCALE: np.ascontiguousarray(weight.scale, "<f4"),
    }
    for index, pair in enumerate(turns(model.decoder, context)):
        for name, values in zip((COS.format(index), SIN.format(index)), pair, strict=True):
            contents[name] = encodings[name].encode(values)
    for name, table in placed.items():
        yield name, table.nbytes, [contents[name]]


def description(
    config: DecoderConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    deployment: Deployment,
    graph: Static,
    encodings: Encodings,
) -> bytes:
    """qnn.json: sizes, encodings of every input and result, tables, special tokens."""
    chip, grid = chip_of(deployment), _embedding(plan).grid
    assert isinstance(grid, Grid), "layout refuses everything else"
    boundary = {name: encodings[tensor] for name, tensor in graph.boundary.items()}
    mask = boundary[MASK].encode(np.array([0.0, MASKED], np.float32))
    return canonical_json(
        {
            "schema": SCHEMA,
            "hexagon": chip.hexagon,
            "soc": chip.soc,
            "context": deployment.context,
            "chunk": chunk_of(deployment.context),
            "layers": config.layers,
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "mask": {"seen": int(mask[0]), "masked": int(mask[1])},
            "encodings": {name: asdict(held) for name, held in boundary.items()},
            "embedding": {
                "bits": grid.bits,
                "group": grid.group or config.hidden_size,
                "multiplier": config.embedding_multiplier,
            },
            "tables": {
                name: asdict(table)
                for name, table in tables(config, plan, deployment.context).items()
            },
            "tokens": {
                "bos": tokenizer.bos_id,
                "adds_bos": tokenizer.adds_bos,
                "ends": list(tokenizer.eos_ids),
                "chat_template": tokenizer.chat_template,
            },
        }
    )


def _embedding(plan: Plan) -> Choice:
    (choice,) = (choice for choice in plan.choices if choice.weight.kind is Kind.EMBEDDING)
    return choice
