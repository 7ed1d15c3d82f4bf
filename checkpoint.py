"""A model folder or hub id: config, and weights read row block by row block from safetensors.

Only safetensors are read, never pickles, and code of a model is never run. The format is that of
https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from .errors import BadInput, EnvironmentFailed, UsageError

Float32 = npt.NDArray[np.float32]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LICENSES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
)
MODEL_FILES = ("config.json", SINGLE, INDEX, "model-*.safetensors", *TOKENIZER_FILES, *LICENSES)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_WHOLE = {"I8": "|i1", "U8": "|u1", "I32": "<i4", "U32": "<u4", "I64": "<i8"}  # codes of others
QUANTIZED_KEYS = ("quantization_config", "quantization")  # of config.json, by others' quantizers
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
_SHARD = re.compile(r"[^/\\]+\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Weights(Protocol):
    """Anything that yields full-precision weights; row blocks keep memory bounded."""

    def names(self) -> Sequence[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, (outputs, inputs) for a matrix."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """float32 rows [start:stop) along the first axis, all of them finite."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `offset` counts bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in full precision; fills Weights.

    Attributes:
        folder: where the files are.
        config: config.json.
        name: the hub id, or the last component of the folder; never a local path.
        revision: the hub's commit; None for a local folder.
    """

    folder: Path
    config: dict[str, Any]
    name: str
    revision: str | None
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(
        cls, source: str | Path, *, revision: str | None = None, offline: bool = False
    ) -> Checkpoint:
        """Open a folder, or a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`; reads headers only.

        Raises:
            UsageError: no such folder or hub id.
            BadInput: pickles only, Git-LFS pointers, files missing, damaged or unsafe.
            EnvironmentFailed: the hub cannot be reached.
        """
        folder = Path(source)
        if folder.exists():
            if revision is not None:
                raise UsageError(
                    f"revision {revision} of the folder {source}",
                    "only models of the hub have revisions",
                    "leave --revision out, or give a hub id",
                )
            name, commit = folder.resolve().name, None
        else:
            name = str(source)
            folder = _download(name, revision, offline)
            commit = folder.name
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder", "a model is a folder", "give its folder")
        _check_files(folder)
        _refuse_adapter(folder)
        config = read_json(folder / "config.json")
        packed = any(config.get(key) for key in QUANTIZED_KEYS)
        tensors = _read_headers(folder, packed)
        return cls(folder, config, name, commit, MappingProxyType(tensors))

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """float32 rows [start:stop) along the first axis.

        Raises:
            BadInput: NaN or infinite values among them.
        """
        return read_rows(name, self.tensors[name], start, stop)

    def integers(self, name: str) -> npt.NDArray[Any]:
        """A tensor of integers as it is stored, of a model that others quantized.

        Raises:
            BadInput: it is not there, or holds floats.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dtype not in _WHOLE:
            raise BadInput(
                f"{name} is missing, or holds no integers",
                "config.json says that the model is quantized, and its codes should be there",
                "download the model again, all files from one revision",
            )
        dtype, count = np.dtype(_WHOLE[tensor.dtype]), math.prod(tensor.shape)
        found = np.fromfile(tensor.file, dtype, count, offset=tensor.offset)
        if found.size != count:
            raise _damaged(tensor.file, f"{name} ends too early: the file changed meanwhile")
        return found.reshape(tensor.shape)

    def digest(self) -> str:
        """`sha256:...` over name, size and content of config.json and the weight files."""
        files = {tensor.file.name: tensor.file for tensor in self.tensors.values()}
        files["config.json"] = self.folder / "config.json"
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(f"{name} {files[name].stat().st_size}\n".encode())
            with files[name].open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return "sha256:" + digest.hexdigest()

    def license_files(self) -> list[Path]:
        """Licences and notices that have to travel with the weights."""
        return license_files(self.folder)


def license_files(folder: Path) -> list[Path]:
    """Licences and notices in a folder of weights or texts."""
    return [path for path in _matching(folder, LICENSES) if path.is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BadInput: the file is missing, a Git-LFS pointer, not JSON, or not an object.
    """
    refuse_lfs_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except OSError as error:
        raise BadInput(
            f"{path.name} cannot be read", f"{error.strerror}: {path}", "give a complete folder"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path.name} is not JSON", str(error), f"download {path} again") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise BadInput(f"{path.name} is not a JSON object", f"it is a {kind}", f"mend {path}")
    return content


def _not_a_number(word: str) -> float:
    raise ValueError(f"{word} is no number in JSON")


def refuse_lfs_pointer(path: Path) -> None:
    """Raise BadInput if `path` is a Git-LFS pointer instead of the file itself."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise BadInput(
                f"{path.name} is a Git-LFS pointer, not the file itself",
                f"it has {path.stat().st_size} bytes and names the real file",
                f"run `git lfs pull` in {path.parent}",
            )


def read_header(path: Path, packed: bool = False) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Args:
        packed: whether there may be integers: codes of a model that others quantized.

    Raises:
        BadInput: a Git-LFS pointer, a damaged or truncated file, tensors that overlap or leave a
            gap, or a dtype that is not a float of 16, 32 or 64 bits.
    """
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise _damaged(path, f"its header of {length} bytes does not fit into {size} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = [(name, *_entry(path, name, entry, packed)) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[3:])
    return dict(_place(path, entries, 8 + length, size))


_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_Entry = tuple[str, str, tuple[int, ...], int, int]


def _entry(
    path: Path, name: str, entry: object, packed: bool
) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one entry of a header."""
    try:
        dtype, shape, (begin, end) = (cast(Any, entry)[key] for key in _ENTRY_KEYS)
        valid = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"the entry of {name} is not dtype, shape, offsets") from error
    if not valid:
        raise _damaged(path, f"{name} has shape {shape} and offsets {begin}, {end}")
    if dtype not in _DTYPES and not (packed and dtype in _WHOLE):
        raise BadInput(
            f"{name} in {path.name} has dtype {dtype}",
            "weights are quantized once, from floats of 16, 32 or 64 bits",
            "export the full-precision model",
        )
    return dtype, tuple(shape), begin, end


def _place(
    path: Path, entries: Sequence[_Entry], start: int, size: int
) -> Iterator[tuple[str, StoredTensor]]:
    """Check that the data of all tensors fill the file without gap or overlap."""
    position = 0
    for name, dtype, shape, begin, end in entries:
        needed = math.prod(shape) * np.dtype((_DTYPES | _WHOLE)[dtype]).itemsize
        if end - begin != needed:
            raise _damaged(path, f"{name} {shape} {dtype} needs {needed} bytes, has {end - begin}")
        if begin != position:
            fault = "overlaps another tensor" if begin < position else "leaves a gap before it"
            raise _damaged(path, f"{name} {fault}: it starts at {begin}, not at {position}")
        position = end
        yield name, StoredTensor(path, dtype, shape, start + begin)
    if start + position != size:
        raise _damaged(path, f"its tensors end at byte {start + position}, the file at {size}")


def read_rows(name: str, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Float32:
    """Rows [start:stop) of a stored tensor along its first axis, as float32; only they are read.

    Raises:
        BadInput: NaN or infinite values among them, a value beyond float32, or integers.
    """
    if tensor.dtype not in _DTYPES:
        raise BadInput(
            f"{name} in {tensor.file.name} has dtype {tensor.dtype}",
            "it holds codes, and a weight in their place is expected",
            "export the full-precision model",
        )
    rows = tensor.shape[0] if tensor.shape else 1
    start, stop, _ = slice(start, stop).indices(rows)
    shape = (max(stop - start, 0), *tensor.shape[1:])
    width = math.prod(tensor.shape[1:])
    dtype = np.dtype(_DTYPES[tensor.dtype])
    offset = tensor.offset + start * width * dtype.itemsize
    stored = np.fromfile(tensor.file, dtype, math.prod(shape), offset=offset)
    if stored.size != math.prod(shape):
        raise _damaged(tensor.file, f"{name} ends too early: the file changed while it was read")
    if tensor.dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= 16
        block = wide.view(np.float32)
    else:
        with np.errstate(over="ignore"):
            block = stored.astype(np.float32, copy=False)
    _refuse_not_finite(name, tensor, block)
    return block.reshape(shape if tensor.shape else ())


def _refuse_not_finite(name: str, tensor: StoredTensor, block: Float32) -> None:
    # Extremes and not isfinite of every value: no second array as long as all is well.
    if block.size == 0 or (np.isfinite(block.min()) and np.isfinite(block.max())):
        return
    bad = int(np.count_nonzero(~np.isfinite(block)))
    raise BadInput(
        f"{name} in {tensor.file.name} has {bad} values that are NaN or infinite",
        "such a model cannot be quantized, and its output would be NaN",
        "export a checkpoint whose training did not diverge",
    )


def _read_headers(folder: Path, packed: bool) -> dict[str, StoredTensor]:
    """All tensors of a model folder, by the index if there is one."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise BadInput(
            f"{folder.name} has {SINGLE} and {INDEX}",
            "they may hold different weights",
            "remove the one that is out of date",
        )
    if single.exists():
        return read_header(single, packed)
    if index.exists():
        return _read_shards(folder, index, packed)
    raise _no_weights(folder)


def _read_shards(folder: Path, index: Path, packed: bool) -> dict[str, StoredTensor]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(f, str) for f in mapping.values()):
        raise BadInput(
            f"{INDEX} has no weight_map", "it must map every tensor to its file", f"mend {index}"
        )
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(mapping.values())):
        if not _SHARD.fullmatch(shard):
            raise BadInput(
                f"{INDEX} names the file {shard!r}",
                "a shard must be a safetensors file of the same folder; other paths are unsafe",
                "do not use this model, or correct its index",
            )
        if not (folder / shard).exists():
            raise BadInput(f"{shard} is missing", f"{INDEX} names it", f"download it into {folder}")
        tensors = read_header(folder / shard, packed)
        named = {name for name, file in mapping.items() if file == shard}
        if odd := sorted(named ^ tensors.keys()):
            holder, other = (INDEX, shard) if odd[0] in named else (shard, INDEX)
            raise BadInput(
                f"{odd[0]} is in {holder} and not in {other}",
                f"index and shard disagree about {len(odd)} tensors",
                "download the index and all shards again, from one revision",
            )
        found |= tensors
    return found


def _no_weights(folder: Path) -> BadInput:
    if pickles := [path.name for path in _matching(folder, PICKLES)]:
        return BadInput(
            f"{folder.name} has weights as pickle files only ({', '.join(pickles[:3])})",
            "reading a pickle can run any code, so they are never read",
            "save the model again with safe_serialization=True",
        )
    if others := [path.name for path in _matching(folder, ("*.safetensors",))]:
        return BadInput(
            f"{folder.name} has neither {SINGLE} nor {INDEX}",
            f"it has {', '.join(others[:3])}",
            "give the folder of a whole model, with its index",
        )
    return BadInput(
        f"{folder.name} has no weights",
        f"there is neither {SINGLE} nor {INDEX} in it",
        "give the folder of a model with safetensors weights",
    )


def _matching(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Files of the folder itself, each once, in the order of their names."""
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name.lower(), pattern.lower()) for pattern in patterns):
            yield path


def _check_files(folder: Path) -> None:
    """Refuse pointers, pipes, and links that leave the folder (a hub cache links to its blobs)."""
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir():
        root = root.parents[1]
    for path in _matching(folder, (*MODEL_FILES, "*.safetensors")):
        if not path.resolve().is_relative_to(root):
            raise BadInput(
                f"{path.name} is a link out of the model's folder",
                f"it leads to {path.resolve()}",
                "replace the link by the file itself",
            )
        if not path.is_file():
            raise BadInput(
                f"{path.name} is not a file", "it is a folder or a broken link", f"mend {path}"
            )
        refuse_lfs_pointer(path)


def _refuse_adapter(folder: Path) -> None:
    """transformers would run the adapter, on another base, wherever this folder is opened."""
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"{folder.name} holds an adapter (adapter_config.json)",
            "a model and an adapter are folders of their own",
            "give the base as MODEL and this folder with --adapter NAME=PATH",
        )


def _download(name: str, revision: str | None, offline: bool) -> Path:
    """The folder of a hub model in the local cache, downloaded first unless `offline`."""
    if not _HUB_ID.fullmatch(name):
        raise UsageError(
            f"{name} does not exist",
            "it is neither a folder here nor a hub id such as owner/model",
            "check the path",
        )
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's

    unknown = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    try:
        return Path(
            snapshot_download(
                name, revision=revision, local_files_only=offline, allow_patterns=list(MODEL_FILES)
            )
        )
    except (*unknown, errors.HFValidationError) as error:
        raise UsageError(
            f"{name} is no folder here and no model on the hub",
            str(error).strip().partition("\n")[0],
            "check the name and --revision; for a gated model, log in with `hf auth login`",
        ) from error
    except (HTTPError, OSError) as error:
        place = "in the local cache" if offline else "to be had from the hub"
        raise EnvironmentFailed(
            f"{name} is no folder here and not {place}",
            "--offline never reaches out" if offline else str(error).strip().partition("\n")[0],
            "run once without --offline" if offline else "check the network and the free disk",
        ) from error


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(f"{path.name} is damaged", why, f"download {path} again")
