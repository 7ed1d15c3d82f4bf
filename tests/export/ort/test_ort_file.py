"""Whole folders: exact sizes, exact codes, the same bytes, and what model.onnx computes."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.tools.ort_format_model import create_config_from_models
from onnxruntime.tools.reduced_build_config_parser import parse_config

from slimport.architectures import Kind, weights
from slimport.errors import Unsupported, ValidationFailed
from slimport.export import onnx
from slimport.export import ort as container
from slimport.export.container import Deployment
from slimport.export.onnx.adapter import SUFFIX
from slimport.export.ort import layout
from slimport.export.ort.reader import open_file
from slimport.quantize.plan import make_plan
from slimport.quantize.tensor import QuantizedTensor, weights_digest
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import onnxruntime, onnxruntime_memory, onnxruntime_worker

Variant = tuple[str, dict[str, Any]]
GRIDS = ["int4-g32", "int4-g32-signed", "int8-row", "int8-g32", "int2-g64", "float16"]


def export(model: Any, folder: Path, target: Path, *adapted: Kind) -> Path:
    """Write the files and hold them to their predicted sizes."""
    target.mkdir(exist_ok=True)
    tokenizer = Tokenizer.open(folder)
    deployment = Deployment(64, frozenset(adapted))
    container.refuse(model.decoder, model.plan, tokenizer)
    predicted = container.predict(model.decoder, model.plan, tokenizer, model.name, deployment)
    files = container.write(model, tokenizer, target, deployment)
    assert predicted == {file.name: file.stat().st_size for file in files}
    assert files[0].name == container.FILE
    return files[0]


def as_onnx(model: Any, folder: Path, target: Path, *adapted: Kind) -> Path:
    target.mkdir()
    return onnx.write(model, Tokenizer.open(folder), target, Deployment(64, frozenset(adapted)))[0]


def windows(vocabulary: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(1).integers(0, vocabulary, (2, 48), dtype=np.int32)


def logits(file: Path, tokens: np.ndarray[Any, Any], adapter: Path | None = None) -> Any:
    """As the runtime computes them, without a child process for each file."""
    session = onnxruntime_worker._Session(file, 1, False)
    if adapter:
        session.attach(str(adapter))
    return np.stack([next(session.logits(window, len(window))) for window in tokens.tolist()])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_code_comes_back_and_computes_what_model_onnx_does(
    grid: str, tied: bool, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder = make_model("qwen2", tie_word_embeddings=tied, intermediate_size=128)
    model = in_memory(folder, patterns={"*": grid})
    file = export(model, folder, tmp_path / "ort")
    found = container.check(model, file.parent)
    digests = {}
    for name, tensor in container.read_back(file.parent, model.decoder, model.grids):
        expected = model.tensors[name]
        if isinstance(expected, QuantizedTensor):
            assert isinstance(tensor, QuantizedTensor) and tensor.grid is expected.grid
            np.testing.assert_array_equal(tensor.codes, expected.codes)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
            digests[name] = expected.digest(name)
    assert found.digests == digests and found.weights_digest == weights_digest(digests)
    assert set(found.float_errors) | set(digests) == {w.name for w in weights(model.decoder)}
    other, tokens = as_onnx(model, folder, tmp_path / "onnx"), windows(model.decoder.vocab_size)
    expected = logits(other, tokens)
    assert expected.std() > 0.01  # zeros are what MatMulNBits gives for scales behind a Cast
    np.testing.assert_array_equal(logits(file, tokens), expected)


def test_every_family_computes_what_model_onnx_does(
    variant: Variant, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    family, overrides = variant
    folder = make_model(family, **overrides)
    model = in_memory(folder)
    try:
        file = export(model, folder, tmp_path / "ort")
    except Unsupported as refusal:
        assert "cannot rotate" in refusal.what
        return
    container.check(model, file.parent)
    tokens = windows(model.decoder.vocab_size)
    expected = logits(as_onnx(model, folder, tmp_path / "onnx"), tokens)
    np.testing.assert_array_equal(logits(file, tokens), expected)


def test_greedy_tokens_are_those_of_model_onnx(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    prompts = [[1, 5, 7], list(range(10, 30))]
    file = export(model, tiny_llama, tmp_path / "ort")
    other = as_onnx(model, tiny_llama, tmp_path / "onnx")
    found = onnxruntime.generate(file, prompts, 12)
    assert found == onnxruntime.generate(other, prompts, 12)
    assert not (file.parent / onnx.FILE).exists()


def test_exact_products_are_those_of_the_codes(
    tiny_llama: Path, in_memory: Any, tmp_path: Path, oracle: Any
) -> None:
    model = in_memory(tiny_llama)
    file = export(model, tiny_llama, tmp_path)
    tokens = windows(model.decoder.vocab_size)
    before = file.read_bytes()
    assert onnxruntime.exact_logits(file, tokens, tmp_path / "exact.npy")
    expected = oracle(tiny_llama, tokens, model.tensors)
    assert np.abs(np.load(tmp_path / "exact.npy") - expected).max() < 1e-4
    assert np.abs(logits(file, tokens) - expected).max() > 1e-3  # int8 activations
    assert file.read_bytes() == before


@pytest.mark.filterwarnings("ignore")  # peft
def test_adapters_switch_at_run_time_as_in_model_onnx(
    tiny_llama: Path, in_memory: Any, train_adapter: Any, read_tone: Any, tmp_path: Path
) -> None:
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8}
    train_adapter(tiny_llama, tmp_path / "lora", settings)
    model = in_memory(tiny_llama)
    adapter = read_tone(tiny_llama, tmp_path / "lora", model.decoder)
    container.refuse_adapter(adapter)
    file = export(model, tiny_llama, tmp_path / "ort", Kind.Q, Kind.DOWN)
    tone = container.write_adapter(adapter, model.base(), file.parent)
    assert tone.name == f"tone{SUFFIX}"
    container.check_adapter(tone, adapter, model.base())
    other = as_onnx(model, tiny_llama, tmp_path / "onnx", Kind.Q, Kind.DOWN)
    tokens = windows(model.decoder.vocab_size)
    plain, adapted = logits(file, tokens), logits(file, tokens, adapter=tone)
    np.testing.assert_array_equal(plain, logits(other, tokens))
    np.testing.assert_array_equal(adapted, logits(other, tokens, adapter=tone))
    assert np.abs(plain - adapted).max() > 0.1
    (found,) = onnxruntime.generate(file, [[1, 5, 7]], 8, adapter=tone)
    assert [found] == onnxruntime.generate(other, [[1, 5, 7]], 8, adapter=tone)


def test_scales_stay_in_the_mapped_file(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    model = in_memory(tiny_llama)
    folder = export(model, tiny_llama, tmp_path / "ort").parent
    other = as_onnx(model, tiny_llama, tmp_path / "onnx").parent
    found = onnxruntime_memory.memory(open_file(folder), folder, 64, None)
    expected = onnxruntime_memory.memory(onnx.reader.open_file(other), other, 64, None)
    assert found.anonymous < expected.anonymous and found.total == expected.total


def test_a_cut_file_does_not_run(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    file = export(in_memory(tiny_llama), tiny_llama, tmp_path)
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(ValidationFailed, match=r"does not load model\.ort"):
        onnxruntime.logits(file, windows(400), tmp_path / "o.npy")
    with pytest.raises(ValidationFailed, match=r"does not load"):
        onnxruntime.generate(file, [[1]], 2)


PROGRAM = """
import hashlib, json, sys
from pathlib import Path
from slimport.export import ort
from slimport.export.container import Deployment
from slimport.export.ort import conversion
content = Path(sys.argv[1]).read_bytes()
blobs = {int(k): ort.layout.Blob(*v) for k, v in json.loads(sys.argv[2]).items()}
found = conversion.convert(content, blobs)
print(hashlib.sha256(found.head + found.operators).hexdigest())
"""


def test_other_processes_give_the_same_bytes(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    """ONNX Runtime orders parts of the file by addresses, which differ between processes."""
    model = in_memory(tiny_llama)
    place = as_onnx(model, tiny_llama, tmp_path / "onnx")
    placed = onnx.layout.layout(model.decoder, model.plan, Deployment(64))
    pairs = (f'"{k}": [{v.offset}, {v.nbytes}]' for k, v in layout.blobs(placed).items())
    command = [sys.executable, "-c", PROGRAM, str(place), f"{{{', '.join(pairs)}}}"]
    found = {subprocess.check_output(command) for _ in range(2)}
    assert len(found) == 1


def test_two_exports_have_the_same_bytes(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        file = export(in_memory(tiny_llama), tiny_llama, tmp_path / name)
        contents = {path.name: path.read_bytes() for path in file.parent.iterdir()}
        digests.append({name: hashlib.sha256(c).hexdigest() for name, c in contents.items()})
        assert not any(str(tmp_path).encode() in content for content in contents.values())
    assert digests[0] == digests[1]


def test_a_tied_table_is_stored_once_and_tensors_are_aligned(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    file = export(model, tiny_llama, tmp_path)
    content, read = file.read_bytes(), open_file(tmp_path)
    codes = model.tensors["model.layers.0.mlp.up_proj.weight"]
    operand = read.operand("model.layers.0.mlp.up_proj")
    assert operand is not None and operand.scale is not None
    assert operand.scale.dtype == np.float32 and operand.codes.size == codes.codes.size // 2
    assert content.count(operand.codes.tobytes()) == 1
    assert content.index(operand.codes.tobytes()) % 64 == 0
    table = read.operand("model.embed_tokens")
    assert table is not None and content.count(table.codes.tobytes()) == 1
    assert not any(node.op_type == "Cast" for node in read.nodes.values() if "mod" in node.name)


@pytest.mark.filterwarnings("ignore")  # onnxruntime.tools leaves files open
def test_the_operator_list_names_what_the_graph_uses(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    file = export(in_memory(tiny_llama), tiny_llama, tmp_path)
    mine = (tmp_path / container.OPERATORS).read_text()
    create_config_from_models([file], tmp_path / "theirs", True)
    theirs = (tmp_path / "theirs").read_text()

    def entries(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("#")]

    assert entries(mine) == entries(theirs) and "/" not in mine
    required, types = parse_config(str(tmp_path / container.OPERATORS), True)
    used = {(n.domain or "ai.onnx", n.op_type) for n in open_file(tmp_path).nodes.values()}
    named = {(d, op) for d, opsets in required.items() for ops in opsets.values() for op in ops}
    assert named == used and types is not None


def test_what_a_flatbuffer_cannot_hold_is_refused(tiny_llama: Path, in_memory: Any) -> None:
    model = in_memory(tiny_llama)
    large = dataclasses.replace(model.decoder, intermediate_size=12_000_000)
    plan, tokenizer = make_plan(large, "int4", "rtn"), Tokenizer.open(tiny_llama)
    with pytest.raises(Unsupported, match=r"cannot hold a model of 2\.\d GB") as refusal:
        container.refuse(large, plan, tokenizer)
    assert refusal.value.exit_code == 5 and "--container onnx" in refusal.value.cure
