"""Programs as coremltools reads them: what operations make is what its own definitions infer.

The import takes many seconds, and is only done here.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from slimport.export import coreml as container
from slimport.export.container import Deployment
from slimport.export.coreml.proto import messages
from slimport.tokenizer.tokenizer import Tokenizer

PHI3_LONG = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    },
}
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, str]]] = {
    "llama": ("llama", {}, "int4", {}),
    "gemma2": ("gemma2", {"num_hidden_layers": 3}, "int4", {}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7}, "int8", {}),
    "phi3-long": ("phi3", PHI3_LONG, "int4", {}),
    "qwen2": ("qwen2", {}, "int4-signed", {"*.o_proj.*": "float16"}),
    "nf4": ("llama", {"tie_word_embeddings": False}, "nf4", {"*embed_tokens*": "nf4-g64"}),
    "int2": ("llama", {}, "int2", {"*embed_tokens*": "int2-g64"}),
}
Shape = tuple[int | None, ...]


@pytest.fixture(scope="module")
def apples() -> Any:
    """coremltools, whose import warns of the releases of numpy and torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
    return coremltools


def declared(spec: Any) -> dict[str, tuple[str, Shape]]:
    """{output of an operation: what the program says of it}"""
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    found = {}
    for operation in block.operations:
        for output in operation.outputs:
            tensor = output.type.tensorType
            shape = tuple(
                each.constant.size if each.WhichOneof("dimension") == "constant" else None
                for each in tensor.dimensions
            )
            found[output.name] = messages("MIL").DataType.Name(tensor.dataType), shape
    return found


def inferred(value: Any, apples: Any) -> tuple[str, Shape]:
    types = apples.converters.mil.mil.types
    shape = tuple(None if types.symbolic.is_symbolic(n) else int(n) for n in value.shape or ())
    proto = apples.converters.mil.backend.mil.helper.types_to_proto_primitive(value.dtype)
    return messages("MIL").DataType.Name(proto), shape


@pytest.mark.filterwarnings("ignore")  # coremltools of the releases of numpy that are here
@pytest.mark.parametrize("case", MODELS)
def test_types_are_those_that_coremltools_infers(
    case: str, apples: Any, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.libmodelpackage import ModelPackage

    family, config, preset, patterns = MODELS[case]
    source = make_model(family, **config)
    model = in_memory(source, preset, patterns)
    container.write(model, Tokenizer.open(source), tmp_path, Deployment(64))
    package = tmp_path / "Model.mlpackage"
    root = ModelPackage(str(package)).getRootModel()
    assert Path(root.path()).samefile(tmp_path / container.FILE)
    spec = apples.utils.load_spec(str(package))
    program = load(
        spec,
        specification_version=spec.specificationVersion,
        file_weights_dir=str((tmp_path / container.package.paths().weights).parent),
    )
    said, compared = declared(spec), 0
    for operation in program.functions["main"].operations:
        for output in operation.outputs:
            if output.name in said:
                assert inferred(output, apples) == said[output.name], output.name
                compared += 1
    assert compared == len(said) > 100
