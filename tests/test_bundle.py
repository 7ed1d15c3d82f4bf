"""The manifest refuses every alteration; the swap survives every kill."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import bundle
from slimport.errors import (
    BadInput,
    BudgetExceeded,
    EnvironmentFailed,
    UsageError,
    ValidationFailed,
)


def fill(folder: Path, version: str, files: int = 4) -> None:
    for index in range(files):
        path = folder / f"part{index % 2}" / f"{index}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"{version}-{index}".encode() * 999)
    (folder / "report").mkdir()
    (folder / "report" / "measurements.json").write_text(version)
    bundle.write_manifest(folder, {"version": version, "validated": True})


def export(destination: Path, version: str) -> None:
    with bundle.building(destination) as folder:
        fill(folder, version)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    destination = tmp_path / "dist" / "android"
    export(destination, "one")
    return destination


def leftovers(destination: Path) -> list[str]:
    names = {path.name for path in destination.parent.iterdir()}
    return sorted(names - {destination.name, f".{destination.name}.lock"})


# ---- manifest ----


def test_manifest_lists_every_file_but_the_measured_ones(good: Path) -> None:
    manifest = bundle.verify(good)
    assert manifest["schema"] == "slimport.bundle/1"
    assert [entry["path"] for entry in manifest["files"]] == [
        "part0/0.bin",
        "part0/2.bin",
        "part1/1.bin",
        "part1/3.bin",
    ]
    assert manifest["files"][0]["bytes"] == len("one-0") * 999
    (good / "report/measurements.json").write_text("another machine")
    assert bundle.verify(good) == manifest


def test_the_same_files_give_the_same_bytes(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    export(other, "one")
    assert (good / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def test_digest_of_a_manifest_worked_by_hand() -> None:
    # printf '{\n  "a": 1\n}\n' | sha256sum
    expected = "sha256:5e36b6560513586ced65eca0e8b025fe88edbcab82ba2cb67a5fcb2d7b202383"
    digest = bundle.bundle_digest({"a": 1, "bundle_digest": "x"})
    assert bundle.canonical_json({"a": 1}) == b'{\n  "a": 1\n}\n'
    assert digest == expected


def alter(folder: Path) -> None:
    path = folder / "part0/0.bin"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


def edited(change: Callable[[dict[str, Any]], Any], seal: bool = True) -> Callable[[Path], None]:
    """Change the manifest; `seal` makes its digest right again."""

    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_bytes())
        change(manifest)
        if seal:
            manifest["bundle_digest"] = bundle.bundle_digest(manifest)
        path.write_bytes(bundle.canonical_json(manifest))

    return apply


def entry(path: str) -> dict[str, Any]:
    return {"path": path, "bytes": 0, "sha256": "0" * 64}


def link(folder: Path) -> None:
    (folder / "part0/0.bin").unlink()
    (folder / "part0/0.bin").symlink_to("/etc/hostname")


ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (alter, "part0/0.bin"),
    "truncated": (lambda f: (f / "part0/0.bin").write_bytes(b"one"), "has 3 bytes"),
    "missing": (lambda f: (f / "part1/3.bin").unlink(), "part1/3.bin"),
    "extra": (lambda f: (f / "part1/new.so").write_bytes(b""), "part1/new.so"),
    "link": (link, "part0/0.bin"),
    "linked folder": (lambda f: (f / "more").symlink_to("/etc"), "more"),
    "pipe": (lambda f: os.mkfifo(f / "pipe"), "pipe"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "missing"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), "not JSON"),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "not JSON"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 99999), "not JSON"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "schema"),
    "another schema": (edited(lambda m: m.update(schema="slimport.bundle/9")), "schema"),
    "no files": (edited(lambda m: m.pop("files")), "no list of files"),
    "odd entry": (edited(lambda m: m["files"].append({"path": 3})), "entry of files"),
    "twice": (edited(lambda m: m["files"].append(m["files"][-1])), "stands twice"),
    "out of order": (edited(lambda m: m["files"].reverse()), "not in order"),
    "leaves the folder": (edited(lambda m: m["files"].insert(0, entry("../x"))), "../x"),
    "absolute": (edited(lambda m: m["files"].insert(0, entry("/etc/passwd"))), "/etc/passwd"),
    "edited field": (edited(lambda m: m.update(validated=False), seal=False), "altered"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_verify_names_what_is_wrong(good: Path, attack: str) -> None:
    change, words = ATTACKS[attack]
    change(good)
    with pytest.raises(BadInput, match=words) as raised:
        bundle.verify(good)
    assert raised.value.exit_code == 7


def test_verify_refuses_a_path_that_is_no_text(good: Path) -> None:
    text = (good / "manifest.json").read_text()
    (good / "manifest.json").write_text(text.replace("part0/0.bin", "\\ud800"))
    with pytest.raises(BadInput, match=r"manifest\.json"):
        bundle.verify(good)


def test_verify_refuses_a_giant_manifest(good: Path) -> None:
    with (good / "manifest.json").open("r+b") as file:
        file.truncate(17 << 20)
    with pytest.raises(BadInput, match="larger than"):
        bundle.verify(good)


def test_verify_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        bundle.verify(tmp_path / "absent")


# ---- building ----


def test_a_new_bundle_replaces_the_old_and_leaves_nothing(good: Path) -> None:
    export(good, "two")
    assert bundle.verify(good)["version"] == "two"
    assert leftovers(good) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_keeps_the_old_bundle(good: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), bundle.building(good) as folder:
        fill(folder, "two")
        raise error
    assert bundle.verify(good)["version"] == "one"
    assert leftovers(good) == []


@pytest.mark.parametrize("error", [ValidationFailed, BudgetExceeded])
@pytest.mark.parametrize("written", [True, False])
def test_a_bundle_that_fails_its_checks_is_kept_apart(
    good: Path, error: type[Exception], written: bool
) -> None:
    for version in ("two", "three"):  # the second replaces the first
        with pytest.raises(error), bundle.building(good) as folder:
            if written:
                fill(folder, version)
            raise error("top1 0.7", "the floor is 0.9", "take another grid")
        failed = bundle.verify(good.with_name("android.failed"))
        if written:
            assert failed["version"] == version
        else:
            assert failed["validated"] is False and "top1 0.7" in failed["failed"]
    assert bundle.verify(good)["version"] == "one"
    assert leftovers(good) == ["android.failed"]


@pytest.mark.parametrize("name", ["android", "android.failed"])
@pytest.mark.parametrize("manifest", [None, "{", '{"schema": "npm"}'])
def test_a_foreign_folder_is_never_replaced(
    tmp_path: Path, name: str, manifest: str | None
) -> None:
    foreign = tmp_path / name
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (foreign / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match="not replaced"):
        export(tmp_path / "android", "one")
    assert (foreign / "thesis.tex").read_text() == "years of work"


def test_a_file_or_a_link_is_never_replaced(good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(good)
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="not a folder"):
            export(tmp_path / name, "two")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "android").mkdir()
    export(tmp_path / "android", "one")
    assert bundle.verify(tmp_path / "android")["version"] == "one"


def test_two_exports_to_one_folder(good: Path) -> None:
    with bundle.building(good) as folder:
        with pytest.raises(UsageError, match="another export"):
            export(good, "three")
        fill(folder, "two")
    assert bundle.verify(good)["version"] == "two"


def test_targets_side_by_side_do_not_wait_or_clean_each_other(good: Path) -> None:
    with bundle.building(good.with_name("android.v2")) as one, bundle.building(good) as other:
        fill(other, "two")
        fill(one, "three")
    assert bundle.verify(good)["version"] == "two"
    assert bundle.verify(good.with_name("android.v2"))["version"] == "three"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_the_disk_refuses(good: Path, code: int) -> None:
    with pytest.raises(EnvironmentFailed) as raised, bundle.building(good) as folder:
        raise OSError(code, os.strerror(code), str(folder / "model.gguf"))
    assert raised.value.exit_code == 8
    assert bundle.verify(good)["version"] == "one"


def test_a_file_elsewhere_that_cannot_be_read_is_not_blamed_on_the_bundle(good: Path) -> None:
    with pytest.raises(PermissionError), bundle.building(good):
        raise PermissionError(errno.EACCES, "denied", "/models/secret.safetensors")


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "dist").write_text("")
    with pytest.raises(EnvironmentFailed):
        export(tmp_path / "dist" / "sub" / "android", "one")


def test_swap_without_exchange(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_exchange", lambda *_: False)
    export(good, "two")
    assert bundle.verify(good)["version"] == "two"
    assert leftovers(good) == []


# ---- kill -9 ----


def in_child(work: Callable[[], Any]) -> int:
    """Fork, and do `work` in the child; returns the child's id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def die_before(step: int) -> None:
    """From now on, SIGKILL this process before its step-th call that changes the disk."""
    taken = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(taken) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "mkdir", "fsync", "unlink", "rmdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
    bundle._exchange = counted(bundle._exchange)


@pytest.mark.parametrize("exchange", [True, False])
def test_kill_before_every_step(
    good: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the renames too: old or new is whole, and the next export cleans up."""
    if not exchange:
        monkeypatch.setattr(bundle, "_exchange", lambda *_: False)

    def killed_export(step: int) -> bool:
        def work() -> None:
            die_before(step)
            export(good, f"new {step}")

        _, status = os.waitpid(in_child(work), 0)
        return os.WIFSIGNALED(status)

    old, seen = "one", {"old": 0, "new": 0}
    for step in itertools.count(1):
        if not killed_export(step):
            break
        version = bundle.verify(good)["version"]
        assert version in (old, f"new {step}")
        seen["old" if version == old else "new"] += 1
        old = version
    assert bundle.verify(good)["version"] == f"new {step}"
    assert leftovers(good) == []
    assert seen["old"] > 15 and seen["new"] > 5, seen


def test_kill_at_random_moments(good: Path) -> None:
    chance = random.Random(20)
    start = time.monotonic()
    export(good, "before")
    usual = time.monotonic() - start
    versions = []

    def exports(kill: int) -> None:
        for count in itertools.count():
            export(good, f"{kill}-{count}")

    for kill in range(60):
        child = in_child(lambda kill=kill: exports(kill))
        time.sleep(chance.uniform(0, 2 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        versions.append(bundle.verify(good)["version"])
    assert len(set(versions)) > 2, versions  # some exports came to their end
    export(good, "last")
    assert leftovers(good) == []


# ---- work folders ----


def test_work_folders_side_by_side_do_not_sweep_each_other(tmp_path: Path) -> None:
    with bundle.work_folder(tmp_path) as one, bundle.work_folder(tmp_path) as other:
        assert one != other and one.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".work-dead").mkdir()
    (tmp_path / ".work-dead" / "oracle.npy").write_bytes(b"x")
    with bundle.work_folder(tmp_path) as work:
        assert [path.name for path in tmp_path.iterdir()] == [work.name]


STOPPED = [KeyboardInterrupt(), SystemExit(143), EnvironmentFailed("full", "no room", "free it")]


@pytest.mark.parametrize("error", STOPPED, ids=lambda error: type(error).__name__)
def test_unfinished_work_is_found_by_the_next_run(tmp_path: Path, error: BaseException) -> None:
    output = tmp_path / "dist"
    with pytest.raises(type(error)), bundle.work_folder(output) as work:
        for name in ("quantized", "other"):
            (work / name).mkdir()
            (work / name / "shard").touch()
        (work / "quantized" / bundle.UNFINISHED).touch()
        (work / "oracle.npy").touch()
        raise error
    (left,) = output.iterdir()
    assert {path.name for path in left.rglob("*")} == {"quantized", "shard", bundle.UNFINISHED}
    with bundle.work_folder(output, resumes=True) as other:
        assert (other / "quantized" / "shard").exists()
        assert [path.name for path in output.iterdir()] == [other.name]
        with bundle.work_folder(output, resumes=True) as third:  # it is taken by one run alone
            assert [path.name for path in third.iterdir()] == ["lock"]
    assert not output.exists() or not list(output.iterdir())


@pytest.mark.parametrize("make", [bundle.work_folder, bundle.replacing])
def test_a_run_that_does_not_resume_sweeps_what_is_unfinished(tmp_path: Path, make: Any) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "dist") as folder:
        (folder / "quantized").mkdir()
        for place in (folder, folder / "quantized"):
            (place / bundle.UNFINISHED).touch()
        raise KeyboardInterrupt
    assert folder.exists()
    with make(tmp_path / "dist") as other:
        assert [path.name for path in other.iterdir() if path.name != "lock"] == []
        assert other == folder or not folder.exists()


def test_unfinished_work_that_failed_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), bundle.work_folder(tmp_path) as work:
        (work / "quantized").mkdir()
        (work / "quantized" / bundle.UNFINISHED).touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_are_unfinished_the_last_is_taken_up(tmp_path: Path) -> None:
    for name, age in (("a", 3), ("b", 1), ("c", 2)):
        folder = tmp_path / f".work-{name}"
        (folder / "quantized").mkdir(parents=True)
        (folder / "quantized" / bundle.UNFINISHED).write_text(name)
        os.utime(folder, (100 - age, 100 - age))
    with bundle.work_folder(tmp_path, resumes=True) as work:
        assert (work / "quantized" / bundle.UNFINISHED).read_text() == "b"
        assert [path.name for path in tmp_path.iterdir()] == [work.name]


def test_an_unfinished_replacement_is_found_by_the_next_one(tmp_path: Path) -> None:
    destination = tmp_path / "quantized"
    with bundle.replacing(destination) as folder:
        (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt), bundle.replacing(destination) as folder:
        (folder / "shard").touch()
        (folder / bundle.UNFINISHED).touch()
        raise KeyboardInterrupt
    assert [path.name for path in destination.iterdir()] == ["old"]
    folder.rename(tmp_path / ".quantized.partial-1")  # as if another process had made it
    with bundle.replacing(destination, resumes=True) as folder:
        assert {path.name for path in folder.iterdir()} == {"shard", bundle.UNFINISHED}
    assert [path.name for path in destination.iterdir()] == ["shard"]
    assert leftovers(destination) == []


@pytest.mark.parametrize("moment", ["before the lock", "with the lock"])
def test_a_work_folder_that_another_run_swept_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another run sees the folder before it is locked, and takes it for one that was left."""
    taken = []
    flock, make = bundle.fcntl.flock, bundle.tempfile.mkdtemp

    def sweep(*_: Any) -> None:
        if not taken:
            (folder,) = tmp_path.glob(".work-*")
            taken.append(folder.rename(tmp_path / "gone"))

    def made(**place: Any) -> str:
        folder = make(**place)
        if moment == "before the lock":
            sweep()
        return folder

    if moment == "with the lock":
        monkeypatch.setattr(bundle.fcntl, "flock", lambda *a: (sweep(), flock(*a)))
    monkeypatch.setattr(bundle.tempfile, "mkdtemp", made)
    with bundle.work_folder(tmp_path) as work:
        (work / "here").touch()
        assert (work / "lock").exists()
    assert len(taken) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["gone"]


def test_an_output_folder_that_stays_empty_is_gone(tmp_path: Path) -> None:
    output = tmp_path / "new" / "dist"
    with pytest.raises(ZeroDivisionError), bundle.work_folder(output) as work:
        assert work.parent == output
        raise ZeroDivisionError
    assert not output.exists()
    with bundle.work_folder(output):
        (output / "kept").mkdir()
    assert [path.name for path in output.iterdir()] == ["kept"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with bundle.work_folder(empty):
        pass
    assert empty.is_dir()  # it was there before
