"""The decoder as a whole: from ids to logits, at once or run by run with a static cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architectures import DecoderConfig, Kind, LayerAttention, weights
from ..checkpoint import Weights
from .layer import (
    LayerWeights,
    Parameters,
    capped,
    decoder_layer,
    load_layer,
    read_tensor,
    rms_norm,
)
from .positions import Cache, Tables, attention_tables, rotations, seen_from


def embed(tokens: Tensor, table: Tensor, config: DecoderConfig) -> Tensor:
    """Hidden states (..., hidden_size) before the first layer, of ids or of places in `table`."""
    return functional.embedding(tokens, table) * config.embedding_multiplier


def head(hidden: Tensor, norm: Tensor, table: Tensor, config: DecoderConfig) -> Tensor:
    """Logits (..., vocab_size) from the last layer's output, the final norm and the head's table.

    With tied embeddings `table` is the embedding.
    """
    found = functional.linear(rms_norm(hidden, norm, config), table) / config.logits_divisor
    return capped(found, config.logits_softcap)


def logits(tokens: Tensor, source: Weights, config: DecoderConfig) -> Tensor:
    """The whole decoder, one layer in memory at a time: ids (windows, length) to logits."""
    names = {weight.kind: weight.name for weight in weights(config) if weight.layer is None}
    table = read_tensor(source, names[Kind.EMBEDDING])
    hidden = embed(tokens, table, config)
    for layer, tables in enumerate(attention_tables(config, tokens.shape[-1])):
        hidden = decoder_layer(hidden, load_layer(source, config, layer), config, tables)
    norm = read_tensor(source, names[Kind.FINAL_NORM])
    if not config.tied:
        table = read_tensor(source, names[Kind.HEAD])
    return head(hidden, norm, table, config)


class TracedDecoder(nn.Module):
    """The whole decoder run by run with a static KV cache, over weights that lie elsewhere.

    The cache of layer n are the buffers `keys_n` and `values_n`, float32 (1, kv_heads, context,
    head_dim).

    Args:
        weight: gives a weight by its name in the checkpoint.
        turned: gives cosines and sines (2, context, rotated) of the nth of
            `config.attentions`, or None.
        places: gives the positions of the cache, int64 (context,).
    """

    def __init__(
        self,
        config: DecoderConfig,
        context: int,
        weight: Callable[[str], Tensor],
        turned: Callable[[int], Tensor | None],
        places: Callable[[], Tensor],
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self._weight, self._turned, self._places = weight, turned, places
        self._names: dict[int | None, dict[Kind, dict[str, str]]] = {}
        for each in weights(config):
            kinds = self._names.setdefault(each.layer, {})
            kinds.setdefault(each.kind, {})[each.name.rpartition(".")[2]] = each.name
        for layer in range(config.layers):
            for name in (f"keys_{layer}", f"values_{layer}"):
                empty = torch.zeros(1, config.kv_heads, context, config.head_dim)
                self.register_buffer(name, empty, persistent=False)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits (1, n, vocab_size) of `tokens` (1, n), the first of them at `position` (1,).

        Both are int64; position + n is at most the context, which torch checks where it runs
        eagerly. Earlier positions are read from the cache, later ones are not seen.
        """
        positions = position + torch.arange(tokens.shape[-1])
        tables: dict[LayerAttention, Tables] = {}
        for index, attention in enumerate(self.config.attentions):
            turned = self._turned(index)
            cos, sin = (None, None) if turned is None else turned[:, positions]
            seen = seen_from(positions, self._places(), attention.window)
            tables[attention] = Tables(cos, sin, seen)
        top = self._weights(None)
        hidden = embed(tokens, top[Kind.EMBEDDING].weight, self.config)
        for layer in range(self.config.layers):
            keys, values = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
            hidden = decoder_layer(
                hidden,
                self._weights(layer),
                self.config,
                tables[self.config.attention(layer)],
                cache=Cache(keys, values, positions),
            )
        table = top[Kind.EMBEDDING if self.config.tied else Kind.HEAD].weight
        return head(hidden, top[Kind.FINAL_NORM].weight, table, self.config)

    def _weights(self, layer: int | None) -> LayerWeights:
        return {
            kind: Parameters(**{field: self._weight(name) for field, name in names.items()})
            for kind, names in self._names[layer].items()
        }


class CachedDecoder(TracedDecoder):
    """The whole decoder in memory, with a static KV cache.

    Weights are parameters under their names in the checkpoint.
    """

    def __init__(self, source: Weights, config: DecoderConfig, context: int) -> None:
        places = partial(torch.arange, context)
        super().__init__(config, context, self.get_parameter, self._rotations, places)
        for weight in weights(config):
            *path, field = weight.name.split(".")
            _nested(self, path).register_parameter(
                field, nn.Parameter(read_tensor(source, weight.name), requires_grad=False)
            )
        for index, attention in enumerate(config.attentions):
            cos, sin = rotations(attention, config.head_dim, context)
            turned = None if cos is None or sin is None else torch.stack((cos, sin))
            self.register_buffer(f"turned_{index}", turned, persistent=False)

    def _rotations(self, index: int) -> Tensor | None:
        turned: Tensor | None = getattr(self, f"turned_{index}")
        return turned


def _nested(module: nn.Module, path: list[str]) -> nn.Module:
    """The module at `path`, made where it is missing."""
    for name in path:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module
