"""llama.cpp's named mixes, such as Q4_K_M: which ggml type each weight gets.

The rules are those of `llama_tensor_get_type` and `tensor_type_fallback` in llama.cpp's
src/llama-quant.cpp for dense models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..architectures import DecoderConfig, Kind, Weight
from .ggml import BLOCKS, Type

MIXES = {  # the type of most weights
    "Q2_K": Type.Q2_K,
    "Q2_K_S": Type.Q2_K,
    "Q3_K_S": Type.Q3_K,
    "Q3_K_M": Type.Q3_K,
    "Q3_K_L": Type.Q3_K,
    "Q4_0": Type.Q4_0,
    "Q4_1": Type.Q4_1,
    "Q4_K_S": Type.Q4_K,
    "Q4_K_M": Type.Q4_K,
    "Q5_0": Type.Q5_0,
    "Q5_1": Type.Q5_1,
    "Q5_K_S": Type.Q5_K,
    "Q5_K_M": Type.Q5_K,
    "Q6_K": Type.Q6_K,
    "Q8_0": Type.Q8_0,
    "IQ1_S": Type.IQ1_S,
    "IQ1_M": Type.IQ1_M,
    "IQ2_XXS": Type.IQ2_XXS,
    "IQ2_XS": Type.IQ2_XS,
    "IQ2_S": Type.IQ2_XS,
    "IQ2_M": Type.IQ2_S,
    "IQ3_XXS": Type.IQ3_XXS,
    "IQ3_XS": Type.IQ3_S,
    "IQ3_S": Type.IQ3_S,
    "IQ3_M": Type.IQ3_S,
    "IQ4_XS": Type.IQ4_XS,
    "IQ4_NL": Type.IQ4_NL,
    "TQ1_0": Type.TQ1_0,
    "TQ2_0": Type.TQ2_0,
    "Q2_0": Type.Q2_0,
    "F16": Type.F16,
}

_VALUES, _OUTPUT, _DOWN = (Kind.V, Kind.QKV), (Kind.ATTENTION_OUTPUT,), (Kind.DOWN,)
_QUERIES_KEYS, _GATE_UP = (Kind.Q, Kind.K), (Kind.GATE, Kind.UP, Kind.GATE_UP)


class _Place(NamedTuple):
    """What rules ask for: layer and layers in all, query heads per kv head, importance known."""

    layer: int
    layers: int
    sharing: int
    weighted: bool


_Condition = Callable[[_Place], bool]


def _always(place: _Place) -> bool:
    return True


def _more_bits(place: _Place) -> bool:
    """The first and the last eighth, and every third layer between."""
    first, last = place.layers // 8, 7 * place.layers // 8
    return not first <= place.layer < last or (place.layer - first) % 3 == 2


def _middle(place: _Place) -> bool:
    return place.layers // 8 <= place.layer < 7 * place.layers // 8


def _shared(place: _Place) -> bool:
    return place.sharing >= 4


def _layers_below(count: int) -> _Condition:
    return lambda place: place.layer < count


def _first(part: int) -> _Condition:
    return lambda place: place.layer < place.layers // part


def _weighted(place: _Place) -> bool:
    return place.weighted


def _both(*conditions: _Condition) -> _Condition:
    return lambda place: all(condition(place) for condition in conditions)


def _not(condition: _Condition) -> _Condition:
    return lambda place: not condition(place)


_Rules = tuple[tuple[tuple[Kind, ...], _Condition, Type], ...]


def _low(promoted: Type, output: Type | None) -> _Rules:
    """Of the mixes at 1 and 2 bits."""
    rules: _Rules = (
        (_VALUES, _shared, Type.Q4_K),
        (_VALUES, _always, promoted),
        (_DOWN, _first(8), promoted),
    )
    return rules if output is None else (*rules, (_OUTPUT, _always, output))


_HALF_MORE: _Rules = ((_VALUES + _DOWN, _more_bits, Type.Q6_K),)
_IQ4: _Rules = (
    (_VALUES, _shared, Type.Q5_K),
    (_DOWN, _both(_first(8), _not(_weighted)), Type.Q5_K),
)
# The first rule that holds decides; without one a weight gets the type of MIXES.
_RULES: dict[str, _Rules] = {
    "Q2_K": (
        (_VALUES, _shared, Type.Q4_K),
        (_VALUES + _DOWN + _OUTPUT, _always, Type.Q3_K),
    ),
    "Q2_K_S": ((_VALUES, _shared, Type.Q4_K), (_DOWN, _first(8), Type.Q4_K)),
    "Q3_K_M": (
        (_VALUES, _layers_below(2), Type.Q5_K),
        (_DOWN, _first(16), Type.Q5_K),
        (_VALUES + _DOWN + _OUTPUT, _always, Type.Q4_K),
    ),
    "Q3_K_L": ((_VALUES + _DOWN + _OUTPUT, _always, Type.Q5_K),),
    "Q4_0": ((_DOWN, _both(_weighted, _first(8)), Type.Q4_1),),
    "Q4_K_S": ((_VALUES, _layers_below(4), Type.Q5_K), (_DOWN, _first(8), Type.Q5_K)),
    "Q4_K_M": _HALF_MORE,
    "Q5_0": ((_DOWN, _both(_weighted, _first(8)), Type.Q5_1),),
    "Q5_K_M": _HALF_MORE,
    "IQ1_S": _low(Type.Q2_K, Type.IQ2_XXS),
    "IQ1_M": _low(Type.Q2_K, Type.IQ2_XXS),
    "IQ2_XXS": _low(Type.Q2_K, None),
    "IQ2_XS": _low(Type.Q2_K, None),
    "IQ2_S": _low(Type.IQ3_S, Type.IQ3_S),
    "IQ2_M": _low(Type.IQ3_S, Type.IQ3_S),
    "IQ3_XXS": (
        (_VALUES, _shared, Type.Q4_K),
        (_VALUES, _not(_weighted), Type.IQ3_S),
        (_QUERIES_KEYS, _always, Type.IQ2_S),
        (_DOWN, _both(_first(8), _not(_weighted)), Type.Q4_K),
        (_DOWN, _not(_weighted), Type.Q3_K),
        (_OUTPUT, _always, Type.IQ3_S),
    ),
    "IQ3_XS": (
        (_VALUES, _shared, Type.Q4_K),
        (_QUERIES_KEYS, _always, Type.IQ3_XXS),
        (_GATE_UP, _middle, Type.IQ3_XXS),
    ),
    "IQ3_S": ((_VALUES, _shared, Type.Q4_K),),
    "IQ3_M": ((_VALUES + _OUTPUT, _always, Type.Q4_K), (_DOWN, _first(8), Type.Q4_K)),
    "IQ4_XS": _IQ4,
    "IQ4_NL": _IQ4,
}
_LOWEST = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
_HEADS = dict.fromkeys(
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"), Type.Q5_K
)
_EMBEDDINGS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), Type.Q2_K),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), Type.IQ3_S),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), Type.Q4_K),
}
# Where rows do not divide into blocks.
_FALLBACKS = {
    **dict.fromkeys((Type.Q2_K, Type.Q3_K, Type.TQ1_0, Type.TQ2_0, Type.Q2_0), Type.Q4_0),
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}


def wanted_type(mix: str, weight: Weight, config: DecoderConfig, weighted: bool) -> Type:
    """The type that a mix gives a matrix, whether its rows divide into blocks or not.

    Args:
        mix: a key of MIXES.
        weighted: whether an importance matrix is known.
    """
    usual = MIXES[mix]
    if usual is Type.F16:
        return usual
    if _makes_logits(weight, config):
        return Type.Q8_0 if usual is Type.Q8_0 else _HEADS.get(mix, Type.Q6_K)
    if weight.layer is None:
        return _EMBEDDINGS.get(mix, usual)
    place = _Place(weight.layer, config.layers, config.heads // config.kv_heads, weighted)
    rules = (rule for rule in _RULES.get(mix, ()) if weight.kind in rule[0])
    found = next((type for _, holds, type in rules if holds(place)), usual)
    if found in (Type.Q3_K, Type.Q4_K) and weight.kind in _VALUES and _is_70b(mix, config):
        return Type.Q5_K
    return found


def _is_70b(mix: str, config: DecoderConfig) -> bool:
    """llama.cpp spends more on the few values of the models with 80 layers that it calls 70B."""
    known = {"llama": config.heads != config.kv_heads, "qwen2": True}
    return known.get(config.family.gguf, False) and config.layers == 80 and mix not in _LOWEST


def _makes_logits(weight: Weight, config: DecoderConfig) -> bool:
    return weight.kind is Kind.HEAD or (weight.is_table and config.tied)


def held_type(mix: str, wanted: Type, weight: Weight, config: DecoderConfig) -> Type:
    """`wanted`, or what llama.cpp takes for rows that do not divide into its blocks.

    Q8_0 for the table that makes logits, if rows do not divide into blocks of the mix's own type;
    F16 at last, where rows do not divide into blocks of 32 either.
    """
    columns = weight.shape[1]
    if _makes_logits(weight, config) and columns % BLOCKS[MIXES[mix]][0]:
        wanted = Type.Q8_0
    if columns % BLOCKS[wanted][0] == 0:
        return wanted
    smaller = _FALLBACKS.get(wanted, Type.IQ4_NL)
    return smaller if columns % BLOCKS[smaller][0] == 0 else Type.F16
