"""What a reader prefers: pairs of answers, a reward model trained on them, DPO and win rates."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import corpus as c
import grammar
import torch
import train
import words as w
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

BETA = 0.1
FLAWS = ("name", "animal", "place", "mood")


@dataclass(frozen=True)
class Pair:
    """Two answers to one request; the reader's rule gives more points to the chosen one."""

    request: c.Request
    chosen: str
    rejected: str


def points(request: c.Request, text: str) -> int:
    """The reader's rule, 0 to 5: right frame, hero and mood; a moral; no digression."""
    story = c.unframe(request, text)
    body = text if story is None else story
    sentences = body.lower().split(".")
    hero = (request.name.lower(), f" {request.animal}", request.place)
    turns = (w.HAPPY_TURNS, w.SAD_TURNS)[request.mood]
    return sum(
        (
            story is not None,
            any(all(part in sentence for part in hero) for sentence in sentences),
            any(f" {turn}, " in body for turn in turns),
            " learned that " in body,
            "By the way" not in body,
        )
    )


def coherent(request: c.Request, text: str) -> bool:
    """Whether an answer is a story of the grammar about what was asked for, in its frame."""
    story = c.unframe(request, text)
    return story is not None and grammar.tells(story, **request.fixed)


def draw_answer(request: c.Request, rng: random.Random, story: random.Random) -> str:
    """An answer as after supervised tuning; one in three departs from the request.

    `story` draws all that the reader's rule does not look at.
    """
    fixed: dict[str, str | int] = {
        "moral": int(rng.random() < 1 / 2),
        "digression": int(rng.random() < 2 / 5),
    }
    if rng.random() < 1 / 3:
        flaw = rng.choice(FLAWS)
        other = c.draw_request(rng)
        fixed[flaw] = 1 - request.mood if flaw == "mood" else other.fixed[flaw]
    return c.answer(request, story, **fixed).text


def draw_pair(rng: random.Random) -> Pair:
    """A request and two answers that differ in points and, up to there, in nothing else."""
    request = c.draw_request(rng)
    while True:
        seed = rng.random()
        first, second = (draw_answer(request, rng, random.Random(seed)) for _ in range(2))
        gain = points(request, first) - points(request, second)
        if gain:
            return Pair(request, *((first, second) if gain > 0 else (second, first)))


def encode_answer(tokenizer: Tokenizer, request: c.Request, text: str) -> tuple[list[int], int]:
    """Ids of begin token, request and answer with its end, and where the answer starts."""
    head = tokenizer.encode(c.prompt(request)).ids
    tail = tokenizer.encode(f"{text}{c.END}", add_special_tokens=False).ids
    return head + tail, len(head)


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> tuple[list[list[int]], list[int]]:
    """Ids and answer starts, for each pair first the chosen and then the rejected answer."""
    both = [
        encode_answer(tokenizer, pair.request, text)
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    ]
    return [ids for ids, _ in both], [start for _, start in both]


def endless(pairs: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of pair numbers, each epoch in a new order."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(pairs), pairs)
        for i in range(0, pairs - size + 1, size):
            yield order[i : i + size]


def rows_of(batch: Sequence[int]) -> list[int]:
    """Row numbers of pairs: 2i is the chosen and 2i + 1 the rejected answer of pair i."""
    return [row for i in batch for row in (2 * i, 2 * i + 1)]


def rewards(model: nn.Module, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """The reward model's score at the last token of each row, float32 [rows]."""
    ids, lengths = train.padded(rows, pad)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().squeeze(-1)


@torch.no_grad()
def score_rows(
    model: nn.Module, rows: Sequence[Sequence[int]], pad: int, size: int = 16
) -> torch.Tensor:
    """`rewards` without a graph, `size` rows at a time."""
    parts = [rewards(model, rows[i : i + size], pad) for i in range(0, len(rows), size)]
    return torch.cat(parts)


def reward_losses(
    model: nn.Module, rows: Sequence[Sequence[int]], size: int, pad: int, seed: int
) -> Iterator[torch.Tensor]:
    """Bradley-Terry loss (nats per pair): -log sigmoid(reward chosen - reward rejected)."""
    for batch in endless(len(rows) // 2, size, seed):
        with torch.autocast("cpu", torch.bfloat16):
            found = rewards(model, [rows[i] for i in rows_of(batch)], pad)
        yield -F.logsigmoid(found[0::2] - found[1::2]).mean()


def pair_accuracy(model: nn.Module, rows: Sequence[Sequence[int]], pad: int) -> float:
    """Share of pairs whose chosen answer has the higher reward."""
    found = score_rows(model, rows, pad)
    return (found[0::2] > found[1::2]).float().mean().item()


def dpo_losses(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    size: int,
    seed: int,
) -> Iterator[torch.Tensor]:
    """DPO loss (Rafailov et al. 2023, equation 7); the reference is the model as it comes in."""
    reference = -torch.tensor(train.measure(model, rows, starts))
    for batch in endless(len(rows) // 2, size, seed):
        picked = rows_of(batch)
        with torch.autocast("cpu", torch.bfloat16):
            own = -train.nats(model, [rows[i] for i in picked], [starts[i] for i in picked])
        gain = own - reference[picked]
        yield -F.logsigmoid(BETA * (gain[0::2] - gain[1::2])).mean()


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seed: int,
    temperature: float = 1.0,
    limit: int = 256,
    never: Sequence[str] = (c.PAD,),
) -> list[str]:
    """One sample for each prompt, of at most `limit` tokens, without the end.

    Tokens in `never` are not drawn; at temperature 1 the distribution is else the model's own.
    """
    torch.manual_seed(seed)
    rows = [tokenizer.encode(text).ids for text in prompts]
    pad, width = tokenizer.token_to_id(c.PAD), max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    out = model.generate(
        input_ids=ids,
        attention_mask=(ids != pad).long(),
        max_new_tokens=limit,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        suppress_tokens=[tokenizer.token_to_id(token) for token in never],
    )
    return [tokenizer.decode(row[width:].tolist()) for row in out]


def win_rate(scores: Sequence[float], rivals: Sequence[float]) -> float:
    """Share of wins, a tie counting half."""
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(scores, rivals, strict=True)]
    return sum(wins) / len(wins)


def load_reward(base: Path, adapter: Path | None) -> nn.Module:
    """The base with a score head (one output) and, if given, the trained adapter."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)
