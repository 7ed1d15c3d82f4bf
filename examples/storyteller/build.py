"""Build the storyteller from nothing: texts, tokenizer, base model, adapters, reward model, README.

    python examples/storyteller/build.py [--steps N] [--out DIR] [--stages base,sft]

Everything is seeded. `--steps N` cuts every training to at most N steps; `--stages` runs some
stages and reads the results of the others from DIR.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import corpus as c
import grammar
import numpy as np
import outside
import preferences as p
import quality as q
import readme
import torch
import train
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
SEED = 20_26
HELD_OUT, CALIBRATION, CONVERSATIONS, PAIRS, HELD_OUT_PAIRS = 320, 512, 160, 1000, 200
TOLD, RIVALS = 128, 64
BASE_PHASES = (
    c.Phase(1900, 12, 160, books=2, babble=0.06, choices=0.1),
    c.Phase(160, 4, 1280, babble=0.06, choices=0.1),
    c.Phase(600, 12, 160, books=2, babble=0.03),
    c.Phase(300, 12, 320, babble=0.03),
    c.Phase(80, 4, 1280, babble=0.03),
)
BASE_DECAY = 900
SFT_PHASES = (
    c.Phase(250, 12, 224, choices=0.3),
    c.Phase(350, 12, 224),
    c.Phase(50, 3, 1280),
)
REWARD_STEPS, DPO_STEPS, PAIR_BATCH = 250, 110, 8
BASE_RATE, SFT_RATE, REWARD_RATE, DPO_RATE = 3e-3, 4e-3, 1e-3, 5e-4
RANK, REWARD_RANK = 16, 8


@dataclass(frozen=True)
class Build:
    """Where the results go, how long trainings may run, and the figures measured so far."""

    out: Path
    limit: int | None
    figures: dict[str, Any]

    def steps(self, wanted: int) -> int:
        """The steps of a training, cut to the limit."""
        return wanted if self.limit is None else min(wanted, self.limit)

    def size(self, wanted: int) -> int:
        """The batch size of a training: a short build takes a quarter."""
        return wanted if self.limit is None else max(1, wanted // 4)

    def count(self, wanted: int) -> int:
        """How many texts to measure: a short build measures a few."""
        return wanted if self.limit is None else min(wanted, 8)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that an earlier stage has written."""
        return Tokenizer.from_file(str(self.out / "base" / "tokenizer.json"))

    def base(self) -> torch.nn.Module:
        """The base model that an earlier stage has written, in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.out / "base", dtype=torch.float32)

    def adapted(self, name: str, trainable: bool = False) -> torch.nn.Module:
        """The base with one of its adapters, in float32."""
        from peft import PeftModel

        folder = self.out / "adapters" / name
        return PeftModel.from_pretrained(self.base(), folder, is_trainable=trainable)


def write_data(build: Build) -> None:
    """Tokenizer and texts: one story or entry per paragraph."""
    for folder in ("base", "data"):
        (build.out / folder).mkdir(parents=True, exist_ok=True)
    c.save_tokenizer(c.train_tokenizer(SEED), build.out / "base")
    write = partial(write_paragraphs, build.out / "data")
    write("train_sample.txt", lambda rng: grammar.sample(rng).text, 160, SEED + 1)
    write("held_out.txt", lambda rng: grammar.sample(rng).text, HELD_OUT, SEED + 2)
    write("calibration.txt", lambda rng: grammar.sample(rng).text, CALIBRATION, SEED + 3)
    write("out_of_distribution.txt", outside.paragraph, 240, SEED + 4)
    write("sft_held_out.txt", lambda rng: c.sft_item(rng).text, CONVERSATIONS, SEED + 5)
    write("sft_calibration.txt", lambda rng: c.sft_item(rng).text, CONVERSATIONS, SEED + 9)
    rng = random.Random(SEED + 6)
    conversations = []
    for _ in range(CONVERSATIONS):
        request = c.draw_request(rng)
        answer = c.answer(request, rng).text
        conversations.append(
            {"messages": [*said("user", request.text), *said("assistant", answer)]}
        )
    write_lines(build.out / "data" / "sft_sample.jsonl", conversations)
    for name, seed, pairs in preference_splits():
        rows = [
            {
                "prompt": said("user", pair.request.text),
                "chosen": said("assistant", pair.chosen),
                "rejected": said("assistant", pair.rejected),
            }
            for pair in draw_pairs(seed, pairs)
        ]
        write_lines(build.out / "data" / name, rows)
    mean, error = q.draw_entropy(SEED + 7)
    build.figures["entropy"] = {"nats_per_story": mean, "standard_error": error}


def said(role: str, content: str) -> list[dict[str, str]]:
    """One message of a conversation."""
    return [{"role": role, "content": content}]


def preference_splits() -> tuple[tuple[str, int, int], ...]:
    """File name, seed and number of pairs of the two preference files."""
    return (
        ("preference.jsonl", SEED + 10, PAIRS),
        ("preference_held_out.jsonl", SEED + 11, HELD_OUT_PAIRS),
    )


def draw_pairs(seed: int, pairs: int) -> list[p.Pair]:
    """The pairs of a preference file."""
    rng = random.Random(seed)
    return [p.draw_pair(rng) for _ in range(pairs)]


def write_paragraphs(
    folder: Path, name: str, draw: Callable[[random.Random], str], number: int, seed: int
) -> None:
    """Write texts as paragraphs with a blank line between them."""
    rng = random.Random(seed)
    text = "\n\n".join(draw(rng) for _ in range(number)) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")


def phased(
    build: Build,
    phases: Sequence[c.Phase],
    item: Callable[[random.Random], c.Document],
    seed: int,
) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], int, int]:
    """The batches of all phases, the number of steps and the number of tokens."""
    tokenizer = build.tokenizer()
    parts, steps, tokens = [], 0, 0
    total = sum(phase.steps for phase in phases)
    for number, phase in enumerate(phases):
        wanted = max(1, build.steps(total) * phase.steps // total)
        phase = replace(phase, steps=wanted, size=build.size(phase.size))
        parts.append(itertools.islice(c.batches(tokenizer, item, phase, seed + number), wanted))
        steps += wanted
        tokens += wanted * phase.size * phase.length
    return itertools.chain(*parts), steps, tokens


def save_base(model: torch.nn.Module, folder: Path) -> None:
    """Write the weights as bfloat16, leaving the model as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def save_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Write an adapter as bfloat16, with a path to the base that holds on every machine."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = load_file(folder / "adapter_model.safetensors")
    halves = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = BASE_OF[folder.name]
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text)


BASE_OF = {"sft": "../../base", "dpo": "../../base", "reward": "../base"}


def train_base(build: Build) -> None:
    """The base model: most steps on short windows, the last ones on windows of 1,280 tokens."""
    torch.manual_seed(0)
    tokenizer = build.tokenizer()
    bos, eos, pad, end = (tokenizer.token_to_id(x) for x in (c.BOS, c.EOS, c.PAD, c.END))
    model = train.new_model(tokenizer.get_vocab_size(), bos, [eos, end], pad)
    saved = build.out / "base.state"
    resume = torch.load(saved) if saved.exists() else None
    batches, steps, tokens = phased(build, BASE_PHASES, c.base_item, 1000)
    if resume is not None:
        batches = itertools.islice(batches, resume["step"], None)

    def checkpoint(state: dict[str, Any]) -> None:
        torch.save(state, saved)
        save_base(model, build.out / "base")

    seconds = train.optimize(
        model,
        train.language_losses(model, batches),
        steps,
        BASE_RATE,
        "base",
        decay=BASE_DECAY,
        muon=True,
        on_step=checkpoint,
        resume=resume,
    )
    saved.unlink(missing_ok=True)
    save_base(model, build.out / "base")
    build.figures["training"]["base"] = training_figures(steps, seconds, tokens)
    measure_base(build)


def training_figures(steps: int, seconds: float, tokens: int) -> dict[str, float]:
    """Steps, seconds and tokens per second of a stage."""
    return {"steps": steps, "seconds": round(seconds), "tokens_per_second": round(tokens / seconds)}


def measure_base(build: Build) -> None:
    """Held-out nats per story beside the entropy, after rounding too, and nats in long windows."""
    model, tokenizer = build.base(), build.tokenizer()
    stories = q.read_stories(build.out / "data" / "held_out.txt")[: build.count(HELD_OUT)]
    entropy = q.story_entropy(stories)
    found = build.figures["base"] = {"entropy": entropy, "stories": len(stories)}
    found["told"] = build.count(TOLD)
    for name, bits in (("bf16", 0), ("4-bit", 4), ("2-bit", 2)):
        variant = q.rounded(model, bits, 32) if bits else model
        nats = q.story_nats(variant, tokenizer, stories)
        told = q.tell(variant, tokenizer, build.count(TOLD), SEED)
        coherent = sum(map(grammar.tells, told)) / len(told)
        found[name] = {
            "nats_per_story": nats,
            "excess": nats / entropy - 1,
            "coherent": coherent,
            "sample": told[0],
        }
        print(
            f"{name}: {nats:.2f} nats per story, +{nats / entropy - 1:.1%} over {entropy:.2f}; "
            f"{coherent:.0%} of its own stories are the grammar's"
        )
    text = (build.out / "data" / "held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: build.count(32) * 1152]
    found["windows"] = {
        "256": q.window_nats(model, ids, 256, 128),
        "1152": q.window_nats(model, ids, 1152, 128),
        "1152, last 384": q.window_nats(model, ids, 1152, 768),
    }
    print(f"nats per token in windows: {found['windows']}")


def train_sft(build: Build) -> None:
    """The supervised adapter: answers requests in the bedtime style."""
    torch.manual_seed(SEED + 1)
    model = train.with_lora(build.base(), RANK)
    batches, steps, tokens = phased(build, SFT_PHASES, c.sft_item, SEED + 30)
    losses = train.language_losses(model, batches)
    seconds = train.optimize(model, losses, steps, SFT_RATE, "sft")
    save_adapter(model, build.out / "adapters" / "sft")
    build.figures["training"]["sft"] = training_figures(steps, seconds, tokens)
    measure_adapter(build, "sft")


def measure_adapter(build: Build, name: str) -> None:
    """Nats per held-out answer beside the entropy of answers given their requests."""
    rng = random.Random(SEED + 8)
    requests = [c.draw_request(rng) for _ in range(build.count(CONVERSATIONS))]
    answers = [c.answer(request, rng) for request in requests]
    texts = [answer.text for answer in answers]
    entropy = -sum(answer.log_probability for answer in answers) / len(answers)
    nats = q.answer_nats(build.adapted(name), build.tokenizer(), requests, texts)
    build.figures[name] = {"entropy": entropy, "nats_per_answer": nats}
    print(f"{name}: {nats:.2f} nats per answer, entropy {entropy:.2f}: +{nats / entropy - 1:.1%}")


def train_reward(build: Build) -> None:
    """The reward model: Bradley-Terry on the preference pairs."""
    torch.manual_seed(SEED + 2)
    tokenizer = build.tokenizer()
    pad = tokenizer.token_to_id(c.PAD)
    model = train.with_lora(p.load_reward(build.out / "base", None), REWARD_RANK, head=True)
    (_, seed, pairs), (_, other, held_out) = preference_splits()
    rows, _ = p.encode_pairs(tokenizer, draw_pairs(seed, pairs))
    steps = build.steps(REWARD_STEPS)
    losses = p.reward_losses(model, rows, build.size(PAIR_BATCH), pad, SEED)
    seconds = train.optimize(model, losses, steps, REWARD_RATE, "reward")
    save_adapter(model, build.out / "reward")
    model = p.load_reward(build.out / "base", build.out / "reward")
    rows, _ = p.encode_pairs(tokenizer, draw_pairs(other, build.count(held_out)))
    accuracy = p.pair_accuracy(model, rows, pad)
    build.figures["training"]["reward"] = {"steps": steps, "seconds": round(seconds)}
    build.figures["reward"] = {"held_out_pairs": len(rows) // 2, "accuracy": accuracy}
    print(f"reward: {accuracy:.1%} of held-out pairs in order")


def train_dpo(build: Build) -> None:
    """The preferred adapter: DPO from the supervised weights, with those as the reference."""
    torch.manual_seed(SEED + 3)
    tokenizer = build.tokenizer()
    model = build.adapted("sft", trainable=True)
    _, seed, pairs = preference_splits()[0]
    steps = build.steps(DPO_STEPS)
    size = build.size(PAIR_BATCH)
    used = min(pairs, steps * size)
    rows, starts = p.encode_pairs(tokenizer, draw_pairs(seed, used))
    losses = p.dpo_losses(model, rows, starts, size, SEED)
    seconds = train.optimize(model, losses, steps, DPO_RATE, "dpo")
    save_adapter(model, build.out / "adapters" / "dpo")
    build.figures["training"]["dpo"] = {"steps": steps, "seconds": round(seconds)}
    measure_adapter(build, "dpo")


def compare(build: Build) -> None:
    """Samples of base, SFT and DPO for held-out requests; win rates of SFT and DPO."""
    tokenizer = build.tokenizer()
    rng = random.Random(SEED + 40)
    requests = [c.draw_request(rng) for _ in range(build.count(RIVALS))]
    prompts = [c.prompt(request) for request in requests]
    judge = p.load_reward(build.out / "base", build.out / "reward")
    samples, rule, reward = {}, {}, {}
    for name in ("base", "sft", "dpo"):
        model = build.base() if name == "base" else build.adapted(name)
        texts = p.generate(model, tokenizer, prompts, SEED, train.TEMPERATURE)
        samples[name] = texts
        rule[name] = [p.points(r, text) for r, text in zip(requests, texts, strict=True)]
        rows = [p.encode_answer(tokenizer, r, t)[0] for r, t in zip(requests, texts, strict=True)]
        reward[name] = p.score_rows(judge, rows, tokenizer.token_to_id(c.PAD)).tolist()
    build.figures["preference"] = {
        "samples": len(requests),
        "temperature": train.TEMPERATURE,
        "points": {name: sum(found) / len(found) for name, found in rule.items()},
        "coherent": {
            name: sum(map(p.coherent, requests, texts)) / len(texts)
            for name, texts in samples.items()
        },
        "moral": {n: share(texts, " learned that ") for n, texts in samples.items()},
        "digression": {n: share(texts, "By the way") for n, texts in samples.items()},
        "win_rate_rule": p.win_rate(rule["dpo"], rule["sft"]),
        "win_rate_reward": p.win_rate(reward["dpo"], reward["sft"]),
    }
    build.figures["samples"] = [
        {"request": requests[i].text, **{name: texts[i] for name, texts in samples.items()}}
        for i in range(min(3, len(requests)))
    ]
    print(json.dumps(build.figures["preference"], indent=2))


def share(texts: list[str], part: str) -> float:
    """Share of the texts that contain a part."""
    return sum(part in text for text in texts) / len(texts)


def write_readme(build: Build) -> None:
    """README and license notice."""
    (build.out / "README.md").write_text(readme.render(build.figures), encoding="utf-8")
    for part in (".", "base", "adapters/sft", "adapters/dpo", "reward", "data"):
        if (build.out / part).is_dir():  # a bundle copies the licence of each part it takes
            (build.out / part / "LICENSE").write_text(readme.LICENSE, encoding="utf-8")


STAGES: dict[str, Callable[[Build], None]] = {
    "data": write_data,
    "base": train_base,
    "sft": train_sft,
    "reward": train_reward,
    "dpo": train_dpo,
    "compare": compare,
    "readme": write_readme,
}


def main() -> None:
    """Run the stages in order and keep the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="cut every training to this many steps")
    parser.add_argument("--out", type=Path, default=HERE, help="default: the folder of this script")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of %(default)s")
    options = parser.parse_args()
    path = options.out / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures.setdefault("training", {})
    build = Build(options.out, options.steps, figures)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for name in options.stages.split(","):
        STAGES[name](build)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"{name} done after {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
