"""What an export calibrates and judges on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.recipe import Recipe, Validate, load
from slimport.shipping.source import Source, open_source
from slimport.shipping.texts import SAMPLED, Texts, read_texts

Run = Callable[..., Any]


def read(recipe: Recipe, source: Source, **kinds: bool) -> Texts:
    wanted = {"calibrate": True, "validate": True} | kinds
    return read_texts(recipe, source, progress=lambda stage, done, total: None, **wanted)


@pytest.fixture
def recipe(tiny_llama: Path, recipe_for: Run, tmp_path: Path) -> Recipe:
    return load(recipe_for(tmp_path, tiny_llama))


@pytest.fixture
def source(recipe: Recipe) -> Source:
    return open_source(recipe)


def test_files_become_windows(recipe: Recipe, source: Source, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Il pleut sur la ville. " * 40)
    texts = read(recipe.override(eval_ood=tmp_path / "other.txt"), source)
    assert texts.calibration is not None
    assert texts.calibration.ids.shape == (4, 32)
    assert {name: windows.ids.shape for name, windows in texts.judged.items()} == {
        "held_out": (3, 32),
        "out_of_distribution": (3, 32),
    }
    assert texts.origins == {
        "calibration": "train.txt",
        "held_out": "held_out.txt",
        "out_of_distribution": "other.txt",
    }
    assert [path.name for path in texts.files] == ["train.txt", "held_out.txt", "other.txt"]


def test_only_what_is_needed_is_read(recipe: Recipe, source: Source) -> None:
    texts = read(recipe, source, calibrate=False, validate=False)
    assert (texts.calibration, texts.judged, texts.prompts) == (None, {}, {})


def test_windows_fit_the_context_of_the_model(recipe: Recipe, source: Source) -> None:
    long = replace(recipe, validate=Validate(windows=1, window_length=9999))
    assert read(long, source, calibrate=False).judged["held_out"].ids.shape[1] == 256


def test_sampled_text_is_the_same_every_time(
    tiny_llama: Path, source: Source, at_hand: None
) -> None:
    recipe = Recipe(model=str(tiny_llama), validate=Validate(windows=3, window_length=24))
    recipe = recipe.override(calibration_windows=2, calibration_length=24)
    one, two = read(recipe, source), read(recipe, source)
    assert one.calibration is not None and two.calibration is not None
    np.testing.assert_array_equal(one.calibration.ids, two.calibration.ids)
    np.testing.assert_array_equal(one.judged["held_out"].ids, two.judged["held_out"].ids)
    assert one.calibration.ids.shape == (2, 24)
    assert one.origins == {"calibration": SAMPLED, "held_out": SAMPLED}
    overlap = (one.calibration.ids[:, None] == one.judged["held_out"].ids[None]).all(axis=-1)
    assert not overlap.any()  # another seed: never judged on what was calibrated on


def test_prompts_are_rendered_as_chats(recipe: Recipe, source: Source) -> None:
    texts = read(recipe.override(prompts=["Tell me about foxes."]), source, calibrate=False)
    (ids,) = texts.prompts.values()
    written = source.tokenizer.library.decode(ids, skip_special_tokens=False)
    assert written.startswith("<|bos|><|im_start|>user\nTell me about foxes.<|im_end|>")
    assert written.endswith("<|im_start|>assistant\n")
    assert ids.count(source.tokenizer.bos_id) == 1


def test_without_prompts_the_starts_of_windows_are_continued(
    recipe: Recipe, source: Source
) -> None:
    texts = read(recipe, source, calibrate=False)
    assert list(texts.prompts.values()) == [
        window[:24].tolist() for window in texts.judged["held_out"].ids
    ]


def test_chats_in_jsonl(recipe: Recipe, source: Source, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello fox"}, {"role": "assistant", "content": "Hi"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps({'messages': messages})}\n" * 20)
    texts = read(recipe.override(eval=path), source, calibrate=False)
    start = source.tokenizer.library.token_to_id("<|im_start|>")
    assert (texts.judged["held_out"].ids == start).sum() > 3
