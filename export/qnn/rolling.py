"""Texts through graphs of a fixed number of tokens, run by run, as an app does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .decoder import COS, HIDDEN, LOGITS, MASK, NEW_K, NEW_V, PAST_K, PAST_V, SIN

Array = npt.NDArray[Any]
Run = Callable[[dict[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a decoder's inputs; `slots` is the context that the cache holds."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the graphs are fed with, as floats or as codes.

    Attributes:
        hidden: ids to (tokens, hidden_size).
        turns: cosines and sines (slots, head_dim) of each rope, the first half of the sines
            negated.
        seen, masked: what the mask says of a position that counts, and of one that does not.
        mask_dtype, cache_dtype: of the mask, and of keys and values; an empty cache is zeros.
    """

    hidden: Callable[[npt.NDArray[np.int32]], Array]
    turns: tuple[tuple[Array, Array], ...]
    seen: float
    masked: float
    mask_dtype: str
    cache_dtype: str


class Rolling:
    """One text in a cache of its own.

    Args:
        runs: {tokens of a run: the graph}.
    """

    def __init__(self, geometry: Geometry, inputs: Inputs, runs: Mapping[int, Run]) -> None:
        self.geometry, self.inputs, self.runs = geometry, inputs, runs
        kv_heads, dim, slots = geometry.kv_heads, geometry.head_dim, geometry.slots
        self.cache: dict[str, Array] = {}
        for layer in range(geometry.layers):
            key = np.zeros((1, kv_heads, dim, slots), inputs.cache_dtype)
            value = np.zeros((1, kv_heads, slots, dim), inputs.cache_dtype)
            self.cache |= {PAST_K.format(layer): key, PAST_V.format(layer): value}
        self.length = 0

    def feed(self, ids: npt.NDArray[np.int32], tokens: int) -> Iterator[Array]:
        """Logits (n, vocab_size) of ids, at most `tokens` of them a run; the last run is filled up.

        What fills a run up is never seen: its logits are cut and its keys are not kept.
        """
        for start in range(0, ids.size, tokens):
            given = ids[start : start + tokens]
            found = self.runs[tokens](self._feeds(np.resize(given, tokens)))
            at, end = self.length, self.length + given.size
            for layer in range(self.geometry.layers):
                new_key, new_value = found[NEW_K.format(layer)], found[NEW_V.format(layer)]
                self.cache[PAST_K.format(layer)][..., at:end] = new_key[..., : given.size]
                self.cache[PAST_V.format(layer)][..., at:end, :] = new_value[..., : given.size, :]
            self.length = end
            yield found[LOGITS][0, : given.size]

    def _feeds(self, ids: npt.NDArray[np.int32]) -> dict[str, Array]:
        inputs, slots, tokens = self.inputs, self.geometry.slots, ids.size
        mask = np.full((tokens, slots + tokens), inputs.masked, inputs.mask_dtype)
        mask[:, : self.length] = inputs.seen
        mask[:, slots:][np.tril_indices(tokens)] = inputs.seen
        group = self.geometry.heads // self.geometry.kv_heads
        feeds = {HIDDEN: inputs.hidden(ids)[None], MASK: np.tile(mask, (group, 1))[None, None]}
        places = np.minimum(np.arange(self.length, self.length + tokens), slots - 1)
        for index, (cos, sin) in enumerate(inputs.turns):
            feeds |= {
                COS.format(index): cos[places][None, None],
                SIN.format(index): sin[places][None, None],
            }
        return feeds | self.cache
