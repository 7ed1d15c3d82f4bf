"""Programs of adapters: base and adapter in ExecuTorch beside base and adapter in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimport.architectures import Kind
from slimport.errors import BadInput, Unsupported, ValidationFailed
from slimport.export import executorch as container
from slimport.export.container import Deployment
from slimport.export.executorch.layout import WEIGHTS
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import executorch

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables, rightly

FLOAT = {"*": "float16"}
SHARED = Deployment(64, frozenset({Kind.Q}))
Adapted = tuple[str, dict[str, Any], dict[str, Any]]


def write(model: Any, folder: Path, target: Path) -> Path:
    """A base whose weights lie outside of its program, with room for adapters."""
    (target / "adapters").mkdir(parents=True)
    return container.write(model, Tokenizer.open(folder), target, SHARED)[0]


def base_of(model: Any, folder: Path, digest: str | None = None) -> Any:
    return model.base(digest, tokenizer=Tokenizer.open(folder), deployment=SHARED)


def logits(model: Any, tokens: np.ndarray[Any, Any]) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def test_executorch_applies_what_peft_trained(
    adapted: Adapted,
    make_model: Any,
    in_memory: Any,
    train_adapter: Any,
    read_tone: Any,
    tmp_path: Path,
) -> None:
    family, overrides, settings = adapted
    folder = make_model(family, **overrides)
    oracle = train_adapter(folder, tmp_path / "peft", settings)
    model = in_memory(folder, patterns=FLOAT)
    adapter = read_tone(folder, tmp_path / "peft", model.decoder)
    if "embed_tokens" in settings["target_modules"]:
        with pytest.raises(Unsupported, match="only the matrices of decoder layers"):
            container.refuse_adapter(adapter)
        return
    table = oracle.get_input_embeddings().weight  # the kernel has it in float16
    table.data = table.data.half().float()
    model.tensors["model.embed_tokens.weight"] = table.detach().numpy()
    file, base = write(model, folder, tmp_path / "base"), base_of(model, folder)
    sizes = {path.name: path.stat().st_size for path in file.parent.iterdir() if path.is_file()}
    tokenizer = base.tokenizer
    predicted = container.predict(model.decoder, model.plan, tokenizer, model.name, SHARED)
    assert predicted == sizes and WEIGHTS in sizes
    tone = container.write_adapter(adapter, base, file.parent / "adapters")
    assert container.predict_adapter(adapter, base) == {"tone.pte": tone.stat().st_size}
    container.check_adapter(tone, adapter, base)
    container.check(model, file.parent)
    tokens = np.random.default_rng(2).integers(0, 416, (1, 48), dtype=np.int32)
    expected = logits(oracle, tokens)
    executorch.logits(file, tokens, tmp_path / "o.npy", adapter=tone)
    assert np.abs(np.load(tmp_path / "o.npy") - expected).max() < 3e-5
    with oracle.disable_adapter():
        plain = logits(oracle, tokens)
    assert np.abs(plain - expected).max() > 0.1  # the adapter does something
    executorch.logits(file, tokens, tmp_path / "o.npy")
    assert np.abs(np.load(tmp_path / "o.npy") - plain).max() < 3e-5


@pytest.fixture(scope="module")
def toned(
    tiny_llama: Path,
    in_memory: Any,
    train_adapter: Any,
    read_tone: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A quantized base and an adapter of q, v and down."""
    folder = tmp_path_factory.mktemp("toned")
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 12}
    oracle = train_adapter(tiny_llama, folder / "peft", settings)
    model = in_memory(tiny_llama)
    file, base = write(model, tiny_llama, folder / "base"), base_of(model, tiny_llama)
    adapter = read_tone(tiny_llama, folder / "peft", model.decoder)
    tone = container.write_adapter(adapter, base, file.parent / "adapters", 0.5)
    tokens = np.random.default_rng(2).integers(0, 416, (1, 40), dtype=np.int32)
    return {
        "oracle": oracle,
        "model": model,
        "file": file,
        "base": base,
        "adapter": adapter,
        "tone": tone,
        "tokens": tokens,
    }


def test_the_exact_program_means_the_same_codes_and_factors(
    toned: dict[str, Any], tmp_path: Path
) -> None:
    model, oracle, tokens = toned["model"], toned["oracle"], toned["tokens"]
    state = {name: torch.from_numpy(np.array(model.rows(name))) for name in model.tensors}
    inner = oracle.get_base_model()
    for name, parameter in inner.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in state:
            parameter.data = state[plain].clone()
    for module in inner.modules():
        if hasattr(module, "lora_A"):
            module.scaling = {name: 0.5 * 3 for name in module.scaling}  # alpha / rank is 3
    executorch.exact_logits(toned["file"], tokens, tmp_path / "o.npy", adapter=toned["tone"])
    difference = np.abs(np.load(tmp_path / "o.npy") - logits(oracle, tokens)).max()
    assert difference < 3e-5


def test_generation_and_measures_run_the_adapter(toned: dict[str, Any]) -> None:
    file, tone = toned["file"], toned["tone"]
    prompt = [[5, 9, 31, 7]]
    (plain,) = executorch.generate(file, prompt, 12)
    (adapted,) = executorch.generate(file, prompt, 12, adapter=tone)
    assert plain.tokens != adapted.tokens
    alone = executorch.measure(file, 64, [16], generated=2).memory
    beside = executorch.measure(file, 64, [16], generated=2, adapter=tone).memory
    sizes = [path.stat().st_size for path in (tone, file.parent / WEIGHTS)]
    assert beside.mapped == sum(sizes) and beside.repacked > alone.repacked


def test_the_official_runner_opens_it_with_the_weights_of_the_base(
    toned: dict[str, Any], official_runner: Any
) -> None:
    file, tone, tokenizer = toned["file"], toned["tone"], toned["base"].tokenizer
    given = [("Once upon a time", 0)]
    ids = tokenizer.encode(given[0][0])
    for program, adapter in (("model.pte", None), ("adapters/tone.pte", tone)):
        ((printed, read),) = official_runner(file.parent, program, given, WEIGHTS)
        (answer,) = executorch.generate(file, [ids], 16, adapter=adapter)
        assert read == len(ids)
        pieces = [tokenizer.decode([token]) for token in answer.tokens]
        # It prints no byte of a longer character, and no control character.
        assert printed.decode() == "".join(p for p in pieces if p.isprintable() and p != "\ufffd")


def test_another_adapter_or_base_is_noticed(toned: dict[str, Any], tmp_path: Path) -> None:
    tone, adapter, base = (toned[name] for name in ("tone", "adapter", "base"))
    container.check_adapter(tone, adapter, base, 0.5)
    with pytest.raises(ValidationFailed, match="lora_b has other numbers"):
        container.check_adapter(tone, adapter, base, 1.0)
    container.refuse_foreign_adapter(tone, base.weights_digest)
    with pytest.raises(BadInput, match="not an adapter of this base"):
        container.refuse_foreign_adapter(tone, "sha256:" + "1" * 64)
    with pytest.raises(BadInput, match="does not say which base"):
        container.refuse_foreign_adapter(toned["file"], base.weights_digest)


def test_products_with_the_scales_of_another_layer_are_noticed(toned: dict[str, Any]) -> None:
    tone, base = toned["tone"], toned["base"]
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    keys = [f"{n}.scale:{base.digests[f'{n}.weight'][:16]}".encode() for n in names]
    whole = tone.read_bytes()
    try:
        parts = (part.replace(keys[1], keys[0]) for part in whole.split(keys[0]))
        tone.write_bytes(keys[1].join(parts))
        with pytest.raises(ValidationFailed, match=r"other weights than model\.pte"):
            container.check_adapter(tone, toned["adapter"], base, 0.5)
    finally:
        tone.write_bytes(whole)


def test_the_weights_of_another_base_are_refused_by_the_runtime_itself(
    toned: dict[str, Any], tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    other = write(in_memory(tiny_llama, "int8"), tiny_llama, tmp_path / "other")
    with pytest.raises(ValidationFailed, match=r"does not load|cannot run"):
        executorch.logits(other, toned["tokens"], tmp_path / "o.npy", adapter=toned["tone"])


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.98])
def test_a_damaged_program_is_noticed_or_does_the_same(
    toned: dict[str, Any], tmp_path: Path, place: float
) -> None:
    tone, adapter, base = (toned[name] for name in ("tone", "adapter", "base"))
    content = bytearray(tone.read_bytes())
    whole = bytes(content)
    try:
        content[int(place * len(content))] ^= 0xFF
        tone.write_bytes(content)
        with pytest.raises((BadInput, ValidationFailed)):
            container.check_adapter(tone, adapter, base, 0.5)
        for part in (b"", b"nothing", whole[: len(whole) // 2]):
            tone.write_bytes(part)
            with pytest.raises(BadInput, match=r"tone\.pte"):
                container.check_adapter(tone, adapter, base, 0.5)
    finally:
        tone.write_bytes(whole)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]}, "replaces"),
        ({"target_modules": ["embed_tokens"]}, "tied"),
    ],
)
def test_more_than_an_addition_is_refused(
    settings: dict[str, Any],
    why: str,
    tiny_llama: Path,
    in_memory: Any,
    train_adapter: Any,
    read_tone: Any,
    tmp_path: Path,
) -> None:
    train_adapter(tiny_llama, tmp_path, settings)
    model = in_memory(tiny_llama)
    adapter = read_tone(tiny_llama, tmp_path, model.decoder)
    with pytest.raises(Unsupported, match=why):
        container.refuse_adapter(adapter)
    with pytest.raises(Unsupported, match="--adapter-mode merged"):
        container.write_adapter(adapter, base_of(model, tiny_llama), tmp_path)
    assert not list(tmp_path.glob("*.pte"))


def test_two_writes_give_the_same_bytes_and_bases_are_the_same_for_all(
    toned: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    other = write(toned["model"], tiny_llama, tmp_path / "base")
    tone = container.write_adapter(toned["adapter"], toned["base"], tmp_path, 0.5)
    assert tone.read_bytes() == toned["tone"].read_bytes()
    for path in other.parent.iterdir():
        if path.is_file():
            assert path.read_bytes() == (toned["file"].parent / path.name).read_bytes(), path
