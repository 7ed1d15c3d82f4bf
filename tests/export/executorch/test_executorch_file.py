"""Whole programs: exact sizes, exact codes, the same bytes, and that ExecuTorch accepts them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.architectures import weights
from slimport.errors import BadInput
from slimport.export import executorch as container
from slimport.export.container import Deployment
from slimport.export.executorch.products import Product
from slimport.export.executorch.reader import MODEL, open_file
from slimport.quantize.tensor import QuantizedTensor, weights_digest
from slimport.tokenizer.tokenizer import Tokenizer

Variant = tuple[str, dict[str, Any]]
FLOATS = {"*self_attn*": "float16", "*embed_tokens*": "float16"}
PLANS: dict[str, tuple[str, dict[str, str]]] = {
    "int4": ("int4", {}),
    "int8": ("int8", {}),
    "int4-all": ("int4-all", {}),
    "floats": ("int4", FLOATS),
}


def export(model: Any, source: Path, target: Path, context: int = 64) -> Path:
    """Write the files and hold them to their predicted sizes."""
    target.mkdir(exist_ok=True)
    tokenizer, deployment = Tokenizer.open(source), Deployment(context)
    container.refuse(model.decoder, model.plan, tokenizer)
    predicted = container.predict(model.decoder, model.plan, tokenizer, model.name, deployment)
    files = container.write(model, tokenizer, target, deployment)
    assert predicted == {file.name: file.stat().st_size for file in files}
    assert files[0].name == container.FILE == MODEL
    return files[0]


@pytest.mark.parametrize(("preset", "patterns"), PLANS.values(), ids=PLANS)
def test_every_code_comes_back(
    preset: str,
    patterns: dict[str, str],
    variant: Variant,
    make_model: Any,
    in_memory: Any,
    tmp_path: Path,
) -> None:
    family, overrides = variant
    source = make_model(family, **overrides)
    model = in_memory(source, preset, patterns)
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


@pytest.mark.parametrize("grid", ["int8-g32", "int2-g64"])
def test_a_table_of_groups_is_looked_up(
    grid: str, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    source = make_model("llama", tie_word_embeddings=False)
    model = in_memory(source, "int4", {"*embed_tokens*": grid, "lm_head*": "float16"})
    file = export(model, source, tmp_path)
    found = container.check(model, file.parent)
    assert found.weights_digest == model.weights_digest
    assert found.float_errors["lm_head.weight"] == 0  # float32
    place = open_file(file.parent, model.decoder).lookup.zero
    assert (place is not None) == (grid == "int2-g64")
    if place is not None:
        content = bytearray(file.read_bytes())
        content[place.place.start + 3] ^= 0x80  # the sign of the first zero point
        file.write_bytes(content)
        with pytest.raises(BadInput, match="zero points that are not -1"):
            container.check(model, file.parent)


def test_a_cache_ends_where_its_kernel_cannot_count(tiny_llama: Path, in_memory: Any) -> None:
    config = in_memory(tiny_llama).decoder  # 2 heads of 16 numbers: 128 bytes a token
    assert container.context_length(config) == config.context_length
    long = dataclasses.replace(config, context_length=2**30)
    assert container.context_length(long) == 2**24 - 1


def test_two_exports_have_the_same_bytes(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    first, second = (
        export(in_memory(tiny_llama), tiny_llama, tmp_path / name).read_bytes() for name in "ab"
    )
    assert first == second and str(tmp_path).encode() not in first


def test_a_tied_table_of_bytes_is_stored_once(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    content = export(model, tiny_llama, tmp_path).read_bytes()
    table, file = model.tensors["model.embed_tokens.weight"], open_file(tmp_path, model.decoder)
    assert content.count(table.codes.tobytes()) == content.count(table.scale.tobytes()) == 1
    product = file.uses["model.embed_tokens.weight"]
    assert isinstance(product, Product) and product.scale is not None
    assert file.lookup.scale is not None
    assert file.lookup.table.place == file.keys[product.weight]
    assert file.lookup.scale.place == file.keys[product.scale]
    assert file.lookup.table.place.start == content.index(table.codes.tobytes())


DESERIALIZE = """
import logging, sys
logging.disable(logging.WARNING)
from executorch.exir._serialize._program import deserialize_pte_binary
found = deserialize_pte_binary(open(sys.argv[1], "rb").read())
print([plan.name for plan in found.program.execution_plan][:2], len(found.named_data.pte_data))
"""


@pytest.mark.slow
def test_executorch_accepts_the_file(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    model = in_memory(tiny_llama)
    file = export(model, tiny_llama, tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", DESERIALIZE, str(file)]
    out = subprocess.check_output(command, text=True).splitlines()[-1]
    assert out == f"['forward', 'all_logits'] {len(open_file(tmp_path, model.decoder).keys)}"


def test_nothing_of_executorch_is_imported() -> None:
    """Its Python package takes seconds, and torch with it."""
    program = (
        "import sys; from slimport.export.executorch import tools;"
        "tools.generated(tools.PROGRAM); tools.generated(tools.XNNPACK);"
        "print([n for n in sys.modules if n.partition('.')[0] in ('executorch', 'torch')])"
    )
    out = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert out.strip() == "[]"
