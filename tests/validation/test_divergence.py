"""KL, agreement and perplexity, against sums done by hand and by scipy-free numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from slimport.errors import BadInput, ValidationFailed
from slimport.validation import divergence


def save(path, logits):
    np.save(path, np.asarray(logits, np.float32))
    return path


def compare(tmp_path, expected, found, ids):
    first, second = save(tmp_path / "p.npy", expected), save(tmp_path / "q.npy", found)
    return divergence.compare(first, second, np.asarray(ids, np.int32))


def softmax(logits):
    exps = np.exp(np.float64(logits) - np.float64(logits).max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def random(shape, seed, std=2.0):
    return np.random.default_rng(seed).normal(0, std, shape).astype(np.float32)


def test_two_tokens_by_hand(tmp_path):
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    p, q = [[[math.log(3), 0], [math.log(3), 0]]], [[[0, 0], [5, 5]]]
    found = compare(tmp_path, p, q, [[0, 1]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.kl_mean == pytest.approx(kl, rel=1e-6)
    assert found.kl_max == pytest.approx(kl, rel=1e-6)
    assert found.tokens == 2
    assert found.ppl_reference == pytest.approx(4)  # position 0 gives 1/4 to token 1
    assert found.ppl == pytest.approx(2)
    assert found.kl_mean_error is None and found.ppl_error is None  # a single window


def test_equal_logits_have_no_divergence_at_all(tmp_path):
    logits = random((2, 9, 300), 0)
    found = compare(tmp_path, logits, logits, random((2, 9), 1).astype(int) % 300)
    assert found.kl_mean == found.kl_max == 0.0
    assert found.top1 == 1.0 and found.ppl == found.ppl_reference


def test_a_shift_of_all_logits_changes_nothing(tmp_path):
    logits = random((2, 9, 300), 0)
    found = compare(tmp_path, logits, logits + 3, np.zeros((2, 9)))
    assert 0 <= found.kl_max < 1e-12


def test_figures_are_those_of_plain_numpy(tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "_CHUNK", 7 * 50)  # windows are cut into uneven chunks
    p, q = random((4, 30, 50), 1), random((4, 30, 50), 2)
    q = p + 0.3 * q
    ids = np.random.default_rng(3).integers(50, size=(4, 30))
    found = compare(tmp_path, p, q, ids)
    p, q = softmax(p), softmax(q)
    kl = (p * np.log(p / q)).sum(-1)
    nll = [-np.log(np.take_along_axis(x[:, :-1], ids[:, 1:, None], -1)[..., 0]) for x in (p, q)]
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-9)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-9)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-9)
    assert found.kl_p999 == pytest.approx(np.quantile(kl, 0.999), rel=1e-9)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found.ppl_reference == pytest.approx(np.exp(nll[0].mean()), rel=1e-9)
    assert found.ppl == pytest.approx(np.exp(nll[1].mean()), rel=1e-9)
    error = kl.mean(1).std(ddof=1) / 2
    assert found.kl_mean_error == pytest.approx(error, rel=1e-9)
    assert found.ppl_error == pytest.approx(found.ppl * nll[1].mean(1).std(ddof=1) / 2, rel=1e-9)


def test_every_position_stands_in_the_histogram(tmp_path):
    p = random((2, 40, 50), 1)
    q = p.copy()
    q[0, :10] += random((10, 50), 2, std=0.1)
    q[1, 0] = -1e6 * np.eye(50)[p[1, 0].argmax()]
    found = compare(tmp_path, p, q, np.zeros((2, 40)))
    assert sum(found.histogram) == found.tokens == 80
    assert found.histogram[0] == 69 and found.histogram[-1] == 1
    edges, counts = found.to_json()["histogram"].values()
    assert len(edges) == len(counts) + 1


def test_json_has_the_keys_of_the_report(tmp_path):
    logits = random((2, 9, 30), 0)
    found = compare(tmp_path, logits, logits, np.zeros((2, 9))).to_json()
    keys = "kl_mean kl_median kl_p99 kl_p999 kl_max top1 ppl_reference ppl tokens kl_mean_error"
    assert set(keys.split()) | {"ppl_error", "ppl_reference_error", "histogram"} == set(found)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "artifact"])
def test_a_logit_that_is_not_finite_names_its_window(tmp_path, bad, side):
    p, q = random((3, 9, 30), 0), random((3, 9, 30), 1)
    (p if side == "reference" else q)[2, 4, 5] = bad
    with pytest.raises(ValidationFailed, match=f"{side} has logits .* in window 2"):
        compare(tmp_path, p, q, np.zeros((3, 9)))


@pytest.mark.parametrize("shape", [(2, 9, 31), (2, 8, 30), (1, 9, 30)])
def test_logits_of_something_else_are_bad_input(tmp_path, shape):
    with pytest.raises(BadInput, match="do not belong"):
        compare(tmp_path, random((2, 9, 30), 0), random(shape, 1), np.zeros((2, 9)))


def test_a_cut_file_is_bad_input(tmp_path):
    path = save(tmp_path / "p.npy", random((2, 9, 30), 0))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadInput, match=r"p\.npy cannot be read"):
        divergence.compare(path, path, np.zeros((2, 9), np.int32))
