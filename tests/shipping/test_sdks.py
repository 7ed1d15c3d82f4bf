"""Backends that need a vendor's SDK are refused with its name and version."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimport.errors import DependencyMissing, Unsupported
from slimport.shipping import containers, sdks


@pytest.mark.parametrize("name", sdks.SDKS)
def test_without_its_sdk_a_backend_is_exit_6(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("QNN_SDK_ROOT", "EXYNOS_AI_LITECORE_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sdks.sys, "platform", "linux")
    with pytest.raises(DependencyMissing) as caught:
        containers.load(name)
    error = caught.value
    assert error.exit_code == 6 and sdks.SDKS[name].name in error.what
    assert f"--container {sdks.SDKS[name].instead}" in error.cure
    assert sdks.SDKS[name].instead in containers.NAMES


def test_where_an_sdk_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path / "nothing"))
    with pytest.raises(DependencyMissing, match="not a folder"):
        sdks.refuse("executorch-qnn")
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    with pytest.raises(Unsupported, match="writes nothing for it"):
        sdks.refuse("executorch-qnn")
    found = {"mtk_neuron": "8.2.23", "mtk_converter": "8.13.0+public"}
    monkeypatch.setattr(sdks, "version", found.__getitem__)
    with pytest.raises(Unsupported, match="NeuroPilot"):
        sdks.refuse("executorch-mediatek")
    found["mtk_converter"] = "8.12.0"
    with pytest.raises(DependencyMissing, match=r"mtk_converter is 8\.12\.0, not 8\.13\.0"):
        sdks.refuse("executorch-mediatek")
    monkeypatch.setattr(sdks.sys, "platform", "darwin")
    with pytest.raises(Unsupported, match="--container executorch"):
        sdks.refuse("executorch-coreml")


def test_other_names_are_not_refused_here() -> None:
    sdks.refuse("executorch")
    with pytest.raises(Unsupported, match="there is no container tflite"):
        containers.load("tflite")
