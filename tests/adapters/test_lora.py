"""Reading adapter folders: names old and new, what is recorded, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slimport.adapters.config import read_config
from slimport.adapters.lora import Adapter, read_adapter
from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, SlimportError, Unsupported, UsageError

MakeModel = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Edit = Callable[[dict[str, Any], Tensors], None]
PREFIX = "base_model.model."
LAYER = "model.layers.{}.self_attn."
QUERY = PREFIX + LAYER.format(0) + "q_proj."
NAN = float("nan")


def good() -> tuple[dict[str, Any], Tensors]:
    """LoRA of rank 4 on q_proj (64, 64) and v_proj (32, 64) of both layers of a tiny Llama."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "some/base",
    }
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{PREFIX}{LAYER.format(layer)}{module}.lora_{half}.weight": torch.randn(
            (4, 64) if half == "A" else (rows, 4), generator=generator
        )
        for layer in (0, 1)
        for module, rows in (("q_proj", 64), ("v_proj", 32))
        for half in "AB"
    }
    return config, tensors


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def base(make_model: MakeModel) -> Checkpoint:
    return Checkpoint.open(make_model("llama"))


def read(folder: Path, base: Checkpoint) -> Adapter:
    return read_adapter(folder, "support", base, decoder_config(base.config))


def test_every_tensor_is_resolved(base: Checkpoint, tmp_path: Path) -> None:
    config, tensors = good()
    adapter = read(write(tmp_path / "lora", config, tensors), base)
    assert sorted(adapter.deltas) == [
        f"{LAYER.format(layer)}{module}.weight"
        for layer in (0, 1)
        for module in ("q_proj", "v_proj")
    ]
    delta = adapter.deltas[LAYER.format(0) + "q_proj.weight"]
    np.testing.assert_array_equal(delta.a, tensors[QUERY + "lora_A.weight"])
    np.testing.assert_array_equal(delta.b, tensors[QUERY + "lora_B.weight"])
    assert (delta.scale, delta.magnitude, adapter.unties) == (2.0, None, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype_is_read(base: Checkpoint, tmp_path: Path, dtype: torch.dtype) -> None:
    config, tensors = good()
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    adapter = read(write(tmp_path / "lora", config, tensors), base)
    found = adapter.deltas[LAYER.format(0) + "q_proj.weight"].a
    np.testing.assert_array_equal(found, tensors[QUERY + "lora_A.weight"].float())


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix(PREFIX).replace(".weight", ".my_adapter.weight"),
    ],
)
def test_old_names(base: Checkpoint, tmp_path: Path, rename: Callable[[str], str]) -> None:
    config, tensors = good()
    new = read(write(tmp_path / "new", config, tensors), base)
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    assert read(write(tmp_path / "old", config, renamed), base).digest() == new.digest()


def test_old_names_of_saved_modules(base: Checkpoint, tmp_path: Path) -> None:
    config, tensors = good()
    table = base.rows("model.embed_tokens.weight")
    head = torch.from_numpy(table + 1)
    tensors[PREFIX + "lm_head.modules_to_save.default.weight"] = head
    tensors[PREFIX + "lm_head.original_module.weight"] = torch.from_numpy(table).clone()
    config["modules_to_save"] = ["lm_head"]
    adapter = read(write(tmp_path / "lora", config, tensors), base)
    assert adapter.unties and list(adapter.replaced) == ["lm_head.weight"]
    np.testing.assert_array_equal(adapter.replaced["lm_head.weight"].rows(5, 9), head[5:9])


@pytest.mark.parametrize("suffix", ["", ".default", ".weight", ".default.weight"])
def test_names_of_dora_magnitudes(base: Checkpoint, tmp_path: Path, suffix: str) -> None:
    config, tensors = good()
    for name in list(tensors):
        if name.endswith("lora_B.weight"):
            where = name.removesuffix("lora_B.weight") + "lora_magnitude_vector" + suffix
            tensors[where] = torch.arange(1.0, len(tensors[name]) + 1)
    config["use_dora"] = True
    adapter = read(write(tmp_path / "lora", config, tensors), base)
    assert all(
        delta.magnitude is not None and delta.magnitude[-1] == len(delta.b)
        for delta in adapter.deltas.values()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_base_tables_are_compared(
    base: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    config, tensors = good()
    copy = torch.from_numpy(base.rows("model.embed_tokens.weight")).to(dtype)
    tensors[PREFIX + "model.embed_tokens.base_layer.weight"] = copy
    tensors[PREFIX + "lm_head.weight"] = copy.clone()
    plain = read(write(tmp_path / "plain", *good()), base)
    assert read(write(tmp_path / "lora", config, tensors), base).digest() == plain.digest()
    copy[300, 2] += 0.01
    with pytest.raises(BadInput, match="differs from the base"):
        read(write(tmp_path / "lora", config, tensors), base)


def test_digest_is_of_the_content(base: Checkpoint, tmp_path: Path) -> None:
    config, tensors = good()
    first = read(write(tmp_path / "a", config, tensors), base).digest()
    backwards = dict(reversed(config.items()))
    assert read(write(tmp_path / "b", backwards, tensors), base).digest() == first
    tensors[QUERY + "lora_A.weight"][3, 7] += 1e-3
    changed = read(write(tmp_path / "c", config, tensors), base).digest()
    assert changed != first and changed.startswith("sha256:")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/home/somebody/models/tiny", "tiny"),
        ("./out/tiny/", "tiny"),
        ("C:\\models\\tiny", "tiny"),
        ("~/tiny", "tiny"),
        (None, None),
    ],
)
def test_base_name_is_never_a_path(written: str | None, name: str | None, tmp_path: Path) -> None:
    config, tensors = good()
    config["base_model_name_or_path"] = written
    folder = write(tmp_path / "lora", config, tensors)
    assert read_config(folder).trained_on.base == name


def test_quantization_of_the_base_is_recorded(tmp_path: Path) -> None:
    config, tensors = good()
    folder = write(tmp_path / "lora", config, tensors)
    assert read_config(folder).trained_on.quantization is None
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": nf4}))
    trained_on = read_config(folder).trained_on
    assert (trained_on.quantization, trained_on.found_in) == (
        nf4,
        "config.json: quantization_config",
    )


# --- what is refused: an edit of the good folder, the error, words of its message ---


def key(**changes: Any) -> Edit:
    return lambda config, tensors: config.update(changes)


def add(name: str, *shape: int) -> Edit:
    return lambda config, tensors: tensors.update({name: torch.ones(shape)})


def drop(word: str) -> Edit:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        for name in [name for name in tensors if word in name]:
            del tensors[name]

    return edit


def value(number: float) -> Edit:
    return lambda config, tensors: tensors[QUERY + "lora_A.weight"].__setitem__((1, 2), number)


def both(*edits: Edit) -> Edit:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        for each in edits:
            each(config, tensors)

    return edit


HEAD = PREFIX + "lm_head.weight"
TABLE = PREFIX + "model.embed_tokens."
REFUSED: dict[str, tuple[Edit, type[SlimportError], str]] = {
    # the config
    "no peft_type": (key(peft_type=None), BadInput, "peft_type"),
    "IA3": (key(peft_type="IA3"), Unsupported, "IA3"),
    "ADALORA": (key(peft_type="ADALORA"), Unsupported, "ADALORA"),
    "classifier": (key(task_type="SEQ_CLS"), Unsupported, "reward model"),
    "seq2seq": (key(task_type="SEQ_2_SEQ_LM"), Unsupported, "SEQ_2_SEQ_LM"),
    "layer_replication": (key(layer_replication=[[0, 2]]), Unsupported, "layer_replication"),
    "aLoRA": (key(alora_invocation_tokens=[1]), Unsupported, "alora_invocation_tokens"),
    "experts": (key(target_parameters=["mlp.experts"]), Unsupported, "target_parameters"),
    "unknown key": (key(use_magic=True), Unsupported, "use_magic"),
    "pissa": (key(init_lora_weights="pissa_niter_4"), Unsupported, "changes the base"),
    "olora": (key(init_lora_weights="olora"), Unsupported, "changes the base"),
    "rank text": (key(r="4"), BadInput, "r = '4'"),
    "rank zero": (key(r=0), BadInput, "r = 0"),
    "alpha NaN": (key(lora_alpha=NAN), BadInput, "NaN is no number"),
    "pattern": (key(rank_pattern={"q_proj": -1}), BadInput, r"rank_pattern\.q_proj"),
    "bad regex": (key(alpha_pattern={"q_(": 1}), BadInput, "regular expression"),
    "bad target": (key(target_modules="*"), BadInput, "regular expression"),
    "flag": (key(use_rslora="yes"), BadInput, "use_rslora"),
    "bias": (key(bias="some"), BadInput, "bias"),
    "saved": (key(modules_to_save="lm_head"), BadInput, "modules_to_save"),
    "layers": (key(layers_to_transform=["0"]), BadInput, "layers_to_transform"),
    # tensors that are missing
    "A without B": (drop("layers.0.self_attn.q_proj.lora_B"), BadInput, "part b"),
    "B without A": (drop("layers.1.self_attn.v_proj.lora_A"), BadInput, "part a"),
    "layer missing": (drop("layers.1."), BadInput, "target_modules"),
    "target missing": (key(target_modules=["q_proj", "v_proj", "up_proj"]), BadInput, "up_proj"),
    "saved missing": (key(modules_to_save=["lm_head"]), BadInput, "lm_head.weight"),
    "magnitudes missing": (key(use_dora=True), BadInput, "magnitude"),
    "bias of B missing": (key(lora_bias=True), BadInput, "b_bias"),
    "tokens missing": (key(trainable_token_indices=[1, 2]), BadInput, "trainable_token_indices"),
    # tensors that are too many
    "leftover": (
        add(PREFIX + "model.layers.7.mlp.up_proj.lora_A.weight", 4, 64),
        BadInput,
        "fit no",
    ),
    "fused": (
        add(PREFIX + "model.layers.0.query_key_value.lora_A.weight", 4, 64),
        BadInput,
        "fit no",
    ),
    "lora_E": (add(QUERY + "lora_E", 4, 1), BadInput, "lora_E"),
    "score": (add(PREFIX + "score.weight", 1, 64), Unsupported, "reward model"),
    "value head": (add("v_head.summary.weight", 1, 64), Unsupported, "reward model"),
    "twice": (add(QUERY.removeprefix(PREFIX) + "lora_A.weight", 4, 64), BadInput, "same tensor"),
    "two adapters": (add(QUERY + "lora_A.other.weight", 4, 64), BadInput, "same tensor"),
    "magnitude": (add(QUERY + "lora_magnitude_vector", 64), BadInput, "does not belong"),
    "bias of B": (add(QUERY + "lora_B.bias", 64), BadInput, "does not belong"),
    "embedding part": (add(QUERY + "lora_embedding_A", 4, 64), BadInput, "does not belong"),
    "linear part": (add(TABLE + "lora_A.weight", 4, 64), BadInput, "does not belong"),
    "LoRA on a norm": (add(PREFIX + "model.norm.lora_A.weight", 4, 64), BadInput, "vector"),
    "LoRA and saved": (
        both(key(target_modules=["v_proj"]), add(QUERY + "modules_to_save.weight", 64, 64)),
        BadInput,
        "two ways",
    ),
    "saved twice": (
        both(
            key(modules_to_save=["lm_head"]),
            add(HEAD, 416, 64),
            add(PREFIX + "lm_head.modules_to_save.default.weight", 416, 64),
        ),
        BadInput,
        "replace the same weight",
    ),
    # tensors that do not fit
    "rank": (key(r=8), BadInput, r"\(4, 64\), not \(8, 64\)"),
    "rank pattern": (key(rank_pattern={"q_proj": 2}), BadInput, "the rank 2"),
    "inputs": (add(QUERY + "lora_A.weight", 4, 65), BadInput, r"\(4, 65\), not \(4, 64\)"),
    "outputs": (add(QUERY + "lora_B.weight", 32, 4), BadInput, r"\(32, 4\), not \(64, 4\)"),
    "scalar": (add(QUERY + "lora_A.weight"), BadInput, r"\(\), not \(4, 64\)"),
    "vocabulary": (add(TABLE + "base_layer.weight", 418, 64), BadInput, "vocabulary"),
    "saved shape": (
        both(key(modules_to_save=["lm_head"]), add(HEAD, 418, 64)),
        BadInput,
        r"not \(416, 64\)",
    ),
    "token ids": (
        both(
            key(trainable_token_indices=[5, 416]),
            add(TABLE + "token_adapter.trainable_tokens_delta", 2, 64),
        ),
        BadInput,
        "below 416",
    ),
    "token rows": (
        both(
            key(trainable_token_indices=[5]),
            add(TABLE + "token_adapter.trainable_tokens_delta", 2, 64),
        ),
        BadInput,
        "1 trained tokens",
    ),
    # values and dtypes
    "NaN": (value(NAN), BadInput, "NaN or inf"),
    "Inf": (value(float("inf")), BadInput, "NaN or inf"),
    "integers": (
        lambda config, tensors: tensors.update({QUERY + "lora_A.weight": torch.ones(4, 64).int()}),
        BadInput,
        "I32",
    ),
    "nothing": (drop(""), BadInput, "no tensors"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused(fault: str, base: Checkpoint, tmp_path: Path) -> None:
    edit, error, words = REFUSED[fault]
    config, tensors = good()
    edit(config, tensors)
    folder = write(tmp_path / "lora", config, tensors)
    with pytest.raises(error, match=words) as caught:
        read(folder, base)
    assert type(caught.value) is error and len(str(caught.value).splitlines()) == 3


def test_only_copies_change_nothing(base: Checkpoint, tmp_path: Path) -> None:
    config, _ = good()
    table = torch.from_numpy(base.rows("model.embed_tokens.weight"))
    folder = write(tmp_path / "lora", config | {"target_modules": None}, {HEAD: table})
    with pytest.raises(BadInput, match="changes nothing"):
        read(folder, base)


def test_lora_bias_needs_a_bias_in_the_base(base: Checkpoint, tmp_path: Path) -> None:
    config, tensors = good()
    for name in list(tensors):
        if name.endswith("lora_B.weight"):
            tensors[name.replace(".weight", ".bias")] = torch.ones(len(tensors[name]))
    folder = write(tmp_path / "lora", config | {"lora_bias": True}, tensors)
    with pytest.raises(Unsupported, match="lora_bias"):
        read(folder, base)


def test_trained_biases_must_be_in_the_file(make_model: MakeModel, tmp_path: Path) -> None:
    base = Checkpoint.open(make_model("qwen2"))
    config, tensors = good()
    folder = write(tmp_path / "lora", config | {"bias": "lora_only"}, tensors)
    with pytest.raises(BadInput, match=r"q_proj\.bias"):
        read(folder, base)


def _pointer(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


FILES: dict[str, tuple[Callable[[Path], object], type[SlimportError], str]] = {
    "no folder": (
        lambda folder: folder.rename(folder.with_name("elsewhere")),
        UsageError,
        "does not exist",
    ),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        BadInput,
        "adapter_config.json",
    ),
    "config is text": (
        lambda folder: (folder / "adapter_config.json").write_text("{'r': 4}"),
        BadInput,
        "not JSON",
    ),
    "config is a list": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        BadInput,
        "not a JSON object",
    ),
    "config pointer": (lambda folder: _pointer(folder, "adapter_config.json"), BadInput, "LFS"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        BadInput,
        "is missing",
    ),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        BadInput,
        "pickle",
    ),
    "weights pointer": (
        lambda folder: _pointer(folder, "adapter_model.safetensors"),
        BadInput,
        "LFS",
    ),
    "truncated": (_cut, BadInput, "damaged"),
    "noise": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 400),
        BadInput,
        "damaged",
    ),
    "empty": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        BadInput,
        "damaged",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_refused_files(fault: str, base: Checkpoint, tmp_path: Path) -> None:
    damage, error, words = FILES[fault]
    folder = write(tmp_path / "lora", *good())
    damage(folder)
    with pytest.raises(error, match=words):
        read(folder, base)


def test_modules_that_the_base_has_not_are_no_promise(base: Checkpoint, tmp_path: Path) -> None:
    config, tensors = good()
    config["target_modules"] = ["q_proj", "v_proj", "v_proj", "query_key_value", "c_attn"]
    assert len(read(write(tmp_path / "lora", config, tensors), base).deltas) == 4


def test_tensors_win_over_target_modules(base: Checkpoint, tmp_path: Path) -> None:
    config, tensors = good()
    for listed in (["q_proj"], "all-linear", None):
        config["target_modules"] = listed
        assert len(read(write(tmp_path / "lora", config, tensors), base).deltas) == 4
