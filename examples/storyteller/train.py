"""Training and measuring: the base model, LoRA adapters on it, and nats per document."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, POSITIONS = 256, 768, 4, 8, 4, 2048
TEMPERATURE = 0.7  # of sampling, by default
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def new_model(vocabulary: int, bos: int, eos: Sequence[int], pad: int) -> nn.Module:
    """A Llama with random weights, float32."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=POSITIONS,
        initializer_range=HIDDEN**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=list(eos),
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=bos,
        eos_token_id=list(eos),
        pad_token_id=pad,
        do_sample=True,
        temperature=TEMPERATURE,
    )
    return model


def token_losses(model: nn.Module, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Nats of each next token; ids int64 [batch, length + 1], result float32 [batch, length]."""
    logits = model(input_ids=ids[:, :-1], use_cache=False, **inputs).logits
    return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


def optimizers(model: nn.Module, rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW over the weights that train, or Muon for the layers' matrices and AdamW for the rest.

    Muon (Jordan et al. 2024) orthogonalizes each update of a matrix; its update has the root mean
    square of AdamW's here, so that both take the same rate. It learns to copy names from earlier
    sentences in a third of the tokens that AdamW needs.
    """
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            hidden = muon and weight.ndim == 2 and "embed" not in name
            (matrices if hidden else others).append(weight)
    adamw = torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if not matrices:
        return [adamw]
    matched = "match_rms_adamw"
    return [torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn=matched), adamw]


def schedule(step: int, steps: int, decay: int) -> float:
    """The share of the peak rate: a short warm-up, then level, then `decay` steps down to 2%."""
    warmup = max(1, min(50, steps // 10))
    return min((step + 1) / warmup, 1.0, max(0.02, (steps - step) / decay))


@dataclass
class Course:
    """Where a training stands: what it changes, the steps done and the seconds spent."""

    model: nn.Module
    steppers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        optimizers = [stepper.state_dict() for stepper in self.steppers]
        weights = self.model.state_dict()
        return {
            "step": self.step,
            "seconds": self.seconds,
            "model": weights,
            "optimizers": optimizers,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for stepper, saved in zip(self.steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)

    def advance(self, loss: torch.Tensor, rate: float) -> float:
        """One step down the gradient, which is clipped to norm 1; returns the loss."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for stepper in self.steppers:
            for group in stepper.param_groups:
                group["lr"] = rate
            stepper.step()
            stepper.zero_grad()
        self.step += 1
        return loss.item()


def optimize(
    model: nn.Module,
    losses: Iterator[torch.Tensor],
    steps: int,
    rate: float,
    label: str,
    decay: int | None = None,
    muon: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> float:
    """Follow the losses (each a scalar with a graph) for `steps` steps; returns seconds spent.

    The rate falls over the last `decay` steps (default: all). `on_step` gets a checkpoint every 50
    steps; with `resume`, training goes on after such a checkpoint.
    """
    course = Course(model, optimizers(model, rate, muon))
    if resume is not None:
        course.restore(resume)
    started = time.perf_counter() - course.seconds
    running: list[float] = []
    model.train()
    while course.step < steps:
        pace = rate * schedule(course.step, steps, decay or steps)
        running.append(course.advance(next(losses), pace))
        if course.step % 50 and course.step < steps:
            continue
        course.seconds = time.perf_counter() - started
        mean = sum(running) / len(running)
        print(f"{label} {course.step}/{steps} loss {mean:.4f} {course.seconds:.0f} s", flush=True)
        running.clear()
        if on_step is not None:
            on_step(course.state())
    model.eval()
    return course.seconds


def language_losses(
    model: nn.Module, batches: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Iterator[torch.Tensor]:
    """Weighted mean of the nats per token of each batch, in bfloat16 with float32 weights.

    A batch is ids, int64 [batch, length + 1], and what each weighs as a target, float32.
    """
    for ids, weighs in batches:
        wanted = torch.from_numpy(weighs)[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            losses = token_losses(model, torch.from_numpy(ids))
        yield (losses * wanted).sum() / wanted.sum()


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids to int64 [rows, longest] and their lengths, int64 [rows]."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def nats(
    model: nn.Module, rows: Sequence[Sequence[int]], starts: Sequence[int], pad: int = 2
) -> torch.Tensor:
    """Total nats of row[start:] given row[:start] for each row; differentiable, float32 [rows].

    Padding stands on the right, where a causal model cannot see it.
    """
    ids, lengths = padded(rows, pad)
    losses = token_losses(model, ids)
    place = torch.arange(1, ids.shape[1])
    wanted = (place >= torch.tensor(starts)[:, None]) & (place < lengths[:, None])
    return (losses * wanted).sum(1)


@torch.no_grad()
def measure(
    model: nn.Module, rows: Sequence[Sequence[int]], starts: Sequence[int], size: int = 16
) -> list[float]:
    """`nats` without a graph, `size` rows at a time."""
    found: list[float] = []
    for i in range(0, len(rows), size):
        found += nats(model, rows[i : i + size], starts[i : i + size]).tolist()
    return found


def with_lora(model: nn.Module, rank: int, head: bool = False) -> nn.Module:
    """A PEFT model with fresh adapters on every linear layer; `head` trains a score head too."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=LORA_TARGETS,
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        modules_to_save=["score"] if head else None,
        base_model_name_or_path="../../base",
    )
    return get_peft_model(model, config)
