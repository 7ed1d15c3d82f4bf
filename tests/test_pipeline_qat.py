"""`slimport qat` end to end on tiny models: trained codes in bundles, resumed runs, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.quantize.store import QuantizedCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about what transformers renamed

Run = Callable[..., Any]
QAT = ["--preset", "int2", "--method", "rtn", "--steps", "36", "--batch", "4"]
QAT += ["--train-length", "32", "--evaluate-every", "12", "--learning-rate", "0.3"]


@pytest.fixture(scope="module")
def model(make_model: Run) -> Path:
    folder: Path = make_model("llama", hidden_size=64, intermediate_size=128)
    return folder


@pytest.fixture(scope="module")
def recipe(model: Path, recipe_for: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = recipe_for(tmp_path_factory.mktemp("recipe"), model)
    return folder


@pytest.fixture(scope="module")
def trained(model: Path, recipe: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint on int2-g64, by a few steps from RTN."""
    folder = tmp_path_factory.mktemp("trained") / "q"
    text = recipe.with_name("train.txt")
    done = run("qat", model, *QAT, "--train", text, "-o", folder, "--json")
    assert done.code == 0, done.err
    assert done.json["weights_digest"] == QuantizedCheckpoint.open(folder).weights_digest
    assert "step 36 of 36: loss" in done.err and "held-out KL" in done.err and "left" in done.err
    return folder


def test_training_brings_the_student_nearer_and_is_recorded(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    curve = record["curve"]
    assert [point["step"] for point in curve] == [0, 12, 24, 36]
    assert record["best"]["kl"] == min(point["kl"] for point in curve) < 0.95 * curve[0]["kl"]
    quantized = QuantizedCheckpoint.open(trained)
    quantized.verify()
    methods = {c.weight.is_table: c.method for c in quantized.plan.quantized}
    assert methods == {True: "rtn", False: "qat"}
    assert all(error > 0 for error in quantized.errors.values())
    assert not (trained.parent / f".{trained.name}.training").exists()


def test_trained_codes_ship_in_gguf_and_are_judged_in_llama_cpp(
    trained: Path, model: Path, recipe: Path, run: Run, tmp_path: Path, at_hand: None
) -> None:
    """Nothing but the folder has to be said: its plan stands in place of the recipe's int4."""
    done = run("export", "--config", recipe, "--quantized", trained, "-o", tmp_path, "--json", "-q")
    assert done.code == 0, done.err
    (found,) = done.json["bundles"]
    assert found["errors"]["runtime"]["kl_mean"] < 0.05 * found["accuracy"]["held_out"]["kl_mean"]
    manifest = json.loads((tmp_path / "pocket" / "manifest.json").read_text())
    assert manifest["weights_digest"] == QuantizedCheckpoint.open(trained).weights_digest
    assert "Q2_0" in manifest["minimum_runtime"]["reason"]
    assert (manifest["recipe"]["quantize"]["preset"], manifest["recipe"]["quantize"]["method"]) == (
        "int2",
        "qat",
    )
    record = json.loads((trained / "training.json").read_text())
    assert manifest["inputs"]["training"] == record
    assert run("verify", tmp_path / "pocket").code == 0
    again = run("validate", tmp_path / "pocket", "--config", recipe, "--json", "-q")
    assert again.code == 0, again.err
    assert again.json["accuracy"]["held_out"] == found["accuracy"]["held_out"]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--preset", "int2"], 0),
        (["--preset", "int2", "--method", "qat"], 0),
        (["--method", "gptq"], 2),
        (["--preset", "int2", "--method", "gptq"], 2),
        (["--preset", "int4"], 2),
        (["--grid", "*.down_proj.weight=int8-row"], 2),
    ],
)
def test_what_is_said_beside_the_folder_must_agree_with_it(
    flags: list[str], code: int, trained: Path, model: Path, run: Run, tmp_path: Path
) -> None:
    more = ["--target", "android", "--no-validate", "-q", "-o", tmp_path]
    done = run("export", model, "--quantized", trained, *flags, *more)
    assert done.code == code, done.err
    if code:
        assert "--quantized brings its own grids and methods" in done.err


@pytest.mark.parametrize("verb", ["export", "quantize"])
def test_method_qat_is_refused_where_nothing_trains(
    verb: str, model: Path, run: Run, tmp_path: Path
) -> None:
    target = ["--target", "android"] if verb == "export" else []
    done = run(verb, model, "--method", "qat", "-o", tmp_path / "out", *target)
    assert done.code == 2
    assert "slimport qat MODEL --train FILE -o FOLDER" in done.err


def test_a_killed_run_goes_on_to_the_same_bytes(
    trained: Path, model: Path, recipe: Path, run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped after its second evaluation, as kill -9 would: nothing cleans up but the next run."""
    from slimport.quantize.qat import state

    save, saved = state.Store.save, []

    class Killed(BaseException):
        pass

    def then_die(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        saved.append(arguments[0].step)
        if len(saved) == 2:
            raise Killed

    command = ["qat", model, *QAT, "--train", recipe.with_name("train.txt"), "-o", tmp_path / "q"]
    with monkeypatch.context() as patch:
        patch.setattr(state.Store, "save", then_die)
        with pytest.raises(Killed):
            run(*command)
    assert saved == [12, 24] and not (tmp_path / "q").exists()
    other = run(*command, "--seed", "5")
    assert other.code == 2 and "they differ in settings" in other.err
    done = run(*command)
    assert done.code == 0, done.err
    assert "step 12 of 36" not in done.err and "step 36 of 36" in done.err
    names = {path.name for path in trained.iterdir()}
    assert names == {path.name for path in (tmp_path / "q").iterdir()}
    for name in names:
        assert (trained / name).read_bytes() == (tmp_path / "q" / name).read_bytes(), name


def test_training_needs_a_text(model: Path, run: Run, tmp_path: Path) -> None:
    done = run("qat", model, "--preset", "int2", "-o", tmp_path / "q")
    assert done.code == 2 and "give one with --train FILE" in done.err


@pytest.mark.parametrize("preset", ["nf4", "Q4_K_M", "lut4"])
def test_grids_that_are_not_learned_are_refused(
    preset: str, model: Path, recipe: Path, run: Run, tmp_path: Path
) -> None:
    text = recipe.with_name("train.txt")
    done = run("qat", model, "--preset", preset, "--train", text, "-o", tmp_path / "q")
    assert done.code == 5 and "cannot be trained on" in done.err, done.err


def test_norms_train_if_they_may(model: Path, recipe: Path, run: Run, tmp_path: Path) -> None:
    text = recipe.with_name("train.txt").read_text()
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "train.txt").write_text(text)
    (folder / "slimport.toml").write_text(
        f'model = "{model}"\n[quantize]\npreset = "int2"\nmethod = "qat"\n'
        '[texts]\ntrain = "train.txt"\n'
        "[qat]\nsteps = 2\nbatch = 1\ntrain_length = 32\nnorm_learning_rate = 0.01\n"
        "train_tables = true\nhidden_weight = 0.5\nrecompute = true\n"
    )
    done = run("qat", "--config", folder / "slimport.toml", "-o", tmp_path / "q")
    assert done.code == 0, done.err
    found = QuantizedCheckpoint.open(tmp_path / "q")
    assert {choice.method for choice in found.plan.quantized} == {"qat"}
    from slimport.checkpoint import Checkpoint

    base = Checkpoint.open(str(model))
    norm = "model.layers.0.input_layernorm.weight"
    moved = np.abs(found.rows(norm) - base.rows(norm)).max()
    assert 0 < moved < 0.05


# ---- LoRA recovery ----


@pytest.fixture(scope="module")
def repaired(model: Path, recipe: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTN's codes on int2-g64, and an adapter that repairs them."""
    folder = tmp_path_factory.mktemp("repaired") / "q"
    settings = "[qat]\nlora_rank = 8\nlora_learning_rate = 0.01\n"
    config = recipe.with_name("lora.toml")
    config.write_text(recipe.read_text() + settings)
    words = ["--train", recipe.with_name("train.txt"), "--train-only", "lora"]
    done = run("qat", "--config", config, *QAT, *words, "-o", folder, "--json", "-q")
    assert done.code == 0, done.err
    curve = done.json["training"]["curve"]
    assert done.json["training"]["best"]["kl"] < 0.9 * curve[0]["kl"], curve
    return folder


def test_codes_stay_and_the_adapter_is_judged_beside_them_by_the_base_alone(
    repaired: Path, model: Path, recipe: Path, run: Run, tmp_path: Path, at_hand: None
) -> None:
    done = run("quantize", model, "--preset", "int2", "--method", "rtn", "-o", tmp_path / "q", "-q")
    assert done.code == 0, done.err
    plain, beside = (QuantizedCheckpoint.open(folder) for folder in (tmp_path / "q", repaired))
    assert plain.weights_digest == beside.weights_digest and plain.plan == beside.plan
    export = ["export", "--config", recipe, "--quantized", repaired, "--json", "-q"]
    adapter = ["--adapter", f"fix={repaired / 'adapter'}", "--adapter-mode", "separate"]
    found = {}
    for name, words in (("alone", []), ("with", adapter)):
        done = run(*export, *words, "-o", tmp_path / name)
        assert done.code == 0, done.err
        (found[name],) = done.json["bundles"]
    with_fix, alone = (found[name]["accuracy"]["held_out"] for name in ("with", "alone"))
    assert with_fix["ppl_reference"] == alone["ppl_reference"]  # the base without the adapter
    assert with_fix["kl_mean"] < 0.9 * alone["kl_mean"]
    assert found["with"]["errors"]["runtime"]["kl_mean"] < 0.05 * with_fix["kl_mean"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter-mode", "merged"], "cannot be merged"),
        (["--adapter-mode", "separate", "--preset", "int4"], "was trained for other codes"),
    ],
)
def test_an_adapter_that_repairs_goes_with_its_codes_alone(
    words: list[str], said: str, repaired: Path, model: Path, run: Run, tmp_path: Path
) -> None:
    given = ["--adapter", f"fix={repaired / 'adapter'}", "--target", "android", "--no-validate"]
    done = run("export", model, *given, *words, "--method", "rtn", "-o", tmp_path, "-q")
    assert done.code == 2 and said in done.err, done.err


# ---- two bits, trained, in every container ----


WIDE = ["--steps", "4", "--batch", "2", "--train-length", "32", "--evaluate-every", "2"]
EXPECTED = {
    ("int2-g64", "gguf"): "Q2_0",
    ("int2-g256", "gguf"): "TQ2_0",
    ("int2-g64", "onnx"): "1.2",
    ("int2-g256", "onnx"): "1.2",
    ("int2-g64", "coreml"): "26",
    ("int2-g256", "coreml"): "26",
}


@pytest.fixture(scope="module", params=["int2-g64", "int2-g256"])
def wide(
    request: pytest.FixtureRequest,
    make_model: Run,
    recipe_for: Run,
    run: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, Path]:
    """Grid, recipe (targets of Android and iOS 26) and trained checkpoint."""
    grid: str = request.param
    model = make_model("llama", hidden_size=256, intermediate_size=512)
    recipe = recipe_for(tmp_path_factory.mktemp("wide"), model)
    pocket = recipe.with_name("pocket.toml").read_text()
    recipe.with_name("apple.toml").write_text(pocket.replace("android", "ios26"))
    text = recipe.with_name("train.txt")
    folder = recipe.with_name("q")
    grids = ["--method", "rtn", "--grid", f"model.layers.*={grid}"]
    done = run("qat", model, *grids, *WIDE, "--train", text, "-o", folder, "-q")
    assert done.code == 0, done.err
    return grid, recipe, folder


@pytest.mark.slow
@pytest.mark.parametrize("container", ["gguf", "onnx", "coreml"])
def test_two_trained_bits_are_judged_in_their_runtime(
    container: str, wide: tuple[str, Path, Path], run: Run, tmp_path: Path
) -> None:
    """The trained codes, bit for bit; what the runtime adds is small beside what 2 bits cost."""
    grid, recipe, folder = wide
    target = recipe.with_name("apple.toml" if container == "coreml" else "pocket.toml")
    words = ["--target", target, "--container", container, "-o", tmp_path, "--json", "-q"]
    done = run("export", "--config", recipe, "--quantized", folder, *words)
    assert done.code == 0, done.err
    (found,) = done.json["bundles"]
    assert found["errors"]["file"] == {"codes_equal": True}
    assert found["errors"]["runtime"]["kl_mean"] < 0.05 * found["errors"]["quantization"]["kl_mean"]
    manifest = json.loads((tmp_path / target.stem / "manifest.json").read_text())
    assert manifest["weights_digest"] == QuantizedCheckpoint.open(folder).weights_digest
    minimum = manifest["minimum_runtime"]
    assert EXPECTED[grid, container] in f"{minimum['version']} {minimum['reason']}", minimum
    assert run("verify", tmp_path / target.stem).code == 0


def test_executorch_refuses_trained_two_bit_layers(
    trained: Path, recipe: Path, run: Run, tmp_path: Path
) -> None:
    words = ["--container", "executorch", "-o", tmp_path / "new", "-q"]
    done = run("export", "--config", recipe, "--quantized", trained, *words)
    assert done.code == 5 and "ExecuTorch cannot multiply the grid int2-g64" in done.err, done.err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_executorch_takes_a_trained_two_bit_embedding(
    make_model: Run, recipe_for: Run, run: Run, tmp_path: Path
) -> None:
    """An embedding is looked up; layers and head beside it are on grids that it multiplies."""
    model = make_model("llama", tie_word_embeddings=False)
    recipe = recipe_for(tmp_path / "r", model)
    text = recipe.read_text().replace(
        "[texts]", '[qat]\ntrain_tables = true\n[texts]\ntrain="train.txt"'
    )
    recipe.write_text(text)
    grids = ["--method", "rtn", "--grid", "*embed_tokens*=int2-g64"]
    done = run("qat", "--config", recipe, *grids, *WIDE, "-o", tmp_path / "q", "-q")
    assert done.code == 0, done.err
    plan = QuantizedCheckpoint.open(tmp_path / "q").plan
    choice = plan["model.embed_tokens.weight"]
    assert (choice.grid and choice.grid.name, choice.method) == ("int2-g64", "qat")
    words = ["--container", "executorch", "-o", tmp_path / "dist", "--json", "-q"]
    done = run("export", "--config", recipe, "--quantized", tmp_path / "q", *words)
    assert done.code == 0, done.err
    (found,) = done.json["bundles"]
    assert found["errors"]["file"] == {"codes_equal": True}
    assert found["errors"]["runtime"]["kl_mean"] < 0.05 * found["errors"]["quantization"]["kl_mean"]
