"""The folder that ships: its manifest, its digests, and a swap that a kill cannot break.

`building` makes a bundle in a hidden sibling folder and exchanges it with the old one in one
step, under a lock. At every moment the destination is the old bundle or the new one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import BadInput, BudgetExceeded, EnvironmentFailed, UsageError, ValidationFailed

SCHEMA = "slimport.bundle/1"
MANIFEST = "manifest.json"
# What is measured of this machine: not in the manifest, so that two exports are the same bytes.
UNLISTED = frozenset({"report/measurements.json", "report/report.html"})
_MANIFEST_LIMIT = 16 << 20  # bytes; a larger one is not ours
_WORK = ".work-"
# Beside what is half made and can be taken up again: a run that is killed or stopped leaves it, and
# the next one for the same destination finds it in the folder that it is given.
UNFINISHED = "unfinished.json"


# ---- the manifest ----


def canonical_json(value: Any) -> bytes:
    """Sorted keys, two spaces, a newline at the end; a NaN or an infinity raises ValueError."""
    words = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return words.encode() + b"\n"


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Write manifest.json over every file in `folder`; returns what it says.

    `fields` may not set "schema", "files" or "bundle_digest": they are computed here.
    """
    files = [
        {"path": path, "bytes": (folder / path).stat().st_size, "sha256": sha256(folder / path)}
        for path in _listed(folder)
    ]
    manifest = {**fields, "schema": SCHEMA, "files": files}
    manifest["bundle_digest"] = bundle_digest(manifest)
    (folder / MANIFEST).write_bytes(canonical_json(manifest))
    return manifest


def bundle_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over a manifest without its own digest: one name for all that a bundle holds."""
    rest = {key: value for key, value in manifest.items() if key != "bundle_digest"}
    return "sha256:" + hashlib.sha256(canonical_json(rest)).hexdigest()


def sha256(path: Path) -> str:
    """The sha256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> list[str]:
    """Every file that a manifest lists, as sorted POSIX paths; links and devices are refused."""
    found = []
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            kind = path.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise _bad(relative, "it is a link or a device; a bundle has plain files only")
            if stat.S_ISREG(kind) and relative != MANIFEST and relative not in UNLISTED:
                found.append(relative)
    return sorted(found)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, checked for its shape but not against the files.

    Raises:
        UsageError: no such folder.
        BadInput: no manifest, or not one of ours.
    """
    recover(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "a bundle is one", "give an exported bundle")
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise _bad(MANIFEST, "it is missing, or not a plain file")
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise _bad(MANIFEST, f"it is larger than {_MANIFEST_LIMIT} bytes")
        manifest = json.loads(path.read_bytes())
        _check_shape(manifest)
    except (ValueError, RecursionError) as error:
        raise _bad(MANIFEST, f"it is not JSON: {error}") from error
    except OSError as error:
        raise _bad(MANIFEST, f"it cannot be read: {error.strerror}") from error
    return dict(manifest)


def _check_shape(manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise _bad(MANIFEST, f"its schema is not {SCHEMA}")
    files = manifest.get("files")
    if not isinstance(files, list):
        raise _bad(MANIFEST, "it has no list of files")
    types = {"path": str, "bytes": int, "sha256": str}
    for entry in files:
        if not isinstance(entry, dict) or {key: type(entry[key]) for key in entry} != types:
            raise _bad(MANIFEST, f"an entry of files is not path, bytes and sha256: {entry!r:.80}")
    paths = [entry["path"] for entry in files]
    if paths != sorted(set(paths)):
        raise _bad(MANIFEST, "its files are not in order, or one stands twice")
    if manifest.get("bundle_digest") != bundle_digest(manifest):
        raise _bad(MANIFEST, "it was altered: its bundle_digest is another")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle whose every file is exactly what the manifest says.

    Raises:
        UsageError: no such folder.
        BadInput: a malformed manifest; a missing, extra, altered or unsafe file, by its name.
    """
    manifest = read_manifest(folder)
    present = set(_listed(folder))
    for entry in manifest["files"]:
        path = entry["path"]
        if path not in present:  # a path that leaves the folder is never among them
            raise _bad(path, "the manifest lists it and it is not there")
        present.remove(path)
        try:
            if (count := (folder / path).stat().st_size) != entry["bytes"]:
                raise _bad(path, f"it has {count} bytes, the manifest says {entry['bytes']}")
            if sha256(folder / path) != entry["sha256"]:
                raise _bad(path, "its sha256 is not that of the manifest")
        except OSError as error:
            raise _bad(path, f"it cannot be read: {error.strerror}") from error
    if present:
        raise _bad(min(present), "the manifest does not list it")
    return manifest


def _bad(path: str, why: str) -> BadInput:
    return BadInput(f"bundle file {path!r}", why, "export the bundle again")


# ---- building and swapping ----


@contextmanager
def building(destination: Path) -> Iterator[Path]:
    """A new folder that becomes `destination` when the block ends well.

    The caller writes its files and, last, `write_manifest`. When the block raises
    ValidationFailed or BudgetExceeded, the folder is kept as `<destination>.failed`; after any
    other error it is removed. Folders that killed runs left behind are removed at the start.

    Raises:
        UsageError: another export holds the lock, or what stands there is not a bundle of ours.
        EnvironmentFailed: disk full, read-only, out of reach.
    """
    destination = destination.absolute()
    failed = destination.with_name(f"{destination.name}.failed")
    with _beside(destination) as folder:
        _refuse_foreign(destination)
        _refuse_foreign(failed)
        try:
            yield folder
            _swap(folder, destination)
        except (ValidationFailed, BudgetExceeded) as error:
            if not _is_ours(folder):
                write_manifest(folder, {"validated": False, "failed": str(error)})
            _swap(folder, failed)
            raise
        shutil.rmtree(failed, ignore_errors=True)  # an earlier one, now superseded


@contextmanager
def replacing(destination: Path, resumes: bool = False) -> Iterator[Path]:
    """A new folder that becomes `destination` when the block ends well; else it is removed.

    Locked, flushed to the disk and swapped as bundles are. The caller has checked that what stands
    there may be replaced.

    Args:
        resumes: the folder has in it what a stopped run left UNFINISHED.

    Raises:
        UsageError: another run holds the lock.
        EnvironmentFailed: disk full, read-only, out of reach.
    """
    destination = destination.absolute()
    with _beside(destination, resumes) as folder:
        yield folder
        (folder / UNFINISHED).unlink(missing_ok=True)
        _swap(folder, destination)


@contextmanager
def _beside(destination: Path, resumes: bool = False) -> Iterator[Path]:
    """A hidden sibling folder under the destination's lock, gone at the end."""
    with _explained(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination):
            folder = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
            _clean_up(destination, folder if resumes else None)
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            except BaseException as error:
                if not goes_on(folder, error):
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)


def goes_on(folder: Path, error: BaseException) -> bool:
    """Whether work in `folder` can be taken up again: `error` stopped it, or something ran out."""
    stopped = not isinstance(error, Exception)
    stopped |= isinstance(error, EnvironmentFailed | OSError | MemoryError)
    return stopped and (folder / UNFINISHED).exists()


@contextmanager
def work_folder(output: Path, resumes: bool = False) -> Iterator[Path]:
    """Room on the disk of `output` for what lies between two stages; gone at the end.

    What a killed run left behind is removed first: its lock went with its process. An `output`
    that was not there and stays empty goes too. What is UNFINISHED in it stays if this run is
    stopped.

    Args:
        resumes: such a folder of an earlier run is moved here, under its name.

    Raises:
        EnvironmentFailed: disk full, read-only, out of reach.
    """
    output = output.absolute()
    with _explained(output / "work"), ExitStack() as stack:
        if not output.exists():
            stack.callback(_remove_empty, output)
        while (work := _settle(output, stack)) is None:
            pass
        stale = [path for path in output.glob(f"{_WORK}*") if path != work]
        for folder in sorted(stale, key=_age):
            # FileNotFoundError: its run ended just now and took the folder along.
            with suppress(FileNotFoundError), _open_lock(folder / "lock") as lock:
                if lock is None:
                    continue
                if resumes:
                    _adopt(folder, work)
                shutil.rmtree(folder, ignore_errors=True)
        yield work


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _adopt(stale: Path, work: Path) -> None:
    """What is unfinished in `stale` moves to `work`, if that has nothing of its name."""
    for mark in stale.glob(f"*/{UNFINISHED}"):
        if not (work / mark.parent.name).exists():
            mark.parent.rename(work / mark.parent.name)


def _settle(output: Path, stack: ExitStack) -> Path | None:
    """A new locked folder in `output`, both until `stack` ends; None if another run swept it."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        work = Path(tempfile.mkdtemp(prefix=_WORK, dir=output))
        lock = stack.enter_context(_open_lock(work / "lock"))
    except FileNotFoundError:  # swept before it was locked, or its folder was empty and went
        return None
    if lock is None or not (work / "lock").exists():  # being swept, or swept while it was locked
        return None
    stack.push(partial(_clear, work))
    return work


def _clear(
    work: Path,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Remove a work folder, but for what can be taken up again."""
    kept = [path for path in work.glob("*") if error is not None and goes_on(path, error)]
    if not kept:
        shutil.rmtree(work, ignore_errors=True)
    for path in work.glob("*"):
        if path.is_dir() and path not in kept:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file():
            path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something, or is gone
        folder.rmdir()


def recover(destination: Path) -> None:
    """Put the old folder back if a kill fell between the two renames of `_exchange`'s fallback.

    Whoever opens a bundle or a quantized checkpoint calls it; without such an accident it does
    nothing.
    """
    destination = destination.absolute()
    previous = _previous(destination)
    if previous.exists() and not destination.exists():
        with _explained(destination), _locked(destination):
            if not destination.exists():
                previous.rename(destination)


def _previous(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.previous")


def _clean_up(destination: Path, folder: Path | None) -> None:
    """Undo what killed runs left; while the lock is held nobody else can be using it.

    What the last of them left unfinished becomes `folder`, if there is one.
    """
    previous = _previous(destination)
    if previous.exists() and not destination.exists():
        previous.rename(destination)
    names = (previous.name, f".{destination.name}.partial-")
    stale = [path for path in destination.parent.iterdir() if path.name.startswith(names)]
    unfinished = [path for path in stale if folder and (path / UNFINISHED).exists()]
    kept = min(unfinished, key=_age, default=None)
    for path in stale:
        if path != kept:
            shutil.rmtree(path)
    if folder and kept:
        kept.rename(folder)


def _swap(folder: Path, destination: Path) -> None:
    """Put `folder`, safe on the disk, in the place of `destination`, and the old one at `folder`.

    Where the file system cannot exchange two folders (some network mounts) there are two renames;
    a kill between them leaves the old bundle at `_previous`, from where `recover` takes it back.
    """
    _sync_tree(folder)
    if not destination.exists():
        folder.rename(destination)
    elif not _exchange(folder, destination):
        previous = _previous(destination)
        destination.rename(previous)
        folder.rename(destination)
        previous.rename(folder)
    _sync(destination.parent)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders trade places in one step (`man 2 renameat2`); False where that cannot be."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync_tree(folder: Path) -> None:
    """fsync every file and folder: what the swap shows must be on the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_foreign(destination: Path) -> None:
    """Never replace what we did not write: a folder must be empty or have our manifest."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        why = "it is not a folder"
    elif destination.is_dir() and any(destination.iterdir()) and not _is_ours(destination):
        why = f"it has no {MANIFEST} of {SCHEMA}"
    else:
        return
    raise UsageError(
        f"{destination} is not replaced", why, "give another --output, or move it away"
    )


def _is_ours(folder: Path) -> bool:
    """Whether a manifest here names our schema; altered files do not matter."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            manifest = json.loads(file.read(_MANIFEST_LIMIT))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("schema") == SCHEMA


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """Hold the lock of a destination; the system lets go of it when the process dies.

    The file stays: removing it would let two processes lock two files of one name.
    """
    path = destination.with_name(f".{destination.name}.lock")
    with _open_lock(path) as lock:
        if lock is None:
            raise UsageError(
                f"{destination} is being written by another export",
                f"it holds the lock {path.name}",
                "wait for it, or give another --output",
            )
        yield


@contextmanager
def _open_lock(path: Path) -> Iterator[int | None]:
    """A locked descriptor, or None while another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except BlockingIOError:
        locked = False
    try:
        yield descriptor if locked else None
    finally:
        os.close(descriptor)


_CURES = {
    errno.ENOSPC: "free some space, or give another --output",
    errno.EDQUOT: "free some of your quota, or give another --output",
    errno.EROFS: "give an --output that can be written",
    errno.EACCES: "give an --output that can be written",
    errno.EPERM: "give an --output that can be written",
    errno.ENOTDIR: "give an --output whose parents are folders",
    errno.EBUSY: "give an --output that is not a mount point",
    errno.EXDEV: "give an --output that is not a mount point",
    errno.EIO: "check the disk, or give another --output",
}


@contextmanager
def _explained(destination: Path) -> Iterator[None]:
    """What the disk refuses beside `destination`, as EnvironmentFailed."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename or destination.parent)
        ours = place.is_relative_to(destination.parent) or place in destination.parents
        if error.errno not in _CURES or not ours:
            raise
        raise EnvironmentFailed(
            f"{destination} cannot be written", f"{error.strerror}: {place}", _CURES[error.errno]
        ) from error
