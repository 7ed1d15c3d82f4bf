"""ggml's kernels through ctypes: one door for quantizing, dequantizing and the llama.cpp runtime.

The C symbols come out of the shared library in the xllamacpp wheel. Its structs change between
releases, so exactly one release is accepted, and probed before anything is passed to it.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from importlib import metadata, util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DependencyMissing, Unsupported
from .grid import Float32

UInt8 = npt.NDArray[np.uint8]

DISTRIBUTION = "xllamacpp"
RELEASE = "2026.10.11549"
GGML_VERSION = "0.26.0"


class Type(IntEnum):
    """ggml's tensor types, by their number in a GGUF file (`enum ggml_type` in ggml.h)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    Q2_0 = 42


# (weights, bytes) of one block
BLOCKS = {
    Type.F32: (1, 4),
    Type.F16: (1, 2),
    Type.BF16: (1, 2),
    Type.Q4_0: (32, 18),
    Type.Q4_1: (32, 20),
    Type.Q5_0: (32, 22),
    Type.Q5_1: (32, 24),
    Type.Q8_0: (32, 34),
    Type.IQ4_NL: (32, 18),
    Type.MXFP4: (32, 17),
    Type.Q2_0: (64, 18),
    Type.Q2_K: (256, 84),
    Type.Q3_K: (256, 110),
    Type.Q4_K: (256, 144),
    Type.Q5_K: (256, 176),
    Type.Q6_K: (256, 210),
    Type.IQ1_S: (256, 50),
    Type.IQ1_M: (256, 56),
    Type.IQ2_XXS: (256, 66),
    Type.IQ2_XS: (256, 74),
    Type.IQ2_S: (256, 82),
    Type.IQ3_XXS: (256, 98),
    Type.IQ3_S: (256, 110),
    Type.IQ4_XS: (256, 136),
    Type.TQ1_0: (256, 54),
    Type.TQ2_0: (256, 66),
}
# Kernels that stop the process without an importance matrix.
NEEDS_IMPORTANCE = frozenset({Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS})
_FLOATS = frozenset({Type.F32, Type.F16, Type.BF16})


@cache
def library() -> ctypes.CDLL:
    """The shared library with ggml and llama.cpp, probed; calls release the GIL.

    Raises:
        DependencyMissing: xllamacpp is absent, of another release, or not the ggml it should be.
    """
    _check_release()
    spec = util.find_spec(DISTRIBUTION)
    if spec is None or spec.origin is None:
        raise _mismatch("its metadata is installed but the module is not")
    try:
        loaded = ctypes.CDLL(str(Path(spec.origin).with_name("xllamacpp.abi3.so")))
        _declare(loaded)
    except (OSError, AttributeError) as error:
        raise _mismatch(f"its shared library does not load: {error}") from error
    _probe(loaded)
    return loaded


def version() -> str:
    """What stands in reports, such as `llama.cpp via xllamacpp 2026.10.11549 (ggml 0.26.0)`."""
    library()
    return f"llama.cpp via {DISTRIBUTION} {RELEASE} (ggml {GGML_VERSION})"


def row_bytes(type: int, columns: int) -> int:
    """Bytes of one row of `columns` weights.

    Raises:
        Unsupported: the row does not divide into whole blocks, or the type is unknown.
    """
    named = _known(type)
    block, size = BLOCKS[named]
    if columns <= 0 or columns % block:
        raise Unsupported(
            f"a row of {columns} weights cannot be {named.name}",
            f"{named.name} has blocks of {block} weights and rows hold whole blocks",
            "choose a type with a smaller block, or float16",
        )
    return columns // block * size


def quantize_rows(type: int, weight: Float32, imatrix: Float32 | None = None) -> UInt8:
    """Quantize with ggml's own kernel.

    Args:
        type: a ggml type.
        weight: float32 (rows, columns).
        imatrix: float32 (columns,), the importance of each input, or None.

    Returns:
        uint8 (rows, row_bytes(type, columns)).

    Raises:
        Unsupported: rows do not divide into blocks, or the type needs an importance matrix.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    rows, columns = weight.shape
    blocks = np.empty((rows, row_bytes(type, columns)), np.uint8)
    importance = _importance(type, imatrix, columns)
    lib = library()
    lib.ggml_quantize_init(type)

    pointer = None if importance is None else importance.ctypes.data
    lib.ggml_quantize_chunk(type, weight.ctypes.data, blocks.ctypes.data, 0, rows, columns, pointer)
    return blocks


def dequantize_rows(type: int, blocks: UInt8, columns: int) -> Float32:
    """Dequantize with ggml's own kernel: uint8 (rows, row bytes) to float32 (rows, columns).

    Raises:
        Unsupported: the rows are not rows of `columns` weights of this type.
    """
    named = _known(type)
    if blocks.ndim != 2 or blocks.shape[1] != row_bytes(type, columns):
        raise Unsupported(
            f"blocks of shape {blocks.shape} are not {named.name} rows of {columns} weights",
            f"such a row has {row_bytes(type, columns)} bytes",
            "pass uint8 rows of that many bytes",
        )
    blocks = np.ascontiguousarray(blocks, np.uint8)
    if named in _FLOATS:
        return _widen(named, blocks)
    weight = np.empty((len(blocks), columns), np.float32)
    kernel = getattr(library(), f"dequantize_row_{_symbol(named)}")
    kernel.restype, kernel.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    kernel(blocks.ctypes.data, weight.ctypes.data, weight.size)
    return weight


def _widen(type: Type, rows: UInt8) -> Float32:
    if type is Type.BF16:
        return (rows.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.view("<f4" if type is Type.F32 else "<f2").astype(np.float32)


def _importance(type: int, imatrix: Float32 | None, columns: int) -> Float32 | None:
    if imatrix is None:
        if type in NEEDS_IMPORTANCE:
            raise Unsupported(
                f"{_known(type).name} needs an importance matrix",
                "at so few bits ggml's kernel weighs every input",
                "give calibration text, or choose a type of more bits",
            )
        return None
    if imatrix.shape != (columns,):
        raise Unsupported(
            f"an importance matrix of shape {imatrix.shape} does not fit {columns} inputs",
            "it holds one importance per input",
            f"pass float32 ({columns},)",
        )
    return np.ascontiguousarray(imatrix, np.float32)


def _symbol(type: Type) -> str:
    """The type's name in the kernels' symbols: lower case, but for the K of a k-quant."""
    return type.name.lower().removesuffix("_k") + ("_K" if type.name.endswith("_K") else "")


def _known(type: int) -> Type:
    try:
        return Type(type)
    except ValueError:
        raise Unsupported(
            f"ggml type {type} is not supported",
            "it is no tensor type that slimport reads or writes",
            f"choose one of {', '.join(known.name for known in Type)}",
        ) from None


def _check_release() -> None:
    try:
        installed = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise _mismatch("it is not installed") from None
    if installed != RELEASE:
        raise _mismatch(f"version {installed} is installed and its C structs may differ")


def _declare(lib: ctypes.CDLL) -> None:
    number, wide, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    for name, result, arguments in (
        ("ggml_version", ctypes.c_char_p, []),
        ("ggml_type_name", ctypes.c_char_p, [number]),
        ("ggml_blck_size", wide, [number]),
        ("ggml_type_size", ctypes.c_size_t, [number]),
        ("ggml_quantize_init", None, [number]),
        ("ggml_quantize_requires_imatrix", ctypes.c_bool, [number]),
        (
            "ggml_quantize_chunk",
            ctypes.c_size_t,
            [number, pointer, pointer, wide, wide, wide, pointer],
        ),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


def _probe(lib: ctypes.CDLL) -> None:
    """Ask for what is known of this release before any pointer is passed."""
    found = lib.ggml_version().decode()
    if found != GGML_VERSION:
        raise _mismatch(f"it holds ggml {found} instead of {GGML_VERSION}")
    for known in Type:
        if lib.ggml_type_name(known).decode().upper() != known.name:
            raise _mismatch(f"its ggml type {int(known)} is not {known.name}")
    for known, block in BLOCKS.items():
        if (lib.ggml_blck_size(known), lib.ggml_type_size(known)) != block:
            raise _mismatch(f"its blocks of {known.name} are not {block}")
        if lib.ggml_quantize_requires_imatrix(known) != (known in NEEDS_IMPORTANCE):
            raise _mismatch(f"whether {known.name} needs an importance matrix is not as known")


def _mismatch(why: str) -> DependencyMissing:
    return DependencyMissing(
        f"{DISTRIBUTION} {RELEASE} (llama.cpp, ggml {GGML_VERSION}) is needed",
        why,
        f"pip install {DISTRIBUTION}=={RELEASE}",
    )
