"""Separate adapters in both containers of Core ML: functions over the weights of one base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimport.adapters.adapter import Adapter
from slimport.adapters.lora import read_adapter
from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, Unsupported, ValidationFailed
from slimport.export import coreml, coreml_ane
from slimport.export.container import Deployment, Separate
from slimport.export.coreml.adapter import factors, refuse_same_names
from slimport.export.coreml.package import paths
from slimport.export.coreml.proto import messages
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import coreml as runtime

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables, rightly

SCALES = {"tone": 0.5, "b-c": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "tone": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 12},
    "b-c": {"target_modules": ["o_proj", "gate_proj"], "r": 3, "lora_alpha": 3},
}
ROLES = {"coreml": ("",), "coreml-ane": ("decode_", "prefill_")}
PLAIN = {"coreml": {"main"}, "coreml-ane": {"decode", "prefill"}}


@dataclasses.dataclass(frozen=True)
class Toned:
    """A base in a container with two adapters, beside peft."""

    container: ModuleType
    model: Any
    base: Any
    adapters: Mapping[str, Adapter]
    oracles: Mapping[str, Any]
    file: Path
    written: Mapping[str, Path]

    @property
    def roles(self) -> tuple[str, ...]:
        return ROLES[self.container.NAME]

    @property
    def deployment(self) -> Deployment:
        deployment: Deployment = self.base.deployment
        return deployment


@pytest.fixture(scope="module")
def trained(
    tiny_llama: Path, train_adapter: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Any]]:
    """{name: (its folder, the peft model)}"""
    folder = tmp_path_factory.mktemp("trained")
    return {
        name: (folder / name, train_adapter(tiny_llama, folder / name, settings))
        for name, settings in SETTINGS.items()
    }


@pytest.fixture(scope="module", params=[coreml, coreml_ane], ids=["coreml", "coreml-ane"])
def toned(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    trained: dict[str, tuple[Path, Any]],
    in_memory: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Toned:
    container, folder = request.param, tmp_path_factory.mktemp("toned")
    model, base = in_memory(tiny_llama, "int8"), Checkpoint.open(tiny_llama)
    adapters = {
        name: read_adapter(path, name, base, model.decoder) for name, (path, _) in trained.items()
    }
    held = tuple(Separate(adapters[name], SCALES[name]) for name in adapters)
    given = {"tokenizer": Tokenizer.open(tiny_llama), "deployment": Deployment(90, adapters=held)}
    bound = model.base(**given)
    for each in adapters.values():
        container.refuse_adapter(each)
    (folder / "adapters").mkdir()
    file, *_ = container.write(model, given["tokenizer"], folder, given["deployment"])
    written = {
        name: container.write_adapter(each, bound, folder / "adapters", SCALES[name])
        for name, each in adapters.items()
    }
    oracles = {name: oracle for name, (_, oracle) in trained.items()}
    return Toned(container, model, bound, adapters, oracles, file, written)


@pytest.fixture
def here(jobs_at_hand: Any) -> Iterator[None]:
    """Run packages in this process."""
    with jobs_at_hand("coreml"):
        yield


def functions_of(file: Path) -> Any:
    return messages("Model").Model.FromString(file.read_bytes()).mlProgram.functions


def constants(function: Any) -> dict[str, int]:
    """{name: offset} of those that lie in the weight file by themselves."""
    block = function.block_specializations[function.opset]
    return {
        each.outputs[0].name: each.attributes["val"].blobFileValue.offset
        for each in block.operations
        if each.type == "const"
        and each.attributes["val"].WhichOneof("value") == "blobFileValue"
    }  # fmt: skip


def packed(function: Any) -> dict[str, tuple[int, ...]]:
    """{name: offsets} of constants that the device makes of constants."""
    block = function.block_specializations[function.opset]
    return {
        each.outputs[0].name: tuple(
            each.inputs[key].arguments[0].value.blobFileValue.offset for key in sorted(each.inputs)
        )
        for each in block.operations
        if each.type.startswith("constexpr_")
    }


def test_each_adapter_has_functions_over_the_same_weights(toned: Toned) -> None:
    functions = functions_of(toned.file)
    names = {f"{role}with_{name}" for role in toned.roles for name in ("tone", "b_c")}
    assert set(functions) == names | PLAIN[toned.container.NAME]
    plain = functions[min(PLAIN[toned.container.NAME])]
    for name in names:
        assert packed(functions[name]) == packed(plain) and len(packed(plain)) >= 15
        more = constants(functions[name]).items() - constants(plain).items()
        assert constants(plain).items() <= constants(functions[name]).items()
        count = {"tone": 3, "b_c": 2}[name.rpartition("with_")[2]]
        assert len(more) == 2 * 2 * count  # layers, factors
    model = messages("Model").Model.FromString(toned.file.read_bytes())
    assert model.description.defaultFunctionName in PLAIN[toned.container.NAME]


def test_the_file_grows_by_the_factors(toned: Toned, tmp_path: Path) -> None:
    """Of ranks 4 and 3, in float16, each at a multiple of 64 behind its record."""
    alone = dataclasses.replace(toned.deployment, adapters=())
    toned.container.write(toned.model, toned.base.tokenizer, tmp_path, alone)
    shapes = [(4, 64), (64, 4), (4, 64), (32, 4), (4, 96), (64, 4)]
    shapes += [(3, 64), (64, 3), (3, 64), (96, 3)]
    grown = 2 * sum(64 + -(-2 * rows * columns // 64) * 64 for rows, columns in shapes)
    weights = paths().weights
    folder = toned.file.parents[3]
    assert (folder / weights).stat().st_size - (tmp_path / weights).stat().st_size == grown
    given = (toned.model.decoder, toned.model.plan, toned.base.tokenizer, toned.model.name)
    predicted = toned.container.predict(*given, toned.deployment)
    assert predicted == {name: (folder / name).stat().st_size for name in predicted}
    assert weights in predicted and len(predicted) == 6
    for name, each in toned.adapters.items():
        size = (folder / "adapters" / f"{name}.json").stat().st_size
        assert toned.container.predict_adapter(each, toned.base) == {f"{name}.json": size}


def test_codes_and_factors_are_read_back(toned: Toned) -> None:
    found = toned.container.check(toned.model, toned.file.parents[3])
    assert found.weights_digest == toned.model.weights_digest
    for name, each in toned.adapters.items():
        toned.container.check_adapter(toned.written[name], each, toned.base, SCALES[name])
        with pytest.raises(ValidationFailed, match=f"{name}.json does not hold"):
            toned.container.check_adapter(toned.written[name], each, toned.base, 2.0)


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half().float()


@contextmanager
def constants_in_half(model: Any) -> Iterator[None]:
    """Tables of ropes and the epsilon of norms, as the Neural Engine has them."""
    norms = [each for each in model.modules() if hasattr(each, "variance_epsilon")]
    kept = norms[0].variance_epsilon
    hook = model.model.rotary_emb.register_forward_hook(
        lambda module, given, made: tuple(map(half, made))
    )
    for norm in norms:
        norm.variance_epsilon = float(np.float16(kept))
    yield
    for norm in norms:
        norm.variance_epsilon = kept
    hook.remove()


def adapted_logits(toned: Toned, name: str | None, tokens: Any, tiny: Path) -> Any:
    """By transformers and peft: the codes, and constants in float16 where packages have them so."""
    narrow = toned.container is coreml_ane
    state = {key: torch.from_numpy(np.array(toned.model.rows(key))) for key in toned.model.tensors}
    if narrow:
        state |= {key: half(value) for key, value in state.items() if value.dim() == 1}
    if name is None:
        model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    else:
        model = toned.oracles[name]
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    inner = model if name is None else model.get_base_model()
    scalings = []
    with torch.no_grad():
        for key, parameter in inner.named_parameters():
            plain = key.replace(".base_layer", "")
            if plain in state:
                parameter.copy_(state[plain])
        for module in inner.modules():
            if hasattr(module, "lora_A"):
                (key,) = module.scaling
                scalings.append((module, key, module.scaling[key]))
                factor = module.scaling[key] * SCALES[name or ""]
                module.lora_A[key].weight.copy_(half(module.lora_A[key].weight))
                module.lora_B[key].weight.copy_(half(factor * module.lora_B[key].weight))
                module.scaling[key] = 1.0
    with constants_in_half(inner) if narrow else nullcontext(), torch.inference_mode():
        found = model(torch.from_numpy(tokens).long()).logits.numpy()
    model.load_state_dict(kept)
    for module, key, value in scalings:
        module.scaling[key] = value
    return found


def test_logits_are_those_of_peft(
    toned: Toned, here: None, tiny_llama: Path, tmp_path: Path
) -> None:
    """Once each, and the base without them; to 3e-5: measured were 1e-5."""
    tokens = np.random.default_rng(2).integers(0, 400, (2, 75), dtype=np.int32)
    seen = {}
    for name in (None, *SCALES):
        adapter = toned.written[name] if name else None
        bound = runtime.exact_logits(toned.file, tokens, tmp_path / "o.npy", adapter=adapter)
        assert bound == (runtime.ROUNDED if name else runtime.SAME_MODEL)
        seen[name] = np.load(tmp_path / "o.npy")
        expected = adapted_logits(toned, name, tokens, tiny_llama)
        assert np.abs(seen[name] - expected).max() < 3e-5
    assert np.abs(seen["tone"] - seen[None]).max() > 0.5 < np.abs(seen["b-c"] - seen[None]).max()
    runtime.logits(toned.file, tokens[:, :9], tmp_path / "o.npy", adapter=toned.written["tone"])
    assert np.abs(np.load(tmp_path / "o.npy") - seen["tone"][:, :9]).max() < 0.1
    prompt = [tokens[0, :9].tolist()]
    (plain,) = runtime.generate(toned.file, prompt, 12)
    (other,) = runtime.generate(toned.file, prompt, 12, adapter=toned.written["tone"])
    assert plain.tokens != other.tokens


def test_an_adapter_of_another_base_is_refused(toned: Toned, tmp_path: Path) -> None:
    digest = toned.model.weights_digest
    tone = toned.written["tone"]
    toned.container.refuse_foreign_adapter(tone, digest)
    with pytest.raises(BadInput, match=r"tone\.json is not an adapter of this base") as failure:
        toned.container.refuse_foreign_adapter(tone, "sha256:" + "1" * 64)
    assert failure.value.exit_code == 7 and digest in failure.value.why
    for content in (b"", b"\xff", b"[]", b'{"schema": "other"}', b'{"schema": 3}'):
        (tmp_path / "tone.json").write_bytes(content)
        with pytest.raises(BadInput, match=r"tone\.json is not an adapter of this base"):
            toned.container.refuse_foreign_adapter(tmp_path / "tone.json", digest)
    foreign = toned.model.base("sha256:" + "1" * 64, tokenizer=toned.base.tokenizer)
    with pytest.raises(ValidationFailed) as other:
        toned.container.check_adapter(tone, toned.adapters["tone"], foreign, 0.5)
    assert other.value.why == "it is described otherwise"


def copy_of(toned: Toned, folder: Path) -> tuple[Path, Path]:
    """A copy of a package with an adapter's file: the model's file, and that."""
    copy = shutil.copytree(toned.file.parents[3], folder / "copy")
    return copy / paths().model, copy / "adapters" / "tone.json"


@pytest.mark.parametrize("which", ["lora_a", "lora_b"])
def test_a_changed_factor_is_found(which: str, toned: Toned, tmp_path: Path) -> None:
    file, tone = copy_of(toned, tmp_path)
    made = f"with_tone_model_layers_1_mlp_down_proj_{which}"
    offset = constants(functions_of(file)[f"{toned.roles[0]}with_tone"])[made]
    weights = file.parent / "weights" / "weight.bin"
    content = bytearray(weights.read_bytes())
    content[offset + 64] ^= 1
    weights.write_bytes(bytes(content))
    toned.container.check(toned.model, weights.parents[4])  # the base is as it was
    with pytest.raises(ValidationFailed) as failure:
        toned.container.check_adapter(tone, toned.adapters["tone"], toned.base, 0.5)
    assert failure.value.why == f"{made} has other numbers"


@pytest.mark.parametrize("functions", ["one", "all"])
def test_a_factor_that_functions_lack_is_found(
    functions: str, toned: Toned, tmp_path: Path
) -> None:
    file, tone = copy_of(toned, tmp_path)
    model = messages("Model").Model.FromString(file.read_bytes())
    made = "with_tone_model_layers_0_self_attn_q_proj_lora_a"
    for role in toned.roles[:1] if functions == "one" else toned.roles:
        function = model.mlProgram.functions[f"{role}with_tone"]
        operations = function.block_specializations[function.opset].operations
        names = [each.outputs[0].name if each.outputs else "" for each in operations]
        del operations[names.index(made)]
    file.write_bytes(model.SerializeToString())
    with pytest.raises((BadInput, ValidationFailed)) as failure:
        toned.container.check_adapter(tone, toned.adapters["tone"], toned.base, 0.5)
    if functions == "one" and len(toned.roles) == 2:
        assert failure.value.why == "the functions of with_tone have different factors"
    else:
        assert failure.value.why == f"{made} is missing or left over"


def test_factors_are_scaled_once(toned: Toned) -> None:
    """b holds alpha / rank = 3, and the 0.5 of the recipe; a is as it was trained."""
    adapter = toned.adapters["tone"]
    name = "model.layers.0.self_attn.q_proj.weight"
    made = factors(Separate(adapter, 0.5), toned.model.decoder)
    found = {each.stored.name: each.values for each in made}
    assert len(found) == 12
    stem = f"with_tone/{name.removesuffix('.weight')}"
    assert np.array_equal(found[f"{stem}.lora_a"], adapter.deltas[name].a.astype(np.float16))
    expected = (adapter.deltas[name].b * np.float32(1.5)).astype(np.float16)
    assert np.array_equal(found[f"{stem}.lora_b"], expected)


def test_names_that_would_be_one_function_are_refused(toned: Toned) -> None:
    tone = toned.adapters["tone"]
    both = tuple(Separate(dataclasses.replace(tone, name=name), 1.0) for name in ("a-b", "a_b"))
    with pytest.raises(Unsupported) as failure:
        toned.container.refuse_deployment(toned.model.plan, Deployment(90, adapters=both))
    assert str(failure.value).splitlines() == [
        "two adapters would be the function with_a_b",
        "a name of Core ML has letters, digits and _ alone",
        "rename one of them: --adapter NAME=PATH",
    ]
    refuse_same_names(both[:1])


def test_adapters_of_tables_are_refused(
    toned: Toned, make_model: Any, train_adapter: Any, read_tone: Any, tmp_path: Path
) -> None:
    folder = make_model("llama", tie_word_embeddings=False)
    settings = {"target_modules": ["embed_tokens", "q_proj"], "r": 4}
    train_adapter(folder, tmp_path / "peft", settings)
    decoder = decoder_config(Checkpoint.open(folder).config)
    adapter = read_tone(folder, tmp_path / "peft", decoder)
    with pytest.raises(Unsupported) as failure:
        toned.container.refuse_adapter(adapter)
    assert "only the matrices of decoder layers" in failure.value.why
    assert failure.value.cure == "merge it: --adapter-mode merged"


def test_what_an_app_reads_of_an_adapter(toned: Toned) -> None:
    told = json.loads(toned.written["b-c"].read_text())
    assert told["function"] == "with_b_c" and told["schema"] == "slimport.coreml-adapter/1"
    words = "name target and_judged size judged_rows minimum_build minimum_reason judged context"
    fields = dict.fromkeys(f"{words} sampling stops notes kind".split(), "x")
    page = toned.container.readme(fields, ["adapters/b-c.json"])
    assert "`adapters/b-c.json` | the function of an adapter" in page and "functionName" in page
    assert ("behind `decode_` or `prefill_`" in page) == (toned.container is coreml_ane)
    assert "## Adapters" not in toned.container.readme(fields, [])


@pytest.mark.parametrize("name", ["qwen2", "phi3", "smollm3"])
def test_families_take_adapters(
    name: str,
    make_model: Any,
    in_memory: Any,
    train_adapter: Any,
    here: None,
    tmp_path: Path,
) -> None:
    """Biases beside updates; matrices that are one; layers without a rope."""
    folder = make_model(name)
    modules = ["qkv_proj", "gate_up_proj"] if name == "phi3" else ["q_proj", "k_proj", "up_proj"]
    oracle = train_adapter(folder, tmp_path / "peft", {"target_modules": modules, "r": 4})
    model = in_memory(folder, patterns={"*": "float16"})
    for key, values in model.tensors.items():
        model.tensors[key] = values.astype(np.float16).astype(np.float32)
    adapter = read_adapter(tmp_path / "peft", "tone", Checkpoint.open(folder), model.decoder)
    deployment = Deployment(90, adapters=(Separate(adapter, 1.0),))
    tokens = np.random.default_rng(2).integers(0, 400, (1, 70), dtype=np.int32)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(half(parameter))

    def expected() -> Any:
        with torch.inference_mode():
            return oracle(torch.from_numpy(tokens).long()).logits.numpy()

    with oracle.disable_adapter():
        plain = expected()
    assert np.abs(expected() - plain).max() > 0.5
    for container in (coreml, coreml_ane):
        target = tmp_path / container.NAME
        (target / "adapters").mkdir(parents=True)
        file, *_ = container.write(model, Tokenizer.open(folder), target, deployment)
        base = model.base(tokenizer=Tokenizer.open(folder), deployment=deployment)
        tone = container.write_adapter(adapter, base, target / "adapters")
        container.check(model, target)
        container.check_adapter(tone, adapter, base)
        runtime.exact_logits(file, tokens, tmp_path / "o.npy", adapter=tone)
        inner = oracle.get_base_model()
        with constants_in_half(inner) if container is coreml_ane else nullcontext():
            difference = np.abs(np.load(tmp_path / "o.npy") - expected()).max()
        assert difference < 3e-5
