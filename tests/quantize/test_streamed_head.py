"""The streamed head against logits that are held whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slimport import decoder
from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.quantize import streamed_head
from slimport.quantize.streamed_head import StreamedHead


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table comes in several parts, the last one shorter."""
    monkeypatch.setattr(streamed_head, "_ROWS", 100)


def whole(source: Checkpoint, hidden: torch.Tensor) -> torch.Tensor:
    config = decoder_config(source.config)
    table = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    norm, rows = (decoder.read_tensor(source, name) for name in ("model.norm.weight", table))
    return decoder.head(hidden, norm, rows, config)


# A soft cap; a divisor; a head of its own.
@pytest.mark.parametrize("family", ["gemma2", "granite", "olmo2"])
def test_gradients_are_those_of_drawn_tokens(family: str, make_model: Any) -> None:
    source = Checkpoint.open(make_model(family))
    head = StreamedHead(source, decoder_config(source.config))
    hidden = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(1))
    found = head.gradient(hidden, torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, drawn = head._draw(head._normed(hidden), torch.Generator().manual_seed(2))
    leaf = hidden.clone().requires_grad_()
    logs = whole(source, leaf).log_softmax(-1)
    (-logs.flatten(0, 1).gather(1, drawn[:, None]).sum()).backward()
    assert leaf.grad is not None
    assert (found - leaf.grad).abs().max() < 1e-5 * leaf.grad.abs().max()


def test_tokens_are_drawn_by_their_probability(make_model: Any) -> None:
    source = Checkpoint.open(make_model("llama"))
    head = StreamedHead(source, decoder_config(source.config))
    one = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) / 4
    with torch.no_grad():
        inputs = head._normed(one).expand(4000, -1)
        _, drawn = head._draw(inputs, torch.Generator().manual_seed(4))
        wanted = whole(source, one)[0].softmax(-1)
    shares = torch.bincount(drawn, minlength=416) / 4000
    spread = (wanted * (1 - wanted) / 4000).sqrt()
    assert ((shares - wanted).abs() < 5 * spread + 1e-4).all()


def test_divergence_is_that_of_whole_logits(make_model: Any) -> None:
    first, second = (Checkpoint.open(make_model("gemma2", seed=seed)) for seed in (0, 1))
    config = decoder_config(first.config)
    ours, theirs = StreamedHead(first, config), StreamedHead(second, config)
    random = torch.Generator().manual_seed(5)
    hidden, moved = (torch.randn(3, 20, 64, generator=random) for _ in range(2))
    p, q = (
        whole(source, states).double().log_softmax(-1)
        for source, states in ((first, hidden), (second, moved))
    )
    wanted = float((p.exp() * (p - q)).sum())
    assert ours.divergence(hidden, theirs, moved) == pytest.approx(wanted, rel=1e-5)
    assert ours.divergence(hidden, ours, hidden) == 0
