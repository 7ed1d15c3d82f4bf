"""adapter_config.json of PEFT: what each key means for a merge, or why it is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..checkpoint import read_json
from ..errors import BadInput, Unsupported
from .file import DOWNLOAD_AGAIN

CONFIG_FILE = "adapter_config.json"

# Read here, or without effect on the merged weights (dropout, initialization, the training run).
# fan_in_fan_out speaks of Conv1D layers; for the nn.Linear of every family here peft ignores it.
_UNDERSTOOD = frozenset(
    """peft_type task_type r lora_alpha use_rslora rank_pattern alpha_pattern use_dora lora_bias
    bias target_modules exclude_modules layers_to_transform layers_pattern modules_to_save
    trainable_token_indices ensure_weight_tying init_lora_weights base_model_name_or_path revision
    quantization_config fan_in_fan_out lora_dropout inference_mode auto_mapping peft_version
    megatron_core merge_weights qalora_group_size runtime_config eva_config corda_config
    lora_ga_config loftq_config velora_config""".split()
)
_REFUSED = {
    "layer_replication": "it repeats layers, so the merged model has another architecture",
    "alora_invocation_tokens": "it acts on tokens after an invocation only, no weight can hold it",
    "arrow_config": "it routes each token to an expert, no single weight can hold it",
    "use_qalora": "it pools the inputs of a quantized base",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it truncates the base weights before the update",
    "monteclora_config": "it samples around the update",
    "target_parameters": "it names parameters of fused experts",
    "megatron_config": "it names the parallel layers of Megatron",
    "enable_lora": "it is the fused LoRA of an early peft",
}
_LANGUAGE, _REWARD = "CAUSAL_LM", "SEQ_CLS"
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """The base an adapter was trained on, as far as its folder says.

    Attributes:
        base: hub id, or the last component of a local path; None if not recorded.
        revision: of the hub repository.
        quantization: the base's quantization_config (QLoRA); None if not recorded, which does not
            mean full precision.
        found_in: file and key that hold `quantization`.
    """

    base: str | None = None
    revision: str | None = None
    quantization: Mapping[str, Any] | None = None
    found_in: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The keys of adapter_config.json that decide about weights.

    Modules are named as in the base model, such as `model.layers.0.self_attn.q_proj`.
    """

    raw: Mapping[str, Any]
    trained_on: TrainedOn
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    dora: bool
    lora_bias: bool
    bias: str
    saved: tuple[str, ...]
    ensure_tying: bool

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns applied."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether modules_to_save covers it: peft compares with `endswith`, on every ancestor."""
        parts = module.split(".")
        paths = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return any(path.endswith(saved) for path in paths for saved in self.saved)

    def targets(self, module: str) -> bool:
        """Whether peft would adapt this module of the base.

        False where that cannot be told from names ("all-linear").
        """
        wanted = self.raw.get("target_modules") or ()
        if wanted == "all-linear" or self.saves(module):
            return False
        if _named(module, self.raw.get("exclude_modules") or ()) or not _named(module, wanted):
            return False
        return isinstance(wanted, str) or self._transforms(module)

    def _transforms(self, module: str) -> bool:
        layers, patterns = self.raw.get("layers_to_transform"), self.raw.get("layers_pattern")
        if layers is None or layers == []:
            return True
        names = [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.]*"]
        # The first name that matches decides, by the first number after it, as in peft.
        found = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module) for name in names)
        layer = next((int(match[1]) for match in found if match), None)
        return layer in ([layers] if isinstance(layers, int) else layers)

    def token_indices(self) -> dict[str, list[int]]:
        """{suffix of a table's module: token ids} of trainable_token_indices."""
        indices = self.raw.get("trainable_token_indices") or {}
        tables = {"embed_tokens": indices} if isinstance(indices, list) else indices
        if not isinstance(tables, dict) or not all(
            isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
            for ids in tables.values()
        ):
            raise _bad("trainable_token_indices", indices, "lists of token ids")
        return {name: ids for name, ids in tables.items() if ids}


def _named(module: str, names: str | Iterable[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(patterns: Iterable[str], module: str) -> str:
    """peft's `utils.other.get_pattern_key`: the first pattern that matches the end of the path."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def trains_reward(folder: Path) -> bool:
    """Whether a folder's adapter makes a reward model of a causal language model.

    Raises:
        BadInput: adapter_config.json is malformed.
    """
    path = folder / CONFIG_FILE
    return path.is_file() and read_json(path).get("task_type") == _REWARD


def read_config(folder: Path, reward: bool = False) -> AdapterConfig:
    """Read adapter_config.json of an adapter for a language model, or for a reward model.

    Raises:
        BadInput: it is missing, a Git-LFS pointer, not JSON, or a value has the wrong type.
        Unsupported: another kind of adapter than LoRA, for another task, or a key that is not
            understood.
    """
    raw = read_json(folder / CONFIG_FILE)
    _refuse_other_kinds(raw)
    _refuse_other_tasks(raw, reward)
    _refuse_keys(raw)
    config = AdapterConfig(
        raw=raw,
        trained_on=_trained_on(raw, folder),
        rank=_rank("r", raw.get("r", 8)),
        alpha=_alpha("lora_alpha", raw.get("lora_alpha", 8)),
        rslora=_flag(raw, "use_rslora"),
        rank_pattern={
            key: _rank(f"rank_pattern.{key}", value)
            for key, value in _patterns(raw, "rank_pattern").items()
        },
        alpha_pattern={
            key: _alpha(f"alpha_pattern.{key}", value)
            for key, value in _patterns(raw, "alpha_pattern").items()
        },
        dora=_flag(raw, "use_dora"),
        lora_bias=_flag(raw, "lora_bias"),
        bias=_bias(raw),
        saved=tuple(_names(raw, "modules_to_save")),
        ensure_tying=_flag(raw, "ensure_weight_tying"),
    )
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        _names(raw, key, or_pattern=True)
    _check_layers(raw.get("layers_to_transform"))
    return config


def _refuse_other_kinds(raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        raise BadInput(
            f"{CONFIG_FILE}: peft_type is missing",
            "it is not the config of a peft adapter",
            "save the adapter with peft's save_pretrained",
        )
    if kind != "LORA":
        raise Unsupported(
            f"adapters of type {kind} are not supported",
            "slimport merges LoRA, rsLoRA and DoRA (peft_type LORA)",
            "merge it with peft's merge_and_unload and export the merged model",
        )


def _refuse_other_tasks(raw: Mapping[str, Any], reward: bool) -> None:
    task = raw.get("task_type")
    if reward and task != _REWARD:
        raise Unsupported(
            f"an adapter for the task {task} cannot be applied to a reward model",
            f"a reward model scores texts, and its adapters have the task_type {_REWARD}",
            "export the language model and its adapters by themselves",
        )
    if not reward and task not in (None, _LANGUAGE):
        reward_model = " (a reward model or classifier)" if task == _REWARD else ""
        raise Unsupported(
            f"an adapter for the task {task}{reward_model} cannot be exported as a language model",
            "only adapters of causal language models generate text",
            f"use an adapter trained with task_type {_LANGUAGE}",
        )


def _refuse_keys(raw: Mapping[str, Any]) -> None:
    for key, value in raw.items():
        if key in _UNDERSTOOD or value is None or value is False or value in ("", [], {}):
            continue
        raise Unsupported(
            f"{CONFIG_FILE}: {key} = {_short(value)} is not supported",
            _REFUSED.get(key, "it may change the update, and nothing is ignored silently"),
            "merge the adapter with peft's merge_and_unload and export the merged model"
            if key in _REFUSED
            else f"remove {key} from {CONFIG_FILE} if the update does not depend on it",
        )
    start = str(raw.get("init_lora_weights") or "").lower()
    if start.startswith(_MOVES_THE_BASE):
        raise Unsupported(
            f"{CONFIG_FILE}: init_lora_weights = {start} changes the base weights",
            "the adapter fits the changed base, not the one given",
            "save it as plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


def _trained_on(raw: Mapping[str, Any], folder: Path) -> TrainedOn:
    quantization, found_in = raw.get("quantization_config"), CONFIG_FILE
    if not quantization and (folder / "config.json").is_file():
        found_in = "config.json"
        quantization = read_json(folder / found_in).get("quantization_config")
    if not quantization:
        quantization, where = None, None
    else:
        where = f"{found_in}: quantization_config"
    base = raw.get("base_model_name_or_path")
    revision = raw.get("revision")
    return TrainedOn(_base_name(base) if base else None, revision, quantization, where)


def _base_name(written: str) -> str:
    """A hub id as it is; of a path only its last component: no local path reaches a manifest."""
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", written):
        return written
    return PurePosixPath(PureWindowsPath(written).as_posix()).name


def _patterns(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise _bad(key, patterns, "an object")
    for pattern in patterns:
        _compile(key, pattern)
    return patterns


def _names(raw: Mapping[str, Any], key: str, or_pattern: bool = False) -> list[str]:
    names = raw.get(key) or []
    if or_pattern and isinstance(names, str):
        _compile(key, names)
    elif not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _bad(key, names, "a list of module names")
    return names if isinstance(names, list) else []


def _check_layers(layers: Any) -> None:
    listed = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(layer) is int for layer in listed):
        raise _bad("layers_to_transform", layers, "layer numbers")


def _compile(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise _bad(key, pattern, f"a regular expression ({error})") from error


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _bad(key, value, "a positive whole number")
    return value


def _alpha(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(key, value, "a finite number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if not isinstance(value, bool):
        raise _bad(key, value, "true or false")
    return value


def _bias(raw: Mapping[str, Any]) -> str:
    bias = raw.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise _bad("bias", bias, "none, all or lora_only")
    return str(bias)


def _bad(key: str, value: Any, wanted: str) -> BadInput:
    return BadInput(
        f"{CONFIG_FILE}: {key} = {_short(value)}", f"it must be {wanted}", DOWNLOAD_AGAIN
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
