"""The layout: what ships, what may be imported at start-up, what a wheel holds."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = set(
    """torch numpy numba transformers peft gguf tokenizers rich jinja2 onnx onnx_ir onnxruntime
    onnxruntime_genai onnxruntime_qnn""".split()
)
NOT_SHIPPED = {"tests", "examples", "benchmarks", "docs", "build", "dist"}


def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_list_is_the_folders() -> None:
    folders = {
        ".".join(("slimport", *init.parent.relative_to(ROOT).parts))
        for init in ROOT.rglob("__init__.py")
        if not any(
            part in NOT_SHIPPED or part.startswith(".") for part in init.relative_to(ROOT).parts
        )
    }
    assert folders == set(_pyproject()["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from slimport.cli import main; code = main(sys.argv[1:]);"
        "sys.stderr.write(' '.join(sorted({m.partition('.')[0] for m in sys.modules})));"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(done.stderr.split())
    assert "slimport" in done.stdout


def test_constraints_name_versions_and_no_addresses() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            assert name and version and not set("/:@+ ") & set(line), line


def test_every_dependency_has_an_exact_version() -> None:
    pinned = {
        line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = _pyproject()
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    names = {need.replace("==", ">=").partition(">=")[0].strip() for need in wanted}
    assert names <= pinned


def test_the_built_wheel_works_in_an_empty_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    built = tmp_path / "built"
    # A copy: setuptools writes build/ and *.egg-info beside the sources.
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True
    ).stdout
    for name in filter(None, tracked.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and not name.startswith("examples/"):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "slimport/targets/android.toml" in names
    assert "slimport/py.typed" in names
    assert not any(name.startswith(("slimport/tests", "tests", "examples")) for name in names)
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import slimport.cli as cli;"
        "print(cli.__file__); cli.main(['targets'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert str(site) in done.stdout and "android" in done.stdout
