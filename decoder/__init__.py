"""One plain decoder in float32 torch; every family of architectures/.

Layer by layer, so that calibration can stream a model through it, and whole with a static cache,
so that exporters can trace it. Held to transformers by a test; never the oracle of a validation.
"""

from .layer import (
    RESIDUALS,
    SHARED_INPUTS,
    Capture,
    LayerWeights,
    Parameters,
    decoder_layer,
    load_layer,
    read_tensor,
)
from .model import CachedDecoder, TracedDecoder, embed, head, logits
from .positions import Cache, Tables, attention_tables

__all__ = [
    "RESIDUALS",
    "SHARED_INPUTS",
    "Cache",
    "CachedDecoder",
    "Capture",
    "LayerWeights",
    "Parameters",
    "Tables",
    "TracedDecoder",
    "attention_tables",
    "decoder_layer",
    "embed",
    "head",
    "load_layer",
    "logits",
    "read_tensor",
]
