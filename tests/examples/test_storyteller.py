"""The embedded example: its grammar is exact, its script runs, its committed weights are good."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slimport.shipping.pairs import read_pairs
from slimport.tokenizer.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "storyteller"
ADAPTERS = ("adapters/sft", "adapters/dpo", "reward")
MODULES = ("words", "telling", "grammar", "outside", "corpus", "train", "preferences", "quality")


@pytest.fixture(scope="module")
def story() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the example, whose folder is no package."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name, None)


class Enumerator:
    """A teller that follows a list of choice numbers and notes how many each choice had."""

    def __init__(self, route: list[int]) -> None:
        self.route, self.widths, self.text = route, [], ""

    def _next(self, width: int) -> int:
        self.widths.append(width)
        place = len(self.widths) - 1
        return self.route[place] if place < len(self.route) else 0

    def allowed(self, options: Any, slot: str) -> tuple[str, ...]:
        return tuple(options)

    def say(self, text: str) -> None:
        self.text += text

    def pick(self, options: Any, slot: str = "", shape: Callable[[str], str] = str) -> str:
        option = options[self._next(len(options))]
        self.say(shape(option))
        return option

    def fork(self, weights: Any, openers: Any, slot: str) -> int:
        return self._next(len(weights))


def every_text(tell: Callable[[Any], object]) -> Iterator[str]:
    """All texts of a small grammar, one for each derivation."""
    route: list[int] = []
    while True:
        teller = Enumerator(route)
        tell(teller)
        yield teller.text
        route = route + [0] * (len(teller.widths) - len(route))
        while route and route[-1] + 1 == teller.widths[len(route) - 1]:
            route.pop()
        if not route:
            return
        route[-1] += 1


def test_probabilities_of_a_reduced_grammar_add_up_to_one(story, monkeypatch):
    words, telling, grammar = story("words"), story("telling"), story("grammar")
    for name in ("NAMES", "ANIMALS", "TRAITS", "PLACES", "HOBBIES", "RELATIVES", "TIMES"):
        monkeypatch.setattr(words, name, getattr(words, name)[:2])

    def tell(teller: Any) -> None:
        scene = grammar.introduce(teller)
        grammar.habit(teller, scene.hero)
        teller.say(" One day")

    texts = list(every_text(tell))
    assert len(texts) == len(set(texts)) > 500
    total = 0.0
    for text in texts:
        reader = telling.Reader(text=text)
        tell(reader)
        assert reader.position == len(text)
        total += math.exp(reader.log_probability)
    assert total == pytest.approx(1.0, abs=1e-9)


def test_reading_recovers_what_sampling_drew(story):
    grammar = story("grammar")
    rng = random.Random(0)
    for _ in range(300):
        drawn = grammar.sample(rng)
        found = grammar.read(drawn.text)
        assert found.taken == drawn.taken
        assert found.log_probability == pytest.approx(drawn.log_probability)


def test_fixed_slots_cost_nothing_and_hold(story):
    grammar = story("grammar")
    fixed = {"name": "Pip", "animal": "fox", "place": "in the dark forest", "mood": 1}
    drawn = grammar.sample(random.Random(1), **fixed)
    assert fixed.items() <= drawn.taken.items()
    free = grammar.read(drawn.text).log_probability
    cost = math.log(32) + math.log(24) + math.log(24) - math.log(0.4)
    assert free == pytest.approx(drawn.log_probability - cost)
    with pytest.raises(story("telling").AmbiguousError):
        grammar.read(drawn.text, **{**fixed, "animal": "owl"})


def test_choices_show_where_the_story_says_so(story):
    """What the request fixes is no choice, and what is repeated is one only the first time."""
    corpus, grammar = story("corpus"), story("grammar")
    rng = random.Random(5)
    for _ in range(50):
        request = corpus.draw_request(rng)
        answer = corpus.answer(request, rng)
        shown = {answer.text[start:end] for start, end in answer.chosen}
        assert not {request.name, request.animal} & shown
        drawn = grammar.sample(rng)
        names = [drawn.text[start:end] for start, end in drawn.chosen]
        assert drawn.taken["name"] in names and drawn.taken["animal"] in names
        assert drawn.text.count(str(drawn.taken["name"])) > names.count(drawn.taken["name"])


def test_the_rule_of_the_preferences(story):
    corpus, preferences = story("corpus"), story("preferences")
    request = corpus.Request("Emma", "Pip", "fox", "in the dark forest", 0)
    rng = random.Random(2)
    best = corpus.answer(request, rng, moral=1, digression=0).text
    assert preferences.points(request, best) == 5
    assert preferences.points(request, corpus.answer(request, rng, moral=0, digression=1).text) == 3
    assert preferences.points(request, best.replace("Sleep well", "Good night")) == 4
    sad = corpus.answer(request, rng, moral=1, digression=0, mood=1).text
    assert preferences.points(request, sad) == 4
    assert preferences.points(request, "") == 1


def test_pairs_are_read_as_the_reward_model_was_trained_on_them(
    story: Callable[[str], ModuleType],
) -> None:
    build, preferences = story("build"), story("preferences")
    tokenizer = Tokenizer.open(FOLDER / "base")
    name, seed, count = build.preference_splits()[1]
    found, _ = read_pairs(FOLDER / "data" / name, tokenizer, 2048, count, 1536)
    drawn = build.draw_pairs(seed, count)
    expected, _ = preferences.encode_pairs(tokenizer.library, drawn)
    assert [list(text) for text in found.texts] == expected


def artifacts() -> list[str]:
    """Every file that the script writes."""
    base = "config.json model.safetensors tokenizer.json tokenizer_config.json"
    base += " generation_config.json chat_template.jinja"
    data = "train_sample.txt held_out.txt out_of_distribution.txt calibration.txt"
    data += " sft_held_out.txt sft_calibration.txt sft_sample.jsonl"
    data += " preference.jsonl preference_held_out.jsonl"
    parts = ("adapter_config.json", "adapter_model.safetensors")
    return [
        *(f"base/{name}" for name in base.split()),
        *(f"data/{name}" for name in data.split()),
        *(f"{folder}/{name}" for folder, name in itertools.product(ADAPTERS, parts)),
        *("README.md", "LICENSE", "figures.json"),
    ]


@pytest.fixture(scope="module")
def short_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that 4 steps of every training leave."""
    out = tmp_path_factory.mktemp("storyteller")
    command = [sys.executable, "-B", str(FOLDER / "build.py"), "--steps", "4", "--out", str(out)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
@pytest.mark.parametrize(
    "committed",
    [pytest.param(False, marks=pytest.mark.slow), True],  # three minutes of a CPU
    ids=["4-steps", "committed"],
)
def test_every_artifact_is_there_and_loads(committed, request):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = FOLDER if committed else request.getfixturevalue("short_build")
    assert [name for name in artifacts() if not (folder / name).is_file()] == []
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert str(base.dtype) == "torch.bfloat16"
    assert base.config.max_position_embeddings >= 1152
    assert len(tokenizer) == base.config.vocab_size
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    assert set(base.generation_config.eos_token_id) == ends
    text = "Zoë's 7 naïve foxes → 狐 \n\n\tend"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for name in ("sft", "dpo"):
        PeftModel.from_pretrained(base, folder / "adapters" / name).unload()
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    scored = PeftModel.from_pretrained(judge, folder / "reward")
    assert scored(**tokenizer("Once", return_tensors="pt")).logits.shape == (1, 1)


def test_committed_sizes():
    weights = sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors"))
    everything = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert weights < 20e6
    assert everything < 25e6
    assert (FOLDER / "data" / "held_out.txt").stat().st_size >= 100_000
    assert (FOLDER / "data" / "out_of_distribution.txt").stat().st_size >= 40_000


def test_the_dpo_adapter_starts_from_the_sft_weights():
    from safetensors.torch import load_file

    first, second = (
        load_file(FOLDER / "adapters" / name / "adapter_model.safetensors")
        for name in ("sft", "dpo")
    )
    assert first.keys() == second.keys()
    moved = [((second[k] - first[k]).norm() / first[k].norm()).item() for k in first]
    assert 0 < sum(moved) / len(moved) < 0.5


def test_held_out_nats_of_the_committed_base_are_near_the_entropy(story):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    quality = story("quality")
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(FOLDER / "base" / "tokenizer.json"))
    stories = quality.read_stories(FOLDER / "data" / "held_out.txt")[:100]
    entropy = quality.story_entropy(stories)
    assert entropy <= quality.story_nats(model, tokenizer, stories) <= 1.10 * entropy


def test_committed_figures():
    figures = json.loads((FOLDER / "figures.json").read_text())
    base, tuned = figures["base"]["bf16"], figures["sft"]
    assert base["excess"] <= 0.03 and base["coherent"] >= 0.33
    assert tuned["nats_per_answer"] <= 1.05 * tuned["entropy"]
    assert figures["base"]["2-bit"]["excess"] > 2 * figures["base"]["4-bit"]["excess"]
    assert figures["reward"]["accuracy"] > 0.8
    assert figures["preference"]["win_rate_rule"] > 0.5
