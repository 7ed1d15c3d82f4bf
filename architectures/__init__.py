"""Decoder families as data: a Hugging Face config becomes a DecoderConfig and a list of weights."""

from .config import DecoderConfig, LayerAttention, decoder_config, reward_config
from .families import FAMILIES, Family, Kind
from .rope import Rope
from .weights import EMBEDDING, HEAD, SCORE, Weight, check_weights, weights

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "HEAD",
    "SCORE",
    "DecoderConfig",
    "Family",
    "Kind",
    "LayerAttention",
    "Rope",
    "Weight",
    "check_weights",
    "decoder_config",
    "reward_config",
    "weights",
]
