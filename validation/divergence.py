"""How far one set of logits lies from another: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, ValidationFailed
from ..quantize.grid import Float32
from . import logits
from .runtime import Ids

if TYPE_CHECKING:
    import torch

Float64 = npt.NDArray[np.float64]

# Edges of the report's histogram; the first bin also takes everything smaller, zero included.
HISTOGRAM_EDGES = tuple(float(f"{edge:.3g}") for edge in np.logspace(-8, 2, 41))
_CHUNK = 2**22  # logits compared at once: 32 MiB in float64, whatever the vocabulary
_REFERENCE = ("the reference", "check the model and its adapter: they overflow by themselves")
_ARTIFACT = ("the artifact", "use a finer grid, or keep the layer that overflows in float16")


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || artifact) in nats over all positions, and perplexity over known next tokens.

    Attributes:
        kl_mean, kl_median, kl_p99, kl_p999, kl_max: over `tokens` positions.
        kl_mean_error: standard error of kl_mean over windows; None for a single window.
        top1: share of positions where both hold the same token most likely.
        ppl_reference, ppl: perplexity of the reference and of the artifact.
        ppl_reference_error, ppl_error: their standard errors over windows; None for one window.
        tokens: positions compared.
        histogram: positions by KL, one count per bin of HISTOGRAM_EDGES.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    kl_mean_error: float | None
    top1: float
    ppl_reference: float
    ppl: float
    ppl_reference_error: float | None
    ppl_error: float | None
    tokens: int
    histogram: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The keys of report.json."""
        values = {name: getattr(self, name) for name in self.__slots__}
        counts = list(values.pop("histogram"))
        return {**values, "histogram": {"edges": list(HISTOGRAM_EDGES), "counts": counts}}


def compare(reference: Path, artifact: Path, windows: Ids) -> Divergence:
    """Compare two .npy files of logits, float32 (n, length, vocabulary), a few rows at a time.

    Every position counts for KL and top-1. Position i predicts token i + 1 of its window, so the
    last one of a window counts for no perplexity. Sums are float64.

    Args:
        windows: int32 (n, length), the token ids that both saw.

    Raises:
        BadInput: shapes differ or do not fit the windows.
        ValidationFailed: a logit is not finite; names the window.
    """
    expected, found = logits.read(reference), logits.read(artifact)
    if expected.shape != found.shape or expected.shape[:2] != windows.shape or windows.shape[1] < 2:
        raise BadInput(
            f"logits {expected.shape} and {found.shape} do not belong to windows {windows.shape}",
            "both files hold (windows, length, vocabulary) of the same windows, length 2 or more",
            "compute both from the same text with the same vocabulary",
        )
    rows = [_window(index, expected[index], found[index], ids) for index, ids in enumerate(windows)]
    return _summary(*(np.stack(column) for column in zip(*rows, strict=True)))


def _window(
    index: int, expected: Float32, found: Float32, ids: npt.NDArray[np.int32]
) -> tuple[Float64, Float64, Float64, Float64]:
    """KL and agreement (length,), then both negative log-likelihoods (length - 1,)."""
    import torch  # here: exports that judge nothing start without it

    length, vocabulary = expected.shape
    nexts = torch.from_numpy(np.append(ids[1:], 0).astype(np.int64))
    step = max(1, _CHUNK // vocabulary)
    parts = []
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        p, q = _log_softmax(expected[rows]), _log_softmax(found[rows])
        for values, name, cure in ((p, *_REFERENCE), (q, *_ARTIFACT)):
            _check_finite(index, values, name, cure)
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)  # rounding alone can make it negative
        same = (p.argmax(-1) == q.argmax(-1)).double()
        known = nexts[rows, None]
        parts.append((kl, same, -p.gather(1, known)[:, 0], -q.gather(1, known)[:, 0]))
    whole = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    return whole[0], whole[1], whole[2][:-1], whole[3][:-1]


def _log_softmax(rows: Float32) -> torch.Tensor:
    import torch  # here: exports that judge nothing start without it

    return torch.from_numpy(np.array(rows)).double().log_softmax(-1)  # a copy: mapped read-only


def _check_finite(window: int, values: torch.Tensor, name: str, cure: str) -> None:
    import torch  # here: exports that judge nothing start without it

    if not bool(torch.isfinite(values).all()):
        raise ValidationFailed(
            f"{name} has logits that are not finite in window {window}",
            "a NaN or an infinity appeared in its forward pass",
            cure,
        )


def _summary(kl: Float64, same: Float64, nll_p: Float64, nll_q: Float64) -> Divergence:
    median, p99, p999 = np.quantile(kl, (0.5, 0.99, 0.999))
    inside = np.clip(kl, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts, _ = np.histogram(inside, HISTOGRAM_EDGES)
    reference, artifact = (math.exp(float(nll.mean())) for nll in (nll_p, nll_q))
    return Divergence(
        kl_mean=float(kl.mean()),
        kl_median=float(median),
        kl_p99=float(p99),
        kl_p999=float(p999),
        kl_max=float(kl.max()),
        kl_mean_error=_standard_error(kl),
        top1=float(same.mean()),
        ppl_reference=reference,
        ppl=artifact,
        ppl_reference_error=_standard_error(nll_p, reference),
        ppl_error=_standard_error(nll_q, artifact),
        tokens=kl.size,
        histogram=tuple(counts.tolist()),
    )


def _standard_error(values: Float64, slope: float = 1.0) -> float | None:
    """Of the mean of (windows, positions), times `slope`.

    Over windows, because tokens of one window depend on each other.
    """
    windows = len(values)
    if windows < 2:
        return None
    return float(values.mean(axis=1).std(ddof=1)) / math.sqrt(windows) * slope
