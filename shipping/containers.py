"""The containers that slimport writes, each with the runtime that judges it, by name.

A container is imported when it is asked for: one whose library is missing stops no other.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import DependencyMissing, Unsupported
from ..export.container import Container
from ..validation.runtime import Runtime, Scorer
from . import sdks

NAMES = (
    "gguf",
    "onnx",
    "onnx-fp16",
    "ort",
    "executorch",
    "executorch-vulkan",
    "coreml",
    "coreml-ane",
    "coreai",
    "qnn",
)


class Pair(NamedTuple):
    """A file format, and what executes it; `scorer`: its reward models, None: it has none."""

    container: Container
    runtime: Runtime
    scorer: Scorer | None = None


def load(name: str) -> Pair:
    """The container and its runtime.

    Raises:
        Unsupported: no container has this name.
        DependencyMissing: a library that it needs cannot be imported, or its SDK is not there.
    """
    try:
        if name == "gguf":
            from ..export import gguf
            from ..validation.runtimes import llamacpp

            return Pair(gguf, llamacpp)
        if name == "onnx":
            from ..export import onnx
            from ..validation.runtimes import onnxruntime

            return Pair(onnx, onnxruntime, onnxruntime)
        if name == "onnx-fp16":
            from ..export import onnx_fp16
            from ..validation.runtimes import onnxruntime_fp16

            return Pair(onnx_fp16, onnxruntime_fp16)
        if name == "ort":
            from ..export import ort
            from ..validation.runtimes import onnxruntime

            return Pair(ort, onnxruntime)
        if name == "executorch":
            from ..export import executorch
            from ..validation.runtimes import executorch as executorch_runtime

            return Pair(executorch, executorch_runtime)
        if name == "executorch-vulkan":
            from ..export import executorch_vulkan
            from ..validation.runtimes import executorch_vulkan as eager

            return Pair(executorch_vulkan, eager)
        if name == "coreml":
            from ..export import coreml
            from ..validation.runtimes import coreml as coreml_runtime

            return Pair(coreml, coreml_runtime, coreml_runtime)
        if name == "coreml-ane":
            from ..export import coreml_ane
            from ..validation.runtimes import coreml_ane as neural_engine

            return Pair(coreml_ane, neural_engine)
        if name == "coreai":
            from ..export import coreai
            from ..validation.runtimes import coreai as coreai_runtime

            return Pair(coreai, coreai_runtime)
        if name == "qnn":
            from ..export import qnn
            from ..validation.runtimes import qnn as emulator

            return Pair(qnn, emulator)
    except ImportError as error:
        raise DependencyMissing(
            f"container {name} cannot be used",
            f"a library does not import: {error}",
            "pip install -c constraints.txt --editable . in slimport's folder; then run"
            " `slimport doctor`",
        ) from error
    sdks.refuse(name)
    raise Unsupported(
        f"there is no container {name}",
        f"this slimport writes and reads {', '.join(NAMES)}",
        f"name one of them, such as --container {NAMES[0]}",
    )
