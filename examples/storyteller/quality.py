"""Measurements for the README: nats beside entropy, round-to-nearest quantization, samples."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import corpus as c
import grammar
import preferences
import torch
import train
from tokenizers import Tokenizer
from torch import nn


def read_stories(path: Path) -> list[str]:
    """The stories of a text file, which stand in paragraphs."""
    return path.read_text(encoding="utf-8").strip().split("\n\n")


def story_rows(tokenizer: Tokenizer, stories: Sequence[str]) -> list[list[int]]:
    """Ids of begin token, story and end token."""
    eos = tokenizer.token_to_id(c.EOS)
    return [[*tokenizer.encode(story).ids, eos] for story in stories]


def story_nats(model: nn.Module, tokenizer: Tokenizer, stories: Sequence[str]) -> float:
    """Mean nats of a story with its end token, given the begin token."""
    found = train.measure(model, story_rows(tokenizer, stories), [1] * len(stories))
    return sum(found) / len(found)


def story_entropy(stories: Sequence[str]) -> float:
    """Mean of -log p of the stories under the grammar, in nats."""
    return -sum(grammar.read(story).log_probability for story in stories) / len(stories)


def answer_nats(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[c.Request], texts: Sequence[str]
) -> float:
    """Mean nats of an answer with its end marker, given the request."""
    both = [
        preferences.encode_answer(tokenizer, r, t) for r, t in zip(requests, texts, strict=True)
    ]
    found = train.measure(model, [ids for ids, _ in both], [start for _, start in both])
    return sum(found) / len(found)


@torch.no_grad()
def window_nats(model: nn.Module, ids: Sequence[int], length: int, after: int) -> float:
    """Mean nats per token at positions >= `after` of consecutive windows of a text."""
    rows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    losses = [train.token_losses(model, row[None])[0, after:].mean().item() for row in rows]
    return sum(losses) / len(losses)


@torch.no_grad()
def rounded(model: nn.Module, bits: int, group: int) -> nn.Module:
    """A copy with linear layers rounded to nearest: symmetric, one scale per `group` inputs."""
    result = copy.deepcopy(model)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for name, weight in result.named_parameters():
        if name.split(".")[-2] in train.LORA_TARGETS:
            groups = weight.reshape(-1, group)
            scale = groups.abs().amax(1, keepdim=True) / high
            weight.copy_(((groups / scale).round().clamp(low, high) * scale).reshape(weight.shape))
    return result


def tell(model: nn.Module, tokenizer: Tokenizer, stories: int, seed: int) -> list[str]:
    """Stories that the model tells without a prompt, at temperature 1."""
    never = (c.PAD, c.USER)
    told = preferences.generate(model, tokenizer, [""] * stories, seed, never=never)
    return [text.split("\n\n")[0] for text in told]


def draw_entropy(seed: int, stories: int = 20_000) -> tuple[float, float]:
    """Monte-Carlo entropy of the grammar in nats per story, and its standard error."""
    rng = random.Random(seed)
    found = torch.tensor([-grammar.sample(rng).log_probability for _ in range(stories)])
    return found.mean().item(), (found.std() / stories**0.5).item()
