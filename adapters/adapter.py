"""An adapter resolved against its base: what it changes, by source weight name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint import Float32
from .config import TrainedOn
from .file import Stored
from .names import some

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """A low-rank update of one weight: W + scale * b @ a, then DoRA's magnitude if there is one.

    For a projection of 8 outputs and 16 inputs at rank 4: a (4, 16), b (8, 4). The update of an
    embedding (tokens, hidden) stands in the same way: a (rank, hidden), b (tokens, rank).

    Attributes:
        a: float32 (rank, columns of the weight).
        b: float32 (rows of the weight, rank), in source row order.
        scale: the true scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        embedding: whether it updates a lookup and not a product.
        magnitude: DoRA only, float32: the norm of each row, for an embedding of each column.
    """

    a: Float32
    b: Float32
    scale: float
    embedding: bool = False
    magnitude: Float32 | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def same(self, other: Delta) -> bool:
        """Whether both are the same addition to the same base weight."""
        plain = self.magnitude is None and other.magnitude is None
        factors = np.array_equal(self.a, other.a) and np.array_equal(self.b, other.b)
        return plain and factors and self.scale == other.scale


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of a table that replace those of the base (peft's trainable_token_indices).

    Attributes:
        indices: int64 (n,), token ids, each once.
        rows: float32 (n, hidden).
    """

    indices: npt.NDArray[np.int64]
    rows: Float32

    def same(self, other: TokenRows) -> bool:
        return np.array_equal(self.indices, other.indices) and np.array_equal(self.rows, other.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Everything an adapter changes, by source weight name.

    Where the base is tied and only one of the two tables is changed, or both differently, the
    other stays as it is: so peft's own forward pass does (its merge_and_unload does not). Then
    `unties` is true and the head has a name of its own, `lm_head.weight`, whose base rows are
    those of the embedding.

    Attributes:
        name: chosen by the user.
        config: adapter_config.json.
        trained_on: the base it was trained on, as far as that is recorded.
        deltas: low-rank updates.
        replaced: whole tensors in place of the base's (modules_to_save, trained biases).
        biases: float32 (outputs,) added to a bias of the base (lora_bias), scale included.
        tokens: single rows of a table in place of the base's.
        tied: whether the base is tied.
        unties: whether merging gives a tied base a head of its own.
    """

    name: str
    config: Mapping[str, Any]
    trained_on: TrainedOn
    deltas: Mapping[str, Delta]
    replaced: Mapping[str, Stored] = field(default_factory=dict)
    biases: Mapping[str, Float32] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    tied: bool = False
    unties: bool = False

    @property
    def base_name(self) -> str | None:
        return self.trained_on.base

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({delta.rank for delta in self.deltas.values()}))

    @property
    def dora(self) -> bool:
        return any(delta.magnitude is not None for delta in self.deltas.values())

    @property
    def kind(self) -> str:
        """Such as "rsLoRA rank 8" or "DoRA rank 4, 16 + whole weights (2)", for reports."""
        kind = "DoRA" if self.dora else "rsLoRA" if self.config.get("use_rslora") else "LoRA"
        extras = {"whole weights": self.replaced, "tables with trained tokens": self.tokens}
        more = [f" + {words} ({len(found)})" for words, found in extras.items() if found]
        return f"{kind} rank {', '.join(map(str, self.ranks))}" + "".join(more)

    @property
    def why_not_separate(self) -> str | None:
        """Why no runtime can hold it as W + scale * b @ a beside the base; None if one can."""
        if self.dora:
            return "DoRA normalizes the sum of base and update, so it is no addition to the base"
        if self.replaced:
            return f"it replaces whole weights ({some(self.replaced)})"
        if self.tokens:
            return f"it replaces single rows of {some(self.tokens)}"
        if self.biases:
            return f"it changes biases ({some(self.biases)})"
        if self.tied and self.deltas.keys() & {EMBEDDING, HEAD}:
            return "it changes a tied table, which a runtime holds once for lookup and head"
        return None

    def digest(self) -> str:
        """`sha256:...` over adapter_config.json (keys sorted) and the content of every tensor."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for label, part in self._content():
            digest.update(f"\n{label} {part.shape} {part.dtype.str}\n".encode())
            digest.update(np.ascontiguousarray(part).data)
        return f"sha256:{digest.hexdigest()}"

    def _content(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for name, delta in sorted(self.deltas.items()):
            yield f"{name} a", delta.a
            yield f"{name} b", delta.b
            yield f"{name} scale", np.array([delta.scale])
            if delta.magnitude is not None:
                yield f"{name} magnitude", delta.magnitude
        for name, stored in sorted(self.replaced.items()):
            for start, rows in stored.blocks():
                yield f"{name} rows from {start}", rows
        for name, bias in sorted(self.biases.items()):
            yield f"{name} added", bias
        for name, tokens in sorted(self.tokens.items()):
            yield f"{name} tokens", tokens.indices
            yield f"{name} token rows", tokens.rows
