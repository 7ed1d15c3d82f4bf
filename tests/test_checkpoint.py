"""Malformed models are refused with the right error; weights come back exactly, block by block."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slimport.checkpoint import INDEX, SINGLE, Checkpoint, read_header, read_rows
from slimport.errors import BadInput, EnvironmentFailed, SlimportError, UsageError

Damage = Callable[[Path], object]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"


@pytest.fixture
def sharded(make_model: Any, tmp_path: Path) -> Path:
    source = make_model("llama", shard_size="60KB", tie_word_embeddings=False)
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture
def single(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
def test_weights_equal_those_of_the_safetensors_library(
    make_model: Any, dtype: str, shard_size: str
) -> None:
    folder = make_model("qwen3", dtype=dtype, shard_size=shard_size)
    expected: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        expected |= load_file(file)
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        rows = checkpoint.rows(name)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, tensor.float().numpy())
        np.testing.assert_array_equal(checkpoint.rows(name, 3, 9), tensor[3:9].float().numpy())
        assert checkpoint.rows(name, 5, 5).shape == (0, *tensor.shape[1:])


def test_float64_is_read_and_refused_beyond_float32(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    save_file({"a": torch.tensor([0.1, 2.0], dtype=torch.float64), "b": torch.tensor(3.0)}, file)
    tensors = read_header(file)
    assert read_rows("a", tensors["a"]).tolist() == [np.float32(0.1), 2.0]
    assert read_rows("b", tensors["b"]).shape == ()
    save_file({"a": torch.tensor([1e300], dtype=torch.float64)}, file)
    with pytest.raises(BadInput, match="NaN or infinite"):
        read_rows("a", read_header(file)["a"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found_in_the_block_that_has_them(
    single: Path, bad: float
) -> None:
    tensors = load_file(single / SINGLE)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][40, 7] = bad
    save_file(tensors, single / SINGLE)
    checkpoint = Checkpoint.open(single)
    assert checkpoint.rows(name, 0, 40).shape == (40, 96)
    with pytest.raises(BadInput, match=rf"{name} .* has 1 values") as error:
        checkpoint.rows(name, 40, 64)
    assert error.value.exit_code == 7


def test_reading_rows_allocates_no_more_than_the_block_twice(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    save_file({"table": torch.zeros(4096, 1024, dtype=torch.bfloat16)}, file)
    table = read_header(file)["table"]
    block_bytes = 64 * 1024 * 4
    tracemalloc.start()
    for start in range(0, 4096, 64):
        read_rows("table", table, start, start + 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert block_bytes < peak < 2 * block_bytes  # measured: 1.5 blocks and some kilobytes


def test_the_digest_depends_on_content_and_not_on_the_folder(sharded: Path, tmp_path: Path) -> None:
    digest = Checkpoint.open(sharded).digest()
    copy = shutil.copytree(sharded, tmp_path / "elsewhere")
    assert Checkpoint.open(copy).digest() == digest
    assert digest.startswith("sha256:")
    (copy / "README.md").write_text("no weight")
    assert Checkpoint.open(copy).digest() == digest
    shard = next(copy.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert Checkpoint.open(copy).digest() != digest


def test_name_and_licences(single: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "license-llama.md", "README.md"):
        (single / name).write_text("text")
    checkpoint = Checkpoint.open(single)
    assert checkpoint.name == "model"
    assert checkpoint.revision is None
    found = [path.name for path in checkpoint.license_files()]
    assert found == ["LICENSE", "NOTICE.txt", "license-llama.md"]


def rewrite_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def rewrite_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    edit(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def to_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def to_link(folder: Path, name: str) -> None:
    target = folder.parent / "outside"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


def truncate(file: Path, by: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-by])


def move_map(folder: Path, shard: str) -> None:
    rewrite_index(folder, lambda mapping: mapping.update({next(iter(mapping)): shard}))


def overlap(header: dict[str, Any]) -> None:
    equal = [entry for entry in header.values() if entry["shape"] == [64]]
    equal[1]["data_offsets"] = equal[0]["data_offsets"]


def gap(header: dict[str, Any]) -> None:
    for entry in header.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "pickles only": (to_pickle, "as pickle files only"),
    "no weights": (lambda f: [path.unlink() for path in f.glob("model*")], "has no weights"),
    "only an adapter": (
        lambda f: [
            *[path.unlink() for path in f.glob("model*")],
            (f / "adapter_model.safetensors").write_bytes(b""),
        ],
        "neither model.safetensors nor",
    ),
    "two sets of weights": (
        lambda f: shutil.copy(first_shard(f), f / SINGLE),
        "has model.safetensors and model.safetensors.index.json",
    ),
    "lfs shard": (lambda f: first_shard(f).write_bytes(LFS), "Git-LFS pointer"),
    "lfs config": (lambda f: (f / "config.json").write_bytes(LFS), "Git-LFS pointer"),
    "lfs tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(LFS), "Git-LFS pointer"),
    "lfs index": (lambda f: (f / INDEX).write_bytes(LFS), "Git-LFS pointer"),
    "missing config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config not utf-8": (lambda f: (f / "config.json").write_bytes(b"\xff"), "is not JSON"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "config a folder": (
        lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()],
        "is not a file",
    ),
    "missing shard": (lambda f: first_shard(f).unlink(), "is missing"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index map of numbers": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'),
        "has no weight_map",
    ),
    "index names a tensor that is not there": (
        lambda f: rewrite_index(f, lambda m: m.update(extra=first_shard(f).name)),
        f"extra is in {INDEX} and not in",
    ),
    "shard has a tensor that the index does not": (
        lambda f: rewrite_index(f, lambda m: m.pop("model.norm.weight")),
        "model.norm.weight is in .* and not in model.safetensors.index.json",
    ),
    "traversal": (lambda f: move_map(f, "../x.safetensors"), "names the file '../x.safe"),
    "absolute path": (lambda f: move_map(f, "/etc/x.safetensors"), "names the file '/etc/x"),
    "windows path": (lambda f: move_map(f, "..\\x.safetensors"), "names the file"),
    "sub folder": (lambda f: move_map(f, "a/x.safetensors"), "names the file"),
    "shard is a pickle": (lambda f: move_map(f, "pytorch_model.bin"), "names the file"),
    "link to a shard outside": (lambda f: to_link(f, first_shard(f).name), "is a link out of"),
    "link to a config outside": (lambda f: to_link(f, "config.json"), "is a link out of"),
    "broken link": (
        lambda f: [(f / "config.json").unlink(), (f / "config.json").symlink_to(f / "none")],
        "is not a file",
    ),
    "truncated shard": (lambda f: truncate(first_shard(f), 1), "its tensors end at byte"),
    "trailing bytes": (
        lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes() + b"x"),
        "its tensors end at byte",
    ),
    "empty shard": (lambda f: first_shard(f).write_bytes(b""), "does not fit into 0 bytes"),
    "huge header": (lambda f: first_shard(f).write_bytes(b"\xff" * 64), "does not fit into 64"),
    "header not json": (
        lambda f: first_shard(f).write_bytes((4).to_bytes(8, "little") + b"abcd"),
        "header is not JSON",
    ),
    "header a list": (
        lambda f: first_shard(f).write_bytes((2).to_bytes(8, "little") + b"[]"),
        "header is not a JSON object",
    ),
    "entry without offsets": (
        lambda f: rewrite_header(first_shard(f), lambda h: next(iter(h.values())).popitem()),
        "is not dtype, shape, offsets",
    ),
    "negative shape": (
        lambda f: rewrite_header(
            first_shard(f), lambda h: next(iter(h.values())).update(shape=[-1, -8])
        ),
        r"has shape \[-1, -8\]",
    ),
    "shape beyond its data": (
        lambda f: rewrite_header(
            first_shard(f), lambda h: next(iter(h.values())).update(shape=[9, 9])
        ),
        "needs 324 bytes",
    ),
    "overlap": (lambda f: rewrite_header(last_shard(f), overlap), "overlaps another tensor"),
    "gap": (lambda f: rewrite_header(first_shard(f), gap), "leaves a gap"),
    "integers": (
        lambda f: rewrite_header(
            first_shard(f), lambda h: next(iter(h.values())).update(dtype="I32")
        ),
        "has dtype I32",
    ),
    "eight-bit floats": (
        lambda f: save_file({"a": torch.zeros(8, dtype=torch.float8_e4m3fn)}, str(first_shard(f))),
        "has dtype F8_E4M3",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused(sharded: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    Checkpoint.open(sharded)
    damage(sharded)
    with pytest.raises(BadInput, match=message) as error:
        Checkpoint.open(sharded)
    assert error.value.exit_code == 7
    assert len(str(error.value).splitlines()) == 3


def test_a_file_that_shrinks_while_it_is_read_is_refused(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    last = checkpoint.names()[-1]
    truncate(single / SINGLE, 8)
    with pytest.raises(BadInput, match="changed while it was read"):
        checkpoint.rows(last)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_flipped_byte_of_a_header_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("flip") / SINGLE
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1 - 40))
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        for name, tensor in read_header(file).items():
            assert read_rows(name, tensor).shape == tensor.shape
    except SlimportError as error:
        assert error.exit_code == 7


@pytest.mark.parametrize("source", ["no-such-folder", "./owner/model", "a/b/c", "/tmp/none/here"])
def test_a_path_that_does_not_exist_is_a_usage_error(source: str) -> None:
    with pytest.raises(UsageError, match="does not exist") as error:
        Checkpoint.open(source)
    assert error.value.exit_code == 2


def test_a_file_and_a_local_revision_are_usage_errors(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        Checkpoint.open(tiny_llama / SINGLE)
    with pytest.raises(UsageError, match="revision main"):
        Checkpoint.open(tiny_llama, revision="main")


def hub_cache(root: Path, model: Path, commit: str) -> None:
    """What huggingface_hub leaves behind: blobs, and a snapshot of links to them."""
    repo = root / "models--owner--tiny"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for file in model.iterdir():
        shutil.copy(file, repo / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")


def test_a_hub_model_is_read_from_the_cache(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub_cache(tmp_path, tiny_llama, commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = Checkpoint.open("owner/tiny", offline=True)
    assert (checkpoint.name, checkpoint.revision) == ("owner/tiny", commit)
    assert checkpoint.digest() == Checkpoint.open(tiny_llama).digest()
    with pytest.raises(EnvironmentFailed, match="owner/other is no folder here") as error:
        Checkpoint.open("owner/other", offline=True)
    assert error.value.exit_code == 8


def test_a_hub_that_cannot_be_reached_or_does_not_know_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(EnvironmentFailed, match="to be had from the hub") as error:
        Checkpoint.open("owner/model")
    assert error.value.why == "no route"
    with pytest.raises(UsageError, match="no model on the hub"):
        monkeypatch.undo()
        Checkpoint.open("owner--model/name", offline=True)
