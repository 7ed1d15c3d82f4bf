"""The tensors that a checkpoint of a decoder must have, by source name and by llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint import Weights
from ..errors import BadInput
from .config import DecoderConfig
from .families import BOTH, Kind

_LINEARS = {
    Kind.Q: "self_attn.q_proj",
    Kind.K: "self_attn.k_proj",
    Kind.V: "self_attn.v_proj",
    Kind.ATTENTION_OUTPUT: "self_attn.o_proj",
    Kind.GATE: "mlp.gate_proj",
    Kind.UP: "mlp.up_proj",
    Kind.DOWN: "mlp.down_proj",
}
_FUSED = {
    Kind.QKV: "self_attn.qkv_proj",
    Kind.ATTENTION_OUTPUT: "self_attn.o_proj",
    Kind.GATE_UP: "mlp.gate_up_proj",
    Kind.DOWN: "mlp.down_proj",
}
_QK_NORMS = {Kind.Q_NORM: "self_attn.q_norm", Kind.K_NORM: "self_attn.k_norm"}
_NORMS = frozenset({Kind.FINAL_NORM, *_QK_NORMS, *(kind for kind, _ in BOTH)})
TABLES = frozenset({Kind.EMBEDDING, Kind.HEAD})
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCORE = "score.weight"
_TIED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a checkpoint.

    Attributes:
        name: the source name, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: as in the checkpoint, (outputs, inputs) for a matrix.
        kind: what it does; a bias has the kind of its layer.
        layer: index of the decoder layer, None outside them.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None

    @property
    def is_matrix(self) -> bool:
        """Something to quantize: the single row of a score head is not."""
        return len(self.shape) == 2 and self.kind is not Kind.SCORE

    @property
    def is_table(self) -> bool:
        """An embedding or a head: looked up or multiplied, one row per token."""
        return self.kind in TABLES

    @property
    def is_linear(self) -> bool:
        """A matrix inside a decoder layer."""
        return self.is_matrix and not self.is_table

    @property
    def is_norm(self) -> bool:
        """The weight of an RMSNorm."""
        return self.kind in _NORMS

    @property
    def gguf(self) -> str:
        """llama.cpp's name, such as `blk.0.attn_q.weight`."""
        prefix = "" if self.layer is None else f"blk.{self.layer}."
        kind = Kind.UP if self.kind is Kind.GATE_UP else self.kind
        return f"{prefix}{kind.value}.{self.name.rpartition('.')[2]}"


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Every tensor that a checkpoint of this decoder must have, in the order of the forward pass.

    A tied head is not listed: it is the embedding.
    """
    table = (config.vocab_size, config.hidden_size)
    found = [Weight(EMBEDDING, table, Kind.EMBEDDING, None)]
    for layer in range(config.layers):
        found += _layer_weights(config, layer)
    norm = (config.hidden_size,)
    found.append(Weight("model.norm.weight", norm, Kind.FINAL_NORM, None))
    if config.reward:
        found.append(Weight(SCORE, (1, config.hidden_size), Kind.SCORE, None))
    elif not config.tied:
        found.append(Weight(HEAD, table, Kind.HEAD, None))
    return tuple(found)


def _layer_weights(config: DecoderConfig, layer: int) -> Iterator[Weight]:
    family = config.family
    hidden, ffn = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    whole_row = family.qk_norm == "row"
    shapes: dict[Kind, tuple[int, ...]] = {
        **{kind: (hidden,) for kind, _ in family.norms},
        Kind.Q: (query, hidden),
        Kind.K: (key, hidden),
        Kind.V: (key, hidden),
        Kind.QKV: (query + 2 * key, hidden),
        Kind.Q_NORM: (query if whole_row else config.head_dim,),
        Kind.K_NORM: (key if whole_row else config.head_dim,),
        Kind.ATTENTION_OUTPUT: (hidden, query),
        Kind.GATE: (ffn, hidden),
        Kind.UP: (ffn, hidden),
        Kind.GATE_UP: (2 * ffn, hidden),
        Kind.DOWN: (hidden, ffn),
    }
    biased = {
        **dict.fromkeys((Kind.Q, Kind.K, Kind.V), config.qkv_bias),
        Kind.ATTENTION_OUTPUT: config.output_bias,
        **dict.fromkeys((Kind.GATE, Kind.UP, Kind.DOWN), config.mlp_bias),
    }
    linears = _FUSED if family.fused else _LINEARS
    modules = {**dict(family.norms), **linears, **(_QK_NORMS if family.qk_norm else {})}
    for kind in Kind:  # in the order of the forward pass
        if kind not in modules:
            continue
        stem = f"model.layers.{layer}.{modules[kind]}"
        yield Weight(f"{stem}.weight", shapes[kind], kind, layer)
        if biased.get(kind, False):
            yield Weight(f"{stem}.bias", shapes[kind][:1], kind, layer)


def check_weights(config: DecoderConfig, checkpoint: Weights) -> None:
    """Compare the names and shapes of a checkpoint with what its config demands.

    Two kinds of tensors may be left over: rotary frequencies, which follow from the config, and a
    head equal to the embedding it is tied to.

    Raises:
        BadInput: a tensor is missing, has another shape, or is left over.
    """
    names = set(checkpoint.names())
    if config.layers > len(names):  # before a wild number becomes a list of names
        raise _inconsistent(f"{len(names)} tensors are too few for {config.layers} layers")
    wanted = weights(config)
    if missing := [weight.name for weight in wanted if weight.name not in names]:
        raise _inconsistent(f"{len(missing)} tensors are missing, such as {missing[0]}")
    for weight in wanted:
        if checkpoint.shape(weight.name) != weight.shape:
            found = checkpoint.shape(weight.name)
            raise _inconsistent(f"{weight.name} has shape {found}, config.json says {weight.shape}")
    leftover = names - {weight.name for weight in wanted}
    leftover = {name for name in leftover if not name.endswith("rotary_emb.inv_freq")}
    if config.tied and HEAD in leftover:
        _compare_tied(config, checkpoint)
        leftover.discard(HEAD)
    if leftover:
        raise _inconsistent(
            f"{len(leftover)} tensors are left over, such as {min(leftover)}: their effect is lost"
        )


def _compare_tied(config: DecoderConfig, checkpoint: Weights) -> None:
    """Refuse a head that differs from its embedding; reads both, row block by row block."""
    for start in range(0, config.vocab_size, _TIED_ROWS):
        stop = start + _TIED_ROWS
        head, table = (checkpoint.rows(name, start, stop) for name in (HEAD, EMBEDDING))
        if head.shape != table.shape or (head != table).any():
            raise _inconsistent(
                f"{HEAD} differs from {EMBEDDING}, and config.json says they are tied",
                "set tie_word_embeddings to false if the head was trained on its own",
            )


def _inconsistent(
    why: str, cure: str = "give the folder of one whole model, with the config.json it was saved by"
) -> BadInput:
    return BadInput("weights and config.json do not belong together", why, cure)
