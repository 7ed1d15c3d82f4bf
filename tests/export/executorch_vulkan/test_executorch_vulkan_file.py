"""Whole programs: exact sizes, exact codes, the same bytes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.architectures import weights
from slimport.errors import Unsupported
from slimport.export import executorch_vulkan as container
from slimport.export.container import Deployment
from slimport.quantize.tensor import QuantizedTensor, weights_digest
from slimport.tokenizer.tokenizer import Tokenizer

Variant = tuple[str, dict[str, Any]]
PLANS: dict[str, tuple[str, dict[str, str]]] = {
    "int4": ("int4", {}),
    "int8": ("int8", {}),
    "int4-all": ("int4-all", {}),
    "floats": ("int4", {"*self_attn*": "float16", "*embed_tokens*": "float16"}),
}
REFUSED = {"gemma2": "cap the scores", "phi3-long": "ropes that turn 12 numbers"}


def export(model: Any, source: Path, target: Path, context: int = 64) -> Path:
    """Write the files and hold them to their predicted sizes."""
    target.mkdir(exist_ok=True)
    tokenizer, deployment = Tokenizer.open(source), Deployment(context)
    container.refuse(model.decoder, model.plan, tokenizer)
    predicted = container.predict(model.decoder, model.plan, tokenizer, model.name, deployment)
    files = container.write(model, tokenizer, target, deployment)
    assert predicted == {file.name: file.stat().st_size for file in files}
    assert files[0].name == container.FILE
    return files[0]


@pytest.mark.parametrize(("preset", "patterns"), PLANS.values(), ids=PLANS)
def test_every_code_comes_back(
    preset: str,
    patterns: dict[str, str],
    variant: Variant,
    make_model: Any,
    in_memory: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    family, overrides = variant
    source = make_model(family, **overrides)
    model = in_memory(source, preset, patterns)
    refused = [words for name, words in REFUSED.items() if name in request.node.callspec.id]
    if refused:
        with pytest.raises(Unsupported, match=refused[0]):
            export(model, source, tmp_path)
        return
    folder = export(model, source, tmp_path / "files").parent
    found, digests = container.check(model, folder), {}
    for name, tensor in container.read_back(folder, model.decoder, model.grids):
        expected = model.tensors[name]
        if isinstance(expected, QuantizedTensor):
            assert isinstance(tensor, QuantizedTensor) and tensor.grid is expected.grid
            np.testing.assert_array_equal(tensor.codes, expected.codes)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
            digests[name] = expected.digest(name)
        else:
            table = "embed_tokens" in name
            assert (found.float_errors[name] > 0) == table  # float16 for the kernel
            half = table and not model.decoder.tied
            np.testing.assert_array_equal(tensor, expected.astype("<f2") if half else expected)
    assert found.digests == digests and found.weights_digest == weights_digest(digests)
    assert set(found.float_errors) | set(digests) == {w.name for w in weights(model.decoder)}
