"""slimport.toml as frozen dataclasses; an unknown key or a wrong value is refused with its path.

Precedence: flags > environment (SLIMPORT_...) > slimport.toml > target profile. The first three
meet here: `load(path).override(**from_environment(os.environ)).override(**flags)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import UsageError
from .settings import (
    METRICS,
    Place,
    Reader,
    amount,
    count,
    limit_of,
    names,
    number,
    read_table,
    read_toml,
    switch,
    text,
    whole,
    wrong,
)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A PEFT folder and the factor on its delta."""

    name: str
    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Quantize:
    """How weights become codes.

    Attributes:
        preset, method: names that quantize/plan.py and quantize/methods know.
        search: whether RTN searches its scales.
        imatrix: an importance matrix for method imatrix, in place of calibration text.
        patterns: fnmatch pattern on the weight name -> grid name or "float16".
        calibration_windows, calibration_length: windows of calibration text, tokens in each.
    """

    preset: str = "int4"
    method: str = "gptq"
    search: bool = True
    patterns: Mapping[str, str] = field(default_factory=dict)
    calibration_windows: int = 64
    calibration_length: int = 512
    imatrix: Path | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """What a search for the best grids has to keep; None: not limited. Without a limit, no search.

    Attributes:
        device_bytes: everything that goes onto the device.
        memory_bytes: at the target's context.
        kl_mean: nats per token; the smallest bundle within it is searched for.
        grids: to choose from; none: all that every target's container holds.
        sensitivities: a file that keeps what was measured; read if it is there, else written.
    """

    device_bytes: int | None = None
    memory_bytes: int | None = None
    kl_mean: float | None = None
    grids: tuple[str, ...] = ()
    sensitivities: Path | None = None

    @property
    def is_wanted(self) -> bool:
        return (self.device_bytes, self.memory_bytes, self.kl_mean) != (None, None, None)

    @property
    def limits(self) -> dict[str, float]:
        """By the names of the metrics that a budget bounds."""
        given = {name: getattr(self, name) for name in ("device_bytes", "memory_bytes", "kl_mean")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Qat:
    """Quantization-aware training. Rates are in units of a code's step, whatever the model.

    Attributes:
        steps: of the optimizer, at most.
        batch, train_length: windows of text in a step, tokens in each.
        learning_rate, scale_learning_rate: of weights and of their scales.
        norm_learning_rate: of norms and biases; 0: they stay as they are.
        hidden_weight: of the distance between hidden states, beside KL on logits; 0: none.
        train_only: "weights": codes and scales; or "lora": an adapter over codes that stay.
        train_tables: whether embedding and head train too.
        lora_rank, lora_learning_rate: of that adapter.
        evaluate_every: steps between two measurements on held-out text; each is saved.
        held_out_windows: windows of the end of the text, kept for them.
        patience: measurements without a gain after which training stops.
        seed: of the order of windows.
        recompute: whether layers are computed again in the backward pass: less memory, a third
            more time.
        shard: whether the processes of torchrun share the parameters (FSDP), or each has them all.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
    """

    steps: int = 400
    batch: int = 8
    train_length: int = 256
    learning_rate: float = 0.02
    scale_learning_rate: float = 0.002
    norm_learning_rate: float = 0.0
    hidden_weight: float = 0.0
    train_only: str = "weights"
    train_tables: bool = False
    lora_rank: int = 16
    lora_learning_rate: float = 0.001
    evaluate_every: int = 50
    held_out_windows: int = 16
    patience: int = 4
    seed: int = 0
    recompute: bool = False
    shard: bool = False
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Texts:
    """Plain text or JSONL files; None: sampled from the full-precision model.

    `train` alone is never sampled: quantization-aware training needs a text.
    """

    train: Path | None = None
    calibration: Path | None = None
    eval: Path | None = None
    eval_ood: Path | None = None


@dataclass(frozen=True, slots=True)
class Validate:
    """How much text the artifact is judged on: windows, and tokens in each.

    Attributes:
        prompts: what a user would ask; each is answered greedily by reference and artifact.
        pairs: how many pairs a reward model is judged on, at most.
    """

    windows: int = 64
    window_length: int = 512
    prompts: tuple[str, ...] = ()
    pairs: int = 200


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything an export needs to know.

    Attributes:
        source: the file's name as messages show it.
        model: the absolute path of a folder, or a hub id.
        output: folder that receives one bundle per target.
        pre: llama.cpp's pre-tokenizer, where it cannot be derived from tokenizer.json.
        targets: profile names, or absolute paths of TOML files.
        budgets: metric -> limit, in place of the target's.
    """

    source: str = "slimport.toml"
    model: str | None = None
    revision: str | None = None
    name: str | None = None
    version: str | None = None
    pre: str | None = None
    output: Path = Path("dist")
    targets: tuple[str, ...] = ()
    container: str | None = None
    adapters: tuple[AdapterSource, ...] = ()
    adapter_mode: str = "merged"
    quantize: Quantize = field(default_factory=Quantize)
    fit: Fit = field(default_factory=Fit)
    qat: Qat = field(default_factory=Qat)
    texts: Texts = field(default_factory=Texts)
    validate: Validate = field(default_factory=Validate)
    budgets: Mapping[str, float] = field(default_factory=dict)

    @property
    def model_is_local(self) -> bool:
        return self.model is not None and Path(self.model).is_absolute()

    def override(self, **given: Any) -> Recipe:
        """This recipe with every value that is not None; names as in the file, sections left out.

        Relative paths are relative to the working directory. `patterns` and `budgets` are added
        to what stands, anything else takes its place; so does a calibration text that of an
        importance matrix, and the other way round.

        Raises:
            UsageError: an unknown name or a wrong value.
        """
        recipe = self
        if given.get("imatrix") is None and given.get("calibration") is not None:
            recipe = replace(recipe, quantize=replace(recipe.quantize, imatrix=None))
        elif given.get("imatrix") is not None and given.get("calibration") is None:
            recipe = replace(recipe, texts=replace(recipe.texts, calibration=None))
        for name, value in given.items():
            if value is not None:
                recipe = _with(recipe, name, value, f"--{name.replace('_', '-')}")
        return recipe

    def to_json(self) -> dict[str, Any]:
        """What the manifest records: no local paths, only the last component of each."""
        table = asdict(self)
        del table["source"], table["output"], table["qat"]  # of training: in training.json
        del table["texts"]["train"]
        return table | {
            "model": Path(self.model).name if self.model and self.model_is_local else self.model,
            "targets": [Path(target).name for target in self.targets],
            "adapters": {adapter.name: {"scale": adapter.scale} for adapter in self.adapters},
            "texts": {name: path and path.name for name, path in table["texts"].items()},
            "quantize": table["quantize"]
            | {"imatrix": self.quantize.imatrix and self.quantize.imatrix.name},
            "fit": table["fit"]
            | {"sensitivities": self.fit.sensitivities and self.fit.sensitivities.name},
        }


def load(path: Path) -> Recipe:
    """Read a recipe; paths in it are relative to its folder.

    Raises:
        UsageError: no such file, not TOML, an unknown key or a wrong value.
    """
    folder = path.absolute().parent
    table = read_toml(path)
    known = _ROOT | {name: _section(name) for name in _SECTIONS}
    found = read_table(table, known, Place(path.name, folder))
    return Recipe(source=path.name, **{"output": folder / "dist", **found})


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The SLIMPORT_ variables as arguments of `Recipe.override`; lists are split at commas.

    Raises:
        UsageError: a SLIMPORT_ variable that is no text, number, switch or list of a recipe.
    """
    given: dict[str, Any] = {}
    for variable, words in sorted(environ.items()):
        if not variable.startswith("SLIMPORT_"):
            continue
        name = variable.removeprefix("SLIMPORT_").lower()
        reader = _flat_readers().get(name)
        if reader is None or reader in _TABLES:
            raise UsageError(
                f"{variable} is not a variable that slimport knows",
                "an ignored setting would be a silent one",
                "unset it; what a variable cannot say stands in slimport.toml",
            )
        given[name] = _from_text(words, reader, variable)
    return given


def _from_text(words: str, reader: Reader, variable: str) -> Any:
    """The text of an environment variable as the TOML value that its reader expects."""
    if reader is _targets:
        return [part.strip() for part in words.split(",") if part.strip()]
    if reader is switch:
        return {"1": True, "true": True, "0": False, "false": False}.get(words.lower(), words)
    if reader is whole:
        try:
            return int(words)
        except ValueError:
            raise wrong(Place(variable, Path()), words, "a whole number above zero") from None
    if reader in (amount, count):
        try:
            return float(words) if reader is amount else int(words)
        except ValueError:
            raise wrong(Place(variable, Path()), words, "a number, 0 or more") from None
    return words


def parse_adapter(words: str) -> dict[str, Any]:
    """`NAME=PATH` or `NAME=PATH:scale` from the command line, for `override(adapters=...)`.

    Raises:
        UsageError: it has another form.
    """
    name, equals, path = words.partition("=")
    if not (name and equals and path):
        raise UsageError(
            f"--adapter {words}", "an adapter needs a name and a folder", "write NAME=PATH[:scale]"
        )
    stem, colon, scale = path.rpartition(":")
    if colon and re.fullmatch(r"-?\d+(\.\d+)?", scale):
        return {name: {"path": stem, "scale": float(scale)}}
    return {name: path}


def _path(value: Any, place: Place) -> Path:
    words = str(value) if isinstance(value, Path) else value
    try:
        return place.folder / Path(text(words, place)).expanduser()
    except RuntimeError:  # ~ of a user that is not known
        raise wrong(place, value, "a path whose home folder is known") from None


def _is_there(path: Path, value: Any, place: Place) -> bool:
    try:
        return path.exists()
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(
            f"{place.words}: {value!s:.60} cannot be looked up", why, "correct the path"
        ) from error


def _existing(value: Any, place: Place) -> Path:
    path = _path(value, place)
    if not _is_there(path, value, place):
        raise UsageError(
            f"{place.words}: {value} does not exist",
            f"it was looked for in {place.folder}",
            "correct the path",
        )
    return path


def _model(value: Any, place: Place) -> str:
    """A folder as an absolute path, or a hub id as it is."""
    words = text(str(value) if isinstance(value, Path) else value, place)
    if words.startswith((".", "/", "~")) or _is_there(place.folder / words, value, place):
        return str(_existing(words, place))
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", words, re.ASCII):
        return words
    raise wrong(place, value, "a folder that exists or a hub id such as Qwen/Qwen2.5-0.5B")


def _adapters(value: Any, place: Place) -> tuple[AdapterSource, ...]:
    if not isinstance(value, dict):
        raise wrong(place, value, "a table of names and paths")
    return tuple(_adapter(name, source, place.key(name)) for name, source in value.items())


def _adapter(name: str, source: Any, place: Place) -> AdapterSource:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise wrong(place, name, "letters, digits, dots, dashes: it becomes a file name")
    table = source if isinstance(source, dict) else {"path": source}
    found = read_table(table, {"path": _existing, "scale": number}, place)
    if "path" not in found:
        raise wrong(place, source, "a path, or a table with path and scale")
    return AdapterSource(name=name, **found)


def _texts_by_name(value: Any, place: Place) -> dict[str, str]:
    return read_table(value, dict.fromkeys(value, text) if isinstance(value, dict) else {}, place)


def _budgets(value: Any, place: Place) -> dict[str, float]:
    return read_table(value, {metric: limit_of(metric) for metric in METRICS}, place)


def _adapter_mode(value: Any, place: Place) -> str:
    if value not in ("merged", "separate"):
        raise wrong(place, value, '"merged" or "separate"')
    return str(value)


def _train_only(value: Any, place: Place) -> str:
    if value not in ("weights", "lora"):
        raise wrong(place, value, '"weights" or "lora"')
    return str(value)


def _device(value: Any, place: Place) -> str:
    if value not in ("auto", "cpu", "cuda"):
        raise wrong(place, value, '"auto", "cpu" or "cuda"')
    return str(value)


def _targets(value: Any, place: Place) -> tuple[str, ...]:
    return tuple(
        str(_existing(name, place)) if name.endswith(".toml") else name
        for name in names(value, place)
    )


_ROOT: dict[str, Reader] = {
    "model": _model,
    "revision": text,
    "name": text,
    "version": text,
    "pre": text,
    "output": _path,
    "targets": _targets,
    "container": text,
    "adapters": _adapters,
    "adapter_mode": _adapter_mode,
    "budgets": _budgets,
}
_SECTIONS: dict[str, tuple[type[Quantize | Fit | Qat | Texts | Validate], dict[str, Reader]]] = {
    "quantize": (
        Quantize,
        {
            "preset": text,
            "method": text,
            "search": switch,
            "patterns": _texts_by_name,
            "calibration_windows": whole,
            "calibration_length": whole,
            "imatrix": _existing,
        },
    ),
    "fit": (
        Fit,
        {
            "device_bytes": limit_of("device_bytes"),
            "memory_bytes": limit_of("memory_bytes"),
            "kl_mean": limit_of("kl_mean"),
            "grids": names,
            "sensitivities": _path,
        },
    ),
    "qat": (
        Qat,
        {
            "steps": whole,
            "batch": whole,
            "train_length": whole,
            "learning_rate": amount,
            "scale_learning_rate": amount,
            "norm_learning_rate": amount,
            "hidden_weight": amount,
            "train_only": _train_only,
            "train_tables": switch,
            "lora_rank": whole,
            "lora_learning_rate": amount,
            "evaluate_every": whole,
            "held_out_windows": whole,
            "patience": whole,
            "seed": count,
            "recompute": switch,
            "shard": switch,
            "device": _device,
        },
    ),
    "texts": (
        Texts,
        {"train": _existing, "calibration": _existing, "eval": _existing, "eval_ood": _existing},
    ),
    "validate": (
        Validate,
        {"windows": whole, "window_length": whole, "prompts": names, "pairs": whole},
    ),
}
_TABLES = (_adapters, _texts_by_name, _budgets)  # what an environment variable cannot say


def _section(name: str) -> Reader:
    kind, readers = _SECTIONS[name]
    return lambda value, place: kind(**read_table(value, readers, place))


def _flat_readers() -> dict[str, Reader]:
    """Every key by its own name; no name stands in two sections."""
    flat = dict(_ROOT)
    for _, readers in _SECTIONS.values():
        flat |= readers
    return flat


def _with(recipe: Recipe, name: str, value: Any, where: str) -> Recipe:
    """`recipe` with one value replaced, wherever its key stands."""
    readers = _flat_readers()
    if name not in readers:
        raise UsageError(
            f"{where} is not a key of a recipe", f"the keys are {', '.join(readers)}", "correct it"
        )
    read = readers[name](value, Place(where, Path.cwd()))
    section = next((part for part, (_, keys) in _SECTIONS.items() if name in keys), None)
    owner: Any = getattr(recipe, section) if section else recipe
    if name in ("patterns", "budgets"):
        read = {**getattr(owner, name), **read}
    changed = replace(owner, **{name: read})
    return replace(recipe, **{section: changed}) if section else changed


def template() -> str:
    """A commented slimport.toml; every commented key shows its default."""
    return _TEMPLATE


_TEMPLATE = """\
# slimport.toml: what to export, and for which devices. Paths are relative to this file.
# Precedence: flags > environment (SLIMPORT_...) > this file > target profile.

model = "Qwen/Qwen2.5-0.5B-Instruct"  # a folder, or a hub id
# revision = "main"                   # of a hub id; a commit keeps exports reproducible
# name = "assistant"                  # as the bundle calls the model
# version = "1.0.0"
# pre = "llama-bpe"                   # tokenizer.ggml.pre, where it cannot be derived
targets = ["android"]                 # `slimport targets` lists them; or the path of your own
# container = "gguf"                  # in place of the target's first choice
# output = "dist"                     # receives one bundle per target

# adapter_mode = "merged"             # or "separate": shipped beside the base
# [adapters]
# support = "adapters/support"        # a PEFT folder
# style = { path = "adapters/style", scale = 0.5 }

# [quantize]
# preset = "int4"                     # int4, int4-all, int4-signed, int8, int2, mixed; for Core ML
                                      # alone lut4, lut6; for GGUF alone llama.cpp's Q4_K_M, IQ3_M
# method = "gptq"                     # "autoround": learnt, takes hours, best at few bits; "auto":
                                      # in each layer the best; without text "rtn" or "hqq";
                                      # "imatrix": ggml's own kernels (k-means for lut4 and lut6;
                                      # without text: "kmeans")
# imatrix = "imatrix.gguf"            # for method imatrix, in place of calibration text
# search = true                       # rtn: search the scales
# calibration_windows = 64
# calibration_length = 512            # tokens in each
# [quantize.patterns]                 # weight names -> a grid, or "float16"
# "model.layers.0.*" = "int8-row"

# [fit]                               # search the grids: the least loss within these limits
# device_bytes = "900 MB"             # everything that goes onto the device
# memory_bytes = "1.2 GB"             # at the target's context
# kl_mean = 0.02                      # in place of the least loss: the smallest bundle within it
# grids = ["Q3_K", "Q4_K", "Q6_K"]    # choose among these alone
# sensitivities = "sensitivities.json"  # keeps what was measured, for the next search

# [qat]                               # `slimport qat`: training on the grid that ships
# steps = 400
# batch = 8                           # windows of text in a step
# train_length = 256                  # tokens in each
# learning_rate = 0.02                # in steps between two codes
# scale_learning_rate = 0.002         # of the scales
# norm_learning_rate = 0.0            # of norms and biases; 0: they stay as they are
# hidden_weight = 0.0                 # of hidden states, beside KL on logits
# train_only = "weights"              # or "lora": codes stay, an adapter beside them learns
# lora_rank = 16
# lora_learning_rate = 0.001
# train_tables = false                # embedding and head too
# evaluate_every = 50                 # steps between measurements on held-out text
# held_out_windows = 16               # of the end of the training text
# patience = 4                        # measurements without a gain, then it stops
# seed = 0
# recompute = false                   # less memory, a third more time
# shard = false                       # of torchrun's processes: each holds a part (FSDP)
# device = "auto"                     # a GPU if there is one; or "cpu", "cuda"

# [texts]                             # plain text or JSONL; without them the model writes its own
# train = "texts/train.txt"           # for `slimport qat`
# calibration = "texts/train.txt"
# eval = "texts/held_out.txt"
# eval_ood = "texts/out_of_distribution.txt"

# [validate]
# windows = 64
# window_length = 512                 # tokens in each
# prompts = ["Tell me a story."]      # answered by reference and artifact, for the report
# pairs = 200                         # of a reward model, judged on pairs of answers

# [budgets]                           # in place of the target's
# download_bytes = "200 MB"
# memory_bytes = "1.4 GiB"
# kl_mean = 0.1                       # nats per token, at most
# top1 = 0.85                         # share of tokens, at least
"""
