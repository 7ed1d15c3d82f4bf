"""ExecuTorch in its child process, held to transformers and to its own runner."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport import log
from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, ValidationFailed
from slimport.export import executorch as container
from slimport.export.container import Deployment
from slimport.export.executorch.tokenizer import TOKENIZER, tokenizer_json
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.windows import windows_of
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import conformance, judge
from slimport.validation.judge import Case
from slimport.validation.runtimes import executorch, executorch_worker, reference
from slimport.validation.runtimes.reference import Oracle

FLOATS = {"*proj*": "float16", "lm_head*": "float16"}  # products without 8-bit activations
CONTEXT = 96
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral with a window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma 2": ("gemma2", {"num_hidden_layers": 3}),
    "gemma 3": ("gemma3_text", {"num_hidden_layers": 7}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "phi3 with a window": ("phi3", {"sliding_window": 24}),
}
# Gemma's gelu and its large embeddings were off by 5e-5 to 1.1e-4, the others by 1e-5.
# Four layers gather more: 2.7e-5 with one thread of torch, 1.8e-5 with four.
NOISE = {"gemma": 2e-4, "gemma 2": 2e-4, "gemma 3": 2e-4, "smollm3": 4e-5}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model folder, its quantized checkpoint, and model.pte made of it."""

    model: Path
    quantized: QuantizedCheckpoint
    file: Path


def export(model: Path, folder: Path, preset: str = "int4", **patterns: str) -> Exported:
    checkpoint = Checkpoint.open(model)
    plan = make_plan(decoder_config(checkpoint.config), preset, "rtn", patterns)
    quantized = quantize(
        checkpoint,
        checkpoint.config,
        plan,
        folder / "quantized",
        calibration=None,
        tokenizer_folder=model,
        progress=lambda stage, done, total: None,
    )
    tokenizer = Tokenizer.open(model)
    file = container.write(quantized, tokenizer, folder, Deployment(CONTEXT))[0]
    (folder / TOKENIZER).write_bytes(tokenizer_json(tokenizer))
    return Exported(model, quantized, file)


@pytest.fixture(scope="module")
def int4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tiny_llama, tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="module")
def floats(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A Llama whose greedy tokens no rounding of activations changes, with SentencePiece."""
    model = make_model("llama", tie_word_embeddings=False, tokenizer="spm", vocab_size=402)
    return export(model, tmp_path_factory.mktemp("floats"), **FLOATS)


@pytest.fixture
def here(jobs_at_hand: Any) -> Iterator[None]:
    """Run programs in this process."""
    with jobs_at_hand("reference", "executorch"):
        yield


def windows(count: int = 2, length: int = 80) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(0).integers(400, size=(count, length)).astype(np.int32)


def run(file: Path, out: Path, ids: np.ndarray[Any, Any], **options: Any) -> Any:
    executorch.logits(file, ids, out, **options)
    return np.load(out)


def meant(model: Exported, out: Path, ids: np.ndarray[Any, Any]) -> Any:
    """Logits of the codes by transformers."""
    reference.logits(Oracle(model.quantized.folder, quantized=True), ids, out)
    return np.load(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    family: str, make_model: Any, here: None, tmp_path: Path
) -> None:
    """Prompts in chunks, prompts of a runner, single tokens, and what codes mean."""
    name, config = FAMILIES[family]
    config = {"tie_word_embeddings": False, **config}
    plain = export(make_model(name, **config), tmp_path / "floats", "int8", **FLOATS)
    ids, noise = windows(), NOISE.get(family, 2e-5)
    expected = meant(plain, tmp_path / "expected.npy", ids)
    assert np.abs(expected).max() > 1
    assert np.abs(run(plain.file, tmp_path / "got.npy", ids) - expected).max() < noise
    coded = export(plain.model, tmp_path / "codes")
    expected = meant(coded, tmp_path / "expected.npy", ids)
    assert executorch.exact_logits(coded.file, ids, tmp_path / "got.npy") == 1e-6
    assert np.abs(np.load(tmp_path / "got.npy") - expected).max() < noise


@pytest.mark.parametrize("grid", ["int2-g64", "int4-g32", "int8-g32", "int8-row"])
def test_a_table_means_its_codes(grid: str, make_model: Any, here: None, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    found = export(model, tmp_path, **{"*embed_tokens*": grid, **FLOATS})
    ids = windows()
    expected = meant(found, tmp_path / "expected.npy", ids)
    assert np.abs(run(found.file, tmp_path / "got.npy", ids) - expected).max() < 2e-5


def test_threads_and_cuts_do_not_change_logits(int4: Exported, here: None, tmp_path: Path) -> None:
    ids = windows()
    whole = run(int4.file, tmp_path / "whole.npy", ids, threads=1)
    assert np.array_equal(whole, run(int4.file, tmp_path / "two.npy", ids, threads=2))
    alone = run(int4.file, tmp_path / "alone.npy", ids[1:, :60])
    assert np.abs(whole[1, :56] - alone[0, :56]).max() < 1e-4


def test_greedy_tokens_are_those_of_transformers(floats: Exported, at_hand: None) -> None:
    prompts = [[1, 5, 7], [9], list(range(10, 60))]
    mine = executorch.generate(floats.file, prompts, 12)
    oracle = Oracle(floats.quantized.folder, quantized=True)
    ends = Tokenizer.open(floats.model).eos_ids
    assert mine == reference.generate(oracle, prompts, 12, eos_ids=ends, threads=1)


def test_a_generation_ends_with_the_context(floats: Exported, here: None) -> None:
    (found,) = executorch.generate(floats.file, [list(range(10, 100))], 20)
    assert found.stopped or len(found.tokens) == CONTEXT - 90 + 1


def test_the_official_runner_says_the_same(floats: Exported, official_runner: Any) -> None:
    """Its ids, its text, and its BOS; it prints no byte of a longer character that stands alone."""
    texts = ["Once upon a time", "the fox was cold", "é 🙂  two\n"]
    tokenizer = Tokenizer.open(floats.model)
    bos = tokenizer.library.id_to_token(tokenizer.bos_id)
    folder = floats.file.parent
    prompts = [*((text, 0) for text in texts), (texts[0], 1), (bos + texts[0], 0)]
    printed = official_runner(folder, "model.pte", prompts)
    ids = [tokenizer.encode(text, add_special=bool(start)) for text, start in prompts]
    answers = executorch.generate(floats.file, ids, 16)
    for (text, read), given, answer in zip(printed, ids, answers, strict=True):
        assert read == len(given)
        assert text == b"".join(map(shown, map(tokenizer.library.id_to_token, answer.tokens)))
    assert printed[3] == printed[4] != printed[0]


def shown(piece: str) -> bytes:
    """What the runner prints of a token."""
    text = piece.replace("▁", " ").encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        text = bytes([int(piece[3:5], 16)])
    printable = len(text) > 1 or text.isspace() or 32 <= text[0] < 127
    return text if printable else b""


def test_measurements(int4: Exported) -> None:
    found = executorch.measure(int4.file, CONTEXT, [16, 64, 95], generated=4)
    assert [speed.prompt_tokens for speed in found.speed] == [16, 64]  # 95 leaves room for one
    for speed in found.speed:
        assert 0 < speed.ttft_s < speed.total_s
    memory = found.memory
    assert memory.mapped == int4.file.stat().st_size
    assert memory.kv_cache == 2 * 2 * 2 * 16 * CONTEXT * 4  # both, layers, heads, size, float32
    codes = 416 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) // 2
    assert codes < memory.repacked < 1.5 * codes
    assert memory.compute > CONTEXT * 96 * 4
    assert found.rss_anon is None or found.rss_anon > memory.kv_cache


def test_the_vocabulary_and_the_tokenizer(floats: Exported, here: None) -> None:
    tokenizer = Tokenizer.open(floats.model)
    found = conformance.check(tokenizer, floats.file, executorch)
    assert found.conforms and found.checked > 60 and found.chats == 0
    read = executorch.vocabulary(floats.file)
    assert (read.size, read.eog, read.adds_bos) == (402, tokenizer.eos_ids, None)
    assert read.bos == tokenizer.bos_id


def case(model: Exported, file: Path) -> Case:
    return Case(
        file=file,
        adapter=None,
        oracle=Oracle(model.model),
        codes=Oracle(model.quantized.folder, quantized=True),
        tokenizer=Tokenizer.open(model.model),
        texts={judge.HELD_OUT: windows_of(windows(2, 48))},
        kv_cache="f32",
        context=64,
        prompt_lengths=[16],
        prompts={"one": [1, 2, 3]},
    )


def test_exact_products_are_judged(int4: Exported, here: None, tmp_path: Path) -> None:
    found = judge.judge(case(int4, int4.file), executorch, tmp_path, lambda *_: None)
    assert found.graph is not None and found.graph.kl_max < 1e-9
    assert found.runtime.kl_mean > 100 * found.graph.kl_mean  # int8 activations cost something
    assert not list(tmp_path.glob("*.pte"))


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-2}, {"attention_scale": 0.26}], ids=["epsilon", "scale"]
)
def test_a_program_of_another_model_is_not_shipped(
    change: dict[str, Any], int4: Exported, here: None, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(
        int4.quantized, decoder=dataclasses.replace(int4.quantized.decoder, **change)
    )
    file = container.write(wrong, Tokenizer.open(int4.model), tmp_path, Deployment(64))[0]
    with pytest.raises(ValidationFailed, match="computes another model"):
        judge.judge(case(int4, file), executorch, tmp_path, lambda *_: None)


def test_a_text_longer_than_the_context_is_refused(
    int4: Exported, here: None, tmp_path: Path
) -> None:
    """Before it runs."""
    ids = windows(1, CONTEXT + 1)
    with pytest.raises(BadInput, match="97 tokens is too long"):
        run(int4.file, tmp_path / "o.npy", ids)
    with pytest.raises(BadInput, match="97 tokens is too long"):
        executorch.generate(int4.file, ids.tolist(), 1)


def test_damaged_files_are_refused(int4: Exported, here: None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file"):
        run(tmp_path / "model.pte", tmp_path / "o.npy", windows())
    shutil.copytree(int4.file.parent, tmp_path / "copy")
    file = tmp_path / "copy" / "model.pte"
    whole = file.read_bytes()
    for content in (b"nothing", whole[:1000], whole[:-30000]):
        file.write_bytes(content)
        with pytest.raises(ValidationFailed, match="ExecuTorch does not load"):
            run(file, tmp_path / "o.npy", windows())
        with pytest.raises(ValidationFailed):
            executorch.exact_logits(file, windows(), tmp_path / "o.npy")
    file.write_bytes(whole)
    (tmp_path / "copy" / TOKENIZER).write_text("{}")
    with pytest.raises(ValidationFailed, match="cannot read"):
        executorch.tokenize(file, ["a"])


def test_what_a_library_logs_stays_in_the_child(
    int4: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(int4.file, tmp_path / "o.npy", windows())
    assert capfd.readouterr() == ("", "")


def test_what_ships_beside_is_proven_too(
    int4: Exported, here: None, tmp_path: Path, make_model: Any
) -> None:
    """The base alone, and adapters that no text is judged with."""
    right = dataclasses.replace(
        case(int4, int4.file), beside=[(None, Oracle(int4.quantized.folder, quantized=True))]
    )
    judge._prove_others(right, executorch, tmp_path)
    wrong = dataclasses.replace(right, beside=[(None, Oracle(make_model("llama", seed=5)))])
    with pytest.raises(ValidationFailed, match="computes another model"):
        judge._prove_others(wrong, executorch, tmp_path)


def test_a_runner_that_says_something_else_is_a_failure(
    floats: Exported, here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = Tokenizer.open(floats.model).encode("Once upon a time")
    with log.writing(tmp_path / "log.txt"):
        (answer,) = executorch.generate(floats.file, [ids], 12)
    assert "asked for 1 of 1 texts" in (tmp_path / "log.txt").read_text()
    first = next(token for token in ids if token != answer.tokens[0])
    other = [([first, *answer.tokens[1:]], False)]
    job = executorch_worker.JOBS | {"generate": lambda **_: other}
    monkeypatch.setattr(executorch_worker, "JOBS", job)
    with pytest.raises(ValidationFailed, match="generates another text"):
        executorch.generate(floats.file, [ids], 12)
