"""The float16 graph: the codes and the meaning of the float32 one, rounding within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as genai
import pytest

from slimport.architectures import FAMILIES, Kind
from slimport.errors import BadInput, Unsupported, ValidationFailed
from slimport.export import onnx as float32
from slimport.export import onnx_fp16 as container
from slimport.export.container import Deployment
from slimport.export.onnx.reader import MODEL, open_file
from slimport.quantize.tensor import QuantizedTensor
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import divergence
from slimport.validation.runtimes import onnxruntime, onnxruntime_memory

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables

FLOAT = {"*": "float16"}
# Largest difference of logits that float16 arithmetic may make on weights that are exact in it, by
# family: twice what was measured on these models, whose logits spread over whole units.
TOLERANCE = {
    "llama": 0.03,
    "mistral": 0.03,
    "qwen2": 0.03,
    "qwen3": 0.022,
    "gemma": 0.2,
    "gemma2": 0.1,
    "gemma3_text": 0.07,
    "smollm3": 0.06,
    "phi3": 0.03,
    "olmo2": 0.02,
    "granite": 0.007,
}


def export(model: Any, folder: Path, target: Path, *adapted: Kind, to: Any = container) -> Path:
    """Write the files, hold them to their predicted sizes, and read them back."""
    target.mkdir(exist_ok=True)
    tokenizer, deployment = Tokenizer.open(folder), Deployment(64, frozenset(adapted))
    predicted = to.predict(model.decoder, model.plan, tokenizer, model.name, deployment)
    files = to.write(model, tokenizer, target, deployment)
    assert predicted == {file.name: file.stat().st_size for file in files}
    found = to.check(model, target)
    assert found.weights_digest == model.weights_digest
    assert not any(error for name, error in found.float_errors.items() if "norm" in name)
    return Path(files[0])


def tokens_of(model: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    vocabulary = model.decoder.vocab_size
    return np.random.default_rng(1).integers(0, vocabulary, (2, 64), dtype=np.int32)


def halved(model: Any) -> Any:
    """The model with matrices that are exact in float16."""
    for name, tensor in model.tensors.items():
        if not isinstance(tensor, QuantizedTensor) and tensor.ndim == 2:
            model.tensors[name] = tensor.astype(np.float16).astype(np.float32)
    return model


def logits(file: Path, tokens: Any, exact: bool = False, **options: Any) -> Any:
    out = file.parent / "o.npy"
    if exact:
        assert onnxruntime.exact_logits(file, tokens, out, **options)
    else:
        onnxruntime.logits(file, tokens, out, **options)
    return np.load(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float16(
    family: str, make_model: Any, in_memory: Any, tmp_path: Path, oracle: Any
) -> None:
    folder = make_model(family)
    model = halved(in_memory(folder, patterns=FLOAT))
    tokens = tokens_of(model)
    file = export(model, folder, tmp_path / "half")
    expected = oracle(folder, tokens, model.tensors)
    meant = np.abs(logits(file, tokens, exact=True) - expected).max()
    assert meant < (2e-4 if "gemma" in family else 3e-5)  # as of the float32 graph
    difference = np.abs(logits(file, tokens) - expected)
    assert difference.max() < TOLERANCE[family]
    (one,) = onnxruntime.generate(file, [[1, 5, 7]], 4)
    assert one.tokens or one.stopped


@pytest.mark.parametrize(
    "grid",
    ["int4-g32", "int4-g32-signed", "int8-row", "int8-g32", "int2-g64", "int2-g256"],
)
def test_codes_and_meaning_are_those_of_the_float32_graph(
    grid: str, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder = make_model("qwen2", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    model = in_memory(folder, patterns={"*": grid})
    tokens = tokens_of(model)
    half = export(model, folder, tmp_path / "half")
    full = export(model, folder, tmp_path / "full", to=float32)
    expected = logits(full, tokens, exact=True)
    assert np.abs(logits(half, tokens, exact=True) - expected).max() < 3e-5
    shipped = [np.median(np.abs(logits(file, tokens) - expected)) for file in (half, full)]
    assert shipped[0] < 1.5 * shipped[1] + 0.01  # int8 activations cost more than float16


def test_scales_reach_the_products_as_they_are_stored(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    graph = onnx.load_model(
        export(in_memory(tiny_llama), tiny_llama, tmp_path), load_external_data=False
    ).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert {stored[node.input[2]] for node in products} == {onnx.TensorProto.FLOAT16}
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        whole = value.name in ("input_ids", "attention_mask")
        assert kind == (onnx.TensorProto.INT64 if whole else onnx.TensorProto.FLOAT16), value.name


def test_the_cache_takes_half_of_the_memory(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    half = export(model, tiny_llama, tmp_path / "half").parent
    full = export(model, tiny_llama, tmp_path / "full", to=float32).parent
    found = [
        onnxruntime_memory.memory(open_file(folder), folder, 64, None).kv_cache
        for folder in (half, full)
    ]
    assert found == [2 * 2 * 2 * 16 * 64 * 2, 2 * 2 * 2 * 16 * 64 * 4]
    assert (container.kv_cache("f32"), float32.kv_cache("f16")) == ("f16", "f32")


def test_nf4_is_refused(tiny_llama: Path, in_memory: Any) -> None:
    model, tokenizer = in_memory(tiny_llama, "nf4"), Tokenizer.open(tiny_llama)
    float32.refuse(model.decoder, model.plan, tokenizer)
    with pytest.raises(Unsupported, match="float16 graph cannot hold the grid nf4") as failure:
        container.refuse(model.decoder, model.plan, tokenizer)
    assert "--container onnx" in failure.value.cure


def test_a_norm_beyond_float16_is_refused(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    model = in_memory(tiny_llama)
    model.tensors["model.norm.weight"] = model.tensors["model.norm.weight"] * 1e5
    with pytest.raises(Unsupported, match=r"model\.norm\.weight: its largest weight"):
        container.write(model, Tokenizer.open(tiny_llama), tmp_path, Deployment(64))


def growing(make_model: Any, in_memory: Any, down: float) -> tuple[Path, Any]:
    """One layer whose first hidden number starts at 40,000 and grows by 96 * 64 * `down`."""
    folder = make_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    model = in_memory(folder, patterns=FLOAT)
    for name, tensor in model.tensors.items():
        tensor = np.array(tensor)
        if "norm" in name:
            tensor[:] = 1
        elif "embed" in name:
            tensor[:, 0] = 40_000
        elif "o_proj" in name:
            tensor[:] = 0
        elif "gate" in name or "up" in name:
            tensor[:, 0] = 1  # of an input of sqrt(64)
        elif "down" in name:
            tensor[0] = down
        model.tensors[name] = tensor
    return folder, model


def test_an_overflow_that_the_cpu_hides_is_found(
    make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder, model = growing(make_model, in_memory, 8.0)  # 49,152: only the sum is beyond float16
    tokens = tokens_of(model)
    file = export(model, folder, tmp_path / "half")
    assert np.isfinite(logits(file, tokens)).all()  # the CPU adds and normalizes in float32
    with pytest.raises(ValidationFailed, match=r"model\.norm computes numbers that do not fit"):
        logits(file, tokens, exact=True)
    full = export(model, folder, tmp_path / "full", to=float32)
    assert np.isfinite(logits(full, tokens, exact=True)).all()


def test_an_overflow_of_a_product_is_not_finite(
    make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder, model = growing(make_model, in_memory, 60.0)
    tokens = tokens_of(model)
    file = export(model, folder, tmp_path)
    np.save(tmp_path / "found.npy", logits(file, tokens))
    np.save(tmp_path / "expected.npy", np.zeros((2, 64, 416), np.float32))
    with pytest.raises(ValidationFailed, match="not finite"):
        divergence.compare(tmp_path / "expected.npy", tmp_path / "found.npy", tokens)
    with pytest.raises(ValidationFailed, match="down_proj computes numbers that do not fit"):
        logits(file, tokens, exact=True)


def test_two_exports_have_the_same_bytes(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        folder = export(in_memory(tiny_llama), tiny_llama, tmp_path / name).parent
        contents.append({file.name: file.read_bytes() for file in sorted(folder.iterdir())})
    assert contents[0] == contents[1]


@pytest.fixture(scope="module")
def toned(
    tiny_llama: Path,
    in_memory: Any,
    train_adapter: Any,
    read_tone: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A float16 base, an adapter in float16 and one in float32, and what peft says."""
    import torch

    folder = tmp_path_factory.mktemp("adapted")
    model = halved(in_memory(tiny_llama, patterns=FLOAT))
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}
    oracle = train_adapter(tiny_llama, folder / "peft", settings)
    adapter = read_tone(tiny_llama, folder / "peft", model.decoder)
    base = export(model, tiny_llama, folder / "base", Kind.Q, Kind.V, Kind.DOWN)
    files = {}
    for to in (container, float32):
        (folder / to.NAME).mkdir()
        given = (adapter, model.base())
        files[to.NAME] = to.write_adapter(*given, folder / to.NAME)
        to.check_adapter(files[to.NAME], *given)
        assert to.predict_adapter(*given) == {"tone.onnx_adapter": files[to.NAME].stat().st_size}
    tokens = tokens_of(model)[:1]
    with torch.inference_mode():
        expected = {"tone": oracle(torch.from_numpy(tokens).long()).logits.numpy()}
        with oracle.disable_adapter():
            expected["base"] = oracle(torch.from_numpy(tokens).long()).logits.numpy()
    return {
        "model": model,
        "base": base,
        "files": files,
        "tokens": tokens,
        "expected": expected,
        "adapter": adapter,
    }


def test_an_adapter_switches_on_and_off(toned: dict[str, Any]) -> None:
    session = ort.InferenceSession(toned["base"], providers=["CPUExecutionProvider"])
    tokens, expected = toned["tokens"], toned["expected"]
    feed = {"input_ids": tokens.astype(np.int64), "attention_mask": np.ones(tokens.shape, np.int64)}
    for one in session.get_inputs():
        if one.name.startswith("past"):
            feed[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float16)
    assert np.abs(expected["tone"] - expected["base"]).max() > 0.1
    found = []
    for name in ("base", "tone", "base"):
        options, adapter = ort.RunOptions(), ort.LoraAdapter()
        if name != "base":
            adapter.Load(str(toned["files"]["onnx-fp16"]))
            options.add_active_adapter(adapter)
        found.append(session.run(["logits"], feed, options)[0])
        assert np.abs(found[-1] - expected[name]).max() < TOLERANCE["llama"], name
    np.testing.assert_array_equal(found[0], found[2])
    model = genai.Model(str(toned["base"].parent))
    adapters = genai.Adapters(model)
    adapters.load(str(toned["files"]["onnx-fp16"]), "tone")
    for name in ("base", "tone", "base"):
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=64, do_sample=False)
        generator = genai.Generator(model, params)
        if name != "base":
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(tokens[0, :60])
        last = np.array(generator.get_output("logits"))[0, -1]
        assert np.abs(last - expected[name][0, 59]).max() < TOLERANCE["llama"], name


def test_an_adapter_means_what_peft_trained(toned: dict[str, Any]) -> None:
    file = toned["files"]["onnx-fp16"]
    found = logits(toned["base"], toned["tokens"], exact=True, adapter=file)
    np.save(file.parent / "found.npy", found)
    np.save(file.parent / "expected.npy", toned["expected"]["tone"])
    places = (file.parent / "expected.npy", file.parent / "found.npy")
    measured = divergence.compare(*places, toned["tokens"])
    assert 1e-6 < measured.kl_max < 1e-5  # factors are rounded to float16, and nothing else


def test_an_adapter_in_float32_is_refused(toned: dict[str, Any]) -> None:
    model, file = toned["model"], toned["files"]["onnx"]
    with pytest.raises(BadInput, match="float32, and that of the base float16"):
        container.refuse_foreign_adapter(file, model.weights_digest)
    with pytest.raises(ValidationFailed, match="cannot run"):
        logits(toned["base"], toned["tokens"], adapter=file)
    with pytest.raises(ValidationFailed, match="other numbers"):
        container.check_adapter(file, toned["adapter"], model.base())


def test_an_adapter_beyond_float16_is_refused(toned: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="does not fit float16"):
        container.write_adapter(toned["adapter"], toned["model"].base(), tmp_path, 1e8)
    assert not list(tmp_path.iterdir())


def test_the_graph_is_the_one_of_float32_but_for_its_types(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model, nodes = in_memory(tiny_llama), []
    for to in (container, float32):
        folder = export(model, tiny_llama, tmp_path / to.NAME, to=to).parent
        graph = onnx.load_model(folder / MODEL, load_external_data=False).graph
        nodes.append([(n.name, n.op_type) for n in graph.node if n.op_type != "Cast"])
    assert nodes[0] == nodes[1]
    assert (tmp_path / "onnx-fp16/model.onnx.data").read_bytes() == (
        tmp_path / "onnx/model.onnx.data"
    ).read_bytes()
