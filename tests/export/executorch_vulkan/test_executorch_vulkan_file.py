"""Whole programs: exact sizes, exact codes, the same bytes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.architectures import weights
from slimport.errors import BadInput, Unsupported
from slimport.export import executorch_vulkan as container
from slimport.export.container import Deployment
from slimport.export.executorch_vulkan import limits
from slimport.export.executorch_vulkan.reader import open_file
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
            assert tensor.codes.flags.c_contiguous and tensor.scale.flags.c_contiguous
            digests[name] = expected.digest(name)
        else:
            table = "embed_tokens" in name
            assert (found.float_errors[name] > 0) == table  # float16 for the kernel
            half = table and not model.decoder.tied
            np.testing.assert_array_equal(tensor, expected.astype("<f2") if half else expected)
    assert found.digests == digests and found.weights_digest == weights_digest(digests)
    assert set(found.float_errors) | set(digests) == {w.name for w in weights(model.decoder)}


def test_two_exports_have_the_same_bytes(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    first, second = (
        export(in_memory(tiny_llama), tiny_llama, tmp_path / name).read_bytes() for name in "ab"
    )
    assert first == second and str(tmp_path).encode() not in first


def test_a_tied_table_of_bytes_is_stored_once(
    tiny_llama: Path, in_memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is multiplied in parts."""
    monkeypatch.setattr(limits, "ROWS", 200)
    model = in_memory(tiny_llama)
    content = export(model, tiny_llama, tmp_path).read_bytes()
    table = model.tensors["model.embed_tokens.weight"]
    file = open_file(tmp_path, model.decoder)
    assert content.count(table.codes.tobytes()) == content.count(table.scale.tobytes()) == 1
    start = content.index(table.codes.tobytes())
    assert file.held.lookup.table.place.start == start
    parts = file.matrices["model.embed_tokens.weight"]
    places = [file.held.keys[part.weight].start for part in parts]
    assert places == [start, start + 200 * 64, start + 400 * 64]
    assert [part.shape[0] for part in parts] == [200, 200, 16]


def test_4_bit_codes_lie_as_the_shader_reads_them(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    """By hand: codes 1 and -2 become 9 and 6, the even one in the low half: 0x69."""
    model = in_memory(tiny_llama)
    tensor = model.tensors["model.layers.0.self_attn.q_proj.weight"]
    tensor.codes[0, :2] = 1, -2
    tensor.scale[:, 1] = np.arange(64) + 1
    content = export(model, tiny_llama, tmp_path).read_bytes()
    file = open_file(tmp_path, model.decoder)
    (part,) = file.matrices["model.layers.0.self_attn.q_proj.weight"]
    assert content[file.held.keys[part.weight].start] == 0x69
    place = file.held.keys[part.scale]
    scales = np.frombuffer(content, "<f4", 128, place.start).reshape(2, 64)
    np.testing.assert_array_equal(scales[1], np.arange(64) + 1)


def refuse(model: Any, source: Path) -> None:
    container.refuse(model.decoder, model.plan, Tokenizer.open(source))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"head_dim": 18}, "heads of 18 numbers"),
        ({"head_dim": 12}, "ropes that turn 12 numbers"),
        ({"vocab_size": 402}, "embed_tokens.weight with 402 rows"),
        ({"intermediate_size": 98}, "with 98 rows"),
    ],
)
def test_sizes_that_shaders_compute_wrongly_are_refused(
    config: dict[str, Any], said: str, make_model: Any, in_memory: Any
) -> None:
    source = make_model("llama", **config)
    with pytest.raises(Unsupported, match=said) as failure:
        refuse(in_memory(source, "int8"), source)
    assert "--container executorch" in failure.value.cure


@pytest.mark.parametrize("grid", ["int8-g32", "int2-g64", "nf4-g64", "int4-g32-signed"])
def test_grids_that_it_does_not_multiply_are_refused(
    grid: str, tiny_llama: Path, in_memory: Any
) -> None:
    model = in_memory(tiny_llama, "int4", {"*.0.self_attn.q_proj.weight": grid})
    with pytest.raises(Unsupported, match=f"Vulkan backend cannot multiply the grid {grid}"):
        refuse(model, tiny_llama)


@pytest.mark.filterwarnings("ignore")  # peft warns about tied tables
def test_adapters_do_not_stay_separate(
    tiny_llama: Path, in_memory: Any, train_adapter: Any, read_tone: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    train_adapter(tiny_llama, tmp_path / "tone", {"target_modules": ["q_proj"], "r": 2})
    adapter = read_tone(tiny_llama, tmp_path / "tone", model.decoder)
    base = model.base()
    for refused in (
        lambda: container.refuse_adapter(adapter),
        lambda: container.predict_adapter(adapter, base),
        lambda: container.write_adapter(adapter, base, tmp_path),
        lambda: container.check_adapter(tmp_path / "x", adapter, base),
    ):
        with pytest.raises(Unsupported, match="tone cannot stay separate"):
            refused()
    with pytest.raises(BadInput, match="x is not an adapter"):
        container.refuse_foreign_adapter(tmp_path / "x", model.weights_digest)


def test_a_window_shortens_the_context(make_model: Any, in_memory: Any) -> None:
    decoder = in_memory(make_model("mistral", sliding_window=24), "int8").decoder
    assert container.context_length(decoder) == 24
    assert container.kv_cache("f16") == "f32"
