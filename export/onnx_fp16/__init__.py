"""The ONNX container in float16, for a GPU: the same codes, tensors and graph as export/onnx.

All that differs is the type of activations, cache and logits. A container is a module, so this one
names what is shared as it is, and the functions that depend on the type with that one value given.
"""

from __future__ import annotations

from functools import partial

from .. import onnx
from ..onnx import (
    CALIBRATED,
    ESTIMATED,
    FILE,
    LIBRARIES,
    PROOF,
    check,
    context_length,
    minimum_runtime,
    read_back,
    refuse_adapter,
    refuse_deployment,
    tensor_bytes,
)
from ..onnx.layout import FLOAT16

__all__ = [
    "CALIBRATED",
    "ESTIMATED",
    "FILE",
    "LIBRARIES",
    "NAME",
    "PROOF",
    "check",
    "check_adapter",
    "context_length",
    "kv_cache",
    "minimum_runtime",
    "notes",
    "predict",
    "predict_adapter",
    "read_back",
    "readme",
    "refuse",
    "refuse_adapter",
    "refuse_deployment",
    "refuse_foreign_adapter",
    "tensor_bytes",
    "write",
    "write_adapter",
]

NAME = "onnx-fp16"

check_adapter = partial(onnx.check_adapter, activations=FLOAT16)
kv_cache = partial(onnx.kv_cache, activations=FLOAT16)
notes = partial(onnx.notes, activations=FLOAT16)
predict = partial(onnx.predict, activations=FLOAT16)
predict_adapter = partial(onnx.predict_adapter, activations=FLOAT16)
readme = partial(onnx.readme, activations=FLOAT16)
refuse = partial(onnx.refuse, activations=FLOAT16)
refuse_foreign_adapter = partial(onnx.refuse_foreign_adapter, activations=FLOAT16)
write = partial(onnx.write, activations=FLOAT16)
write_adapter = partial(onnx.write_adapter, activations=FLOAT16)
