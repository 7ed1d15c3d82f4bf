"""slimport.toml: every key is understood or refused with its path."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from slimport.errors import UsageError
from slimport.recipe import Recipe, from_environment, load, parse_adapter, template
from slimport.settings import format_size, parse_size

FULL = """
model = "model"
revision = "abc"
name = "assistant"
version = "1.2"
targets = ["android", "mine.toml"]
container = "gguf"
output = "out"
adapter_mode = "separate"
[adapters]
support = "lora"
style = { path = "lora", scale = 0.5 }
[quantize]
preset = "int8"
method = "rtn"
search = false
calibration_windows = 7
calibration_length = 9
[quantize.patterns]
"model.layers.0.*" = "int8-row"
[texts]
calibration = "a.txt"
eval = "a.txt"
[validate]
windows = 3
window_length = 64
[budgets]
download_bytes = "1.4 GB"
memory_bytes = "1.4 GiB"
top1 = 0.9
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model", "lora"):
        (tmp_path / name).mkdir()
    for name in ("a.txt", "mine.toml"):
        (tmp_path / name).write_text("")
    return tmp_path


def recipe(folder: Path, text: str) -> Recipe:
    (folder / "slimport.toml").write_text(text)
    return load(folder / "slimport.toml")


def test_every_key(folder: Path) -> None:
    read = recipe(folder, FULL)
    assert read.model == str(folder / "model") and read.model_is_local
    assert read.targets == ("android", str(folder / "mine.toml"))
    assert read.output == folder / "out"
    assert [(a.name, a.path, a.scale) for a in read.adapters] == [
        ("support", folder / "lora", 1.0),
        ("style", folder / "lora", 0.5),
    ]
    assert (read.quantize.search, read.quantize.calibration_windows) == (False, 7)
    assert read.quantize.patterns == {"model.layers.0.*": "int8-row"}
    assert read.texts.calibration == folder / "a.txt" and read.texts.eval_ood is None
    assert read.budgets == {
        "download_bytes": 1_400_000_000,
        "memory_bytes": 1_503_238_553,
        "top1": 0.9,
    }


def test_to_json_holds_no_local_path(folder: Path) -> None:
    words = json.dumps(recipe(folder, FULL).to_json())
    assert str(folder) not in words and "/" not in words
    assert json.loads(words)["texts"] == {"calibration": "a.txt", "eval": "a.txt", "eval_ood": None}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('modell = "x"', "slimport.toml: modell is not a key"),
        ('[quantize]\npresett = "int4"', "slimport.toml: quantize.presett is not a key"),
        ('[adapters]\na = {path = "lora", scal = 1}', "slimport.toml: adapters.a.scal is not a"),
        ("[budgets]\nsize = 3", "slimport.toml: budgets.size is not a key"),
        ("model = 3", "slimport.toml: model is 3"),
        ('model = ""', "slimport.toml: model is ''"),
        ('model = "./absent"', "slimport.toml: model: ./absent does not exist"),
        ('model = "no such thing"', "slimport.toml: model is 'no such thing'"),
        ('targets = "android"', "slimport.toml: targets is 'android'"),
        ("targets = []", "slimport.toml: targets is []"),
        ('adapter_mode = "both"', "slimport.toml: adapter_mode is 'both'"),
        ('adapters = "lora"', "slimport.toml: adapters is 'lora'"),
        ('[adapters]\na = "absent"', "slimport.toml: adapters.a.path: absent does not exist"),
        ("[adapters]\na = {scale = 1.0}", "slimport.toml: adapters.a is {"),
        ('[adapters]\n"../a" = "lora"', "slimport.toml: adapters.../a is '../a'"),
        ("quantize = 4", "slimport.toml: quantize is 4"),
        ("[quantize]\nsearch = 1", "slimport.toml: quantize.search is 1"),
        ("[quantize]\ncalibration_windows = 0", "quantize.calibration_windows is 0"),
        ("[quantize]\ncalibration_windows = true", "quantize.calibration_windows is True"),
        ("[quantize.patterns]\na = 4", "slimport.toml: quantize.patterns.a is 4"),
        ('[texts]\neval = "b.txt"', "slimport.toml: texts.eval: b.txt does not exist"),
        ("[budgets]\ntop1 = 90", "slimport.toml: budgets.top1 is 90"),
        ("[budgets]\nkl_mean = nan", "slimport.toml: budgets.kl_mean is nan"),
        ('[budgets]\nmodel_bytes = "4 GBit"', "slimport.toml: budgets.model_bytes is '4 GBit'"),
        ("model = ", "slimport.toml is not TOML"),
    ],
)
def test_refused_with_the_path_to_the_key(folder: Path, text: str, where: str) -> None:
    with pytest.raises(UsageError) as raised:
        recipe(folder, text)
    assert where in raised.value.what
    assert raised.value.exit_code == 2


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "slimport.toml")


def test_flags_over_environment_over_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "lora")
    environ = {
        "SLIMPORT_PRESET": "int4",
        "SLIMPORT_METHOD": "gptq",
        "SLIMPORT_TARGETS": "android, galaxy-s24",
        "SLIMPORT_WINDOWS": "5",
        "SLIMPORT_SEARCH": "true",
        "PATH": "/bin",
    }
    read = recipe(folder, FULL).override(**from_environment(environ))
    read = read.override(method="rtn", preset=None, eval="../a.txt", patterns={"b": "float16"})
    assert (read.quantize.preset, read.quantize.method) == ("int4", "rtn")
    assert read.targets == ("android", "galaxy-s24")
    assert (read.validate.windows, read.validate.window_length) == (5, 64)
    assert read.quantize.search is True
    assert read.texts.eval is not None and read.texts.eval.resolve() == folder / "a.txt"
    assert read.quantize.patterns == {"model.layers.0.*": "int8-row", "b": "float16"}


def test_override_takes_paths(folder: Path) -> None:
    read = Recipe().override(model=folder / "model", output=folder / "x")
    assert (read.model, read.output) == (str(folder / "model"), folder / "x")


def test_override_refuses_unknown_names() -> None:
    with pytest.raises(UsageError, match="--presett"):
        Recipe().override(presett="int4")


@pytest.mark.parametrize(
    "environ",
    [
        {"SLIMPORT_PRESETT": "x"},
        {"SLIMPORT_ADAPTERS": "a=b"},
        {"SLIMPORT_WINDOWS": "many"},
        {"SLIMPORT_CACHE": "/tmp"},  # there is no cache yet
    ],
)
def test_environment_is_refused_by_its_variable(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(environ))):
        from_environment(environ)


def test_adapters_of_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given = parse_adapter("support=lora") | parse_adapter("style=./lora:0.5")
    read = Recipe().override(adapters=given)
    assert [(a.name, a.scale) for a in read.adapters] == [("support", 1.0), ("style", 0.5)]
    for words in ("lora", "=lora", "a="):
        with pytest.raises(UsageError, match="--adapter"):
            parse_adapter(words)


def test_template_loads_and_its_comments_are_the_defaults(folder: Path) -> None:
    assert recipe(folder, template()) == Recipe(
        model="Qwen/Qwen2.5-0.5B-Instruct", targets=("android",), output=folder / "dist"
    )
    # every commented key, taken in, is one that the reader knows
    text = re.sub(r"(?m)^# (?=\[|[\"\w.*]+ =)", "", template())
    for path in ("adapters/support", "adapters/style", "texts"):
        (folder / path).mkdir(parents=True)
    for name in ("train", "held_out", "out_of_distribution"):
        (folder / "texts" / f"{name}.txt").write_text("")
    (folder / "imatrix.gguf").write_text("")
    full = recipe(folder, text)
    assert full.quantize.imatrix == folder / "imatrix.gguf"
    assert full.quantize.patterns == {"model.layers.0.*": "int8-row"}
    assert full.quantize == replace(
        Recipe().quantize, patterns=full.quantize.patterns, imatrix=full.quantize.imatrix
    )
    assert replace(full.validate, prompts=()) == Recipe().validate
    assert set(tomllib.loads(text)) >= {"adapters", "quantize", "texts", "validate", "budgets"}


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("512 B", 512),
        ("1.4 GB", 1_400_000_000),
        ("1.4GiB", 1_503_238_553),
        ("10 kB", 10_000),
        ("16 KiB", 16384),
        ("0.1 MB", 100_000),
    ],
)
def test_sizes(words: str, count: int) -> None:
    assert parse_size(words) == count


@pytest.mark.parametrize("words", ["", "4", "4 G", "-4 GB", "4 XB", "1,4 GB", "0 B"])
def test_no_sizes(words: str) -> None:
    if words == "0 B":
        assert parse_size(words) == 0
        return
    with pytest.raises(UsageError):
        parse_size(words)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (99_960, "100 kB"),
        (2_345_678, "2.35 MB"),
        (12_345_678, "12.3 MB"),
        (1_400_000_000, "1.40 GB"),
        (5 * 10**12, "5000 GB"),
    ],
)
def test_sizes_in_words(count: int, words: str) -> None:
    assert format_size(count) == words
