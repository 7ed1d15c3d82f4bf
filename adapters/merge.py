"""Base and adapter as one set of float32 weights, computed row block by row block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..checkpoint import Float32, Weights
from ..errors import BadInput, Unsupported, UsageError
from .adapter import EMBEDDING, HEAD, Adapter, Delta
from .file import BLOCK


class Merged:
    """The base with an adapter merged into it; fills `Weights`.

    Equal to peft's unmerged forward pass, in float32. Nothing is kept between calls but DoRA's
    column norms of an embedding.

    Args:
        base: the full-precision base.
        adapter: read against this base.
        scale: multiplies the update, as `--adapter NAME=PATH:scale` says.

    Raises:
        UsageError: the scale is not finite.
        Unsupported: a scale other than 1 for an adapter that is not a sum.
    """

    def __init__(self, base: Weights, adapter: Adapter, scale: float = 1.0) -> None:
        _check_scale(adapter, scale)
        self.base = base
        self.adapter = adapter
        self.scale = np.float32(scale)
        self._column_norms: dict[str, Float32] = {}

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one table after the merge."""
        return self.adapter.tied and not self.adapter.unties

    def names(self) -> Sequence[str]:
        names = tuple(self.base.names())
        own = [*self.adapter.replaced, *([HEAD] if self.adapter.unties else [])]
        return (*names, *(name for name in dict.fromkeys(own) if name not in names))

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.adapter.replaced:  # the base may not have it, such as a score head
            return self.adapter.replaced[name].shape
        return self.base.shape(self._base_name(name))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """float32 rows [start:stop) of the first axis.

        Raises:
            BadInput: base and update together are not finite.
        """
        count = self.shape(name)[0]
        stop = count if stop is None else min(stop, count)
        with np.errstate(all="ignore"):  # what is not finite is named below
            rows = self._rows(name, start, stop)
        if not np.isfinite(rows).all():
            raise BadInput(
                f"{name} with the adapter {self.adapter.name} holds NaN or Inf",
                f"rows {start} to {stop - 1} of base and update together are not finite",
                "use another checkpoint of the adapter, or the base it was trained on",
            )
        return rows

    def _rows(self, name: str, start: int, stop: int) -> Float32:
        adapter = self.adapter
        if name in adapter.replaced:
            return adapter.replaced[name].rows(start, stop)
        rows = self.base.rows(self._base_name(name), start, stop)
        if name in adapter.deltas:
            rows = self._updated(name, adapter.deltas[name], rows, start, stop)
        if name in adapter.biases:
            rows = rows + adapter.biases[name][start:stop] * self.scale
        if name in adapter.tokens:
            tokens = adapter.tokens[name]
            here = (tokens.indices >= start) & (tokens.indices < stop)
            rows = rows.copy()
            rows[tokens.indices[here] - start] = tokens.rows[here]
        return rows

    def _base_name(self, name: str) -> str:
        return EMBEDDING if self.adapter.unties and name == HEAD else name

    def _updated(self, name: str, delta: Delta, rows: Float32, start: int, stop: int) -> Float32:
        """W + s * b @ a; for DoRA its rows (an embedding's columns) stretched to the magnitude."""
        update: Float32 = delta.b[start:stop] @ delta.a
        rows = rows + update * (np.float32(delta.scale) * self.scale)
        if delta.magnitude is None:
            return rows
        if delta.embedding:
            return rows * (delta.magnitude / self._norms_of_columns(name, delta))
        norms: Float32 = np.linalg.norm(rows, axis=1)
        return rows * (delta.magnitude[start:stop] / norms)[:, None]

    def _norms_of_columns(self, name: str, delta: Delta) -> Float32:
        if name not in self._column_norms:
            plain = Delta(delta.a, delta.b, delta.scale)
            count, columns = self.shape(name)
            squares = np.zeros(columns)
            for start in range(0, count, BLOCK):
                stop = min(start + BLOCK, count)
                rows = self.base.rows(self._base_name(name), start, stop)
                rows = self._updated(name, plain, rows, start, stop)
                squares += np.square(rows, dtype=np.float64).sum(axis=0)
            self._column_norms[name] = np.sqrt(squares).astype(np.float32)
        return self._column_norms[name]


def merged_config(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """config.json of the merged model: the base's, untied where the adapter unties the tables."""
    return {**config, "tie_word_embeddings": False} if adapter.unties else dict(config)


def _check_scale(adapter: Adapter, scale: float) -> None:
    if not math.isfinite(scale):
        raise UsageError(
            f"--adapter {adapter.name}: the scale {scale} is not finite",
            "it multiplies the update of the adapter",
            "give a number such as 0.5, or none for 1",
        )
    fixed = {
        "DoRA": adapter.dora,
        "whole weights": bool(adapter.replaced),
        "trained tokens": bool(adapter.tokens),
    }
    if scale != 1.0 and any(fixed.values()):
        kind = " and ".join(kind for kind, present in fixed.items() if present)
        raise Unsupported(
            f"--adapter {adapter.name}: the scale {scale} cannot be applied to {kind}",
            "that part of the adapter is no addition to the base, so a multiple has no meaning",
            "leave the scale out",
        )
