"""ggml's kernels, and the refusal of every other release of the library."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from slimport.errors import DependencyMissing, Unsupported
from slimport.quantize import ggml
from slimport.quantize.ggml import Type

UPSTREAM = [kind for kind in Type if kind.name in gguf.GGMLQuantizationType.__members__]
# Relative RMSE on normal weights, importance 1 everywhere, as measured.
ERRORS = {
    Type.F32: 0.0,
    Type.F16: 0.000208,
    Type.BF16: 0.00168,
    Type.Q4_0: 0.0821,
    Type.Q4_1: 0.0698,
    Type.Q5_0: 0.0406,
    Type.Q5_1: 0.0340,
    Type.Q8_0: 0.00536,
    Type.Q2_K: 0.268,
    Type.Q3_K: 0.145,
    Type.Q4_K: 0.0707,
    Type.Q5_K: 0.0355,
    Type.Q6_K: 0.0173,
    Type.IQ2_XXS: 0.344,
    Type.IQ2_XS: 0.300,
    Type.IQ3_XXS: 0.182,
    Type.IQ1_S: 0.486,
    Type.IQ4_NL: 0.0750,
    Type.IQ3_S: 0.137,
    Type.IQ2_S: 0.249,
    Type.IQ4_XS: 0.0757,
    Type.IQ1_M: 0.453,
    Type.TQ1_0: 0.808,
    Type.TQ2_0: 0.808,
    Type.MXFP4: 0.115,
    Type.Q2_0: 0.722,
}
SLOW = {Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S}  # seconds to start
TYPES = [pytest.param(t, marks=pytest.mark.slow) if t in SLOW else t for t in Type]
NEEDS_IMPORTANCE = {Type.IQ2_XXS, Type.IQ2_XS, Type.IQ1_S}


@pytest.fixture
def unloaded():
    """The library is looked for again, in this test and after it."""
    ggml.library.cache_clear()
    yield
    ggml.library.cache_clear()


def weight(rows=24, columns=512, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", UPSTREAM, ids=lambda kind: kind.name)
def test_numbers_and_sizes_are_those_of_gguf(kind):
    upstream = gguf.GGMLQuantizationType[kind.name]
    block, size = gguf.GGML_QUANT_SIZES[upstream]
    assert upstream == kind
    assert ggml.row_bytes(kind, 1024) == 1024 // block * size


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_goes_there_and_back(kind):
    source = weight()
    blocks = ggml.quantize_rows(kind, source, np.ones(512, np.float32))
    assert blocks.shape == (24, ggml.row_bytes(kind, 512)) and blocks.dtype == np.uint8
    back = ggml.dequantize_rows(kind, blocks, 512)
    assert back.dtype == np.float32 and back.shape == source.shape
    error = np.sqrt(((source - back) ** 2).mean()) / source.std()
    assert error == pytest.approx(ERRORS[kind], rel=0.05)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.Q6_K, Type.IQ4_XS, Type.BF16])
def test_dequantized_as_gguf_does(kind):
    blocks = ggml.quantize_rows(kind, weight())
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(ggml.dequantize_rows(kind, blocks, 512), expected)


def test_a_q4_0_block_by_hand():
    """Scale 2 in fp16, then nibbles: element j low, element j + 16 high, codes + 8."""
    block = np.zeros((1, 18), np.uint8)
    block[0, :2] = np.frombuffer(np.float16(2).tobytes(), np.uint8)
    block[0, 2:] = 8 | 8 << 4
    block[0, 2] = 15 | 0 << 4
    expected = np.zeros((1, 32), np.float32)
    expected[0, 0], expected[0, 16] = 14, -16
    np.testing.assert_array_equal(ggml.dequantize_rows(Type.Q4_0, block, 32), expected)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K, Type.IQ4_XS])
def test_threads_do_not_change_bytes(kind):
    source, importance = weight(61), np.abs(weight(1)[0])
    whole = ggml.quantize_rows(kind, source, importance)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(
            lambda part: ggml.quantize_rows(kind, part, importance), np.array_split(source, 9)
        )
        np.testing.assert_array_equal(np.concatenate(list(parts)), whole)


def test_importance_is_used():
    importance = np.ones(512, np.float32)
    importance[::2] = 1000
    source = weight()
    plain, weighed = (
        ggml.dequantize_rows(Type.Q4_K, ggml.quantize_rows(Type.Q4_K, source, given), 512)
        for given in (None, importance)
    )
    assert np.square(weighed - source)[:, ::2].sum() < np.square(plain - source)[:, ::2].sum()


@pytest.mark.parametrize("kind", list(Type), ids=lambda kind: kind.name)
def test_importance_is_asked_for_where_ggml_would_abort(kind):
    assert ggml.library().ggml_quantize_requires_imatrix(kind) == (kind in NEEDS_IMPORTANCE)
    if kind in NEEDS_IMPORTANCE:
        with pytest.raises(Unsupported, match=f"{kind.name} needs an importance matrix"):
            ggml.quantize_rows(kind, weight())


def test_what_does_not_fit_is_refused():
    with pytest.raises(Unsupported, match=r"row of 48 weights cannot be Q4_0"):
        ggml.row_bytes(Type.Q4_0, 48)
    with pytest.raises(Unsupported, match=r"row of 0 weights"):
        ggml.row_bytes(Type.Q4_0, 0)
    with pytest.raises(Unsupported, match="ggml type 4 is not supported"):
        ggml.row_bytes(4, 32)
    with pytest.raises(Unsupported, match=r"importance matrix of shape \(3,\)"):
        ggml.quantize_rows(Type.Q4_0, weight(), np.ones(3, np.float32))
    with pytest.raises(Unsupported, match=r"blocks of shape \(2, 17\)"):
        ggml.dequantize_rows(Type.Q4_0, np.zeros((2, 17), np.uint8), 32)


def test_version_names_the_release():
    assert ggml.version() == "llama.cpp via xllamacpp 2026.10.11549 (ggml 0.26.0)"


def test_another_release_is_refused_before_it_is_loaded(unloaded, monkeypatch):
    monkeypatch.setattr(ggml.metadata, "version", lambda name: "2026.11.1")
    monkeypatch.setattr(ggml.ctypes, "CDLL", lambda path: pytest.fail("it was loaded"))
    with pytest.raises(DependencyMissing, match=r"2026\.11\.1 is installed") as caught:
        ggml.library()
    assert caught.value.exit_code == 6 and "pip install xllamacpp==" in caught.value.cure


def test_a_missing_library_is_told(unloaded, monkeypatch):
    def missing(name):
        raise ggml.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ggml.metadata, "version", missing)
    with pytest.raises(DependencyMissing, match="it is not installed"):
        ggml.library()


def test_a_library_that_does_not_load_is_told(unloaded, monkeypatch):
    def broken(path):
        raise OSError("wrong ELF class")

    monkeypatch.setattr(ggml.ctypes, "CDLL", broken)
    with pytest.raises(DependencyMissing, match="wrong ELF class"):
        ggml.library()


@pytest.mark.parametrize("what", ["GGML_VERSION", "BLOCKS"])
def test_the_probe_refuses_another_ggml(unloaded, monkeypatch, what):
    wrong = "9.9.9" if what == "GGML_VERSION" else {Type.Q4_0: (32, 20)}
    monkeypatch.setattr(ggml, what, wrong)
    with pytest.raises(DependencyMissing):
        ggml.library()
