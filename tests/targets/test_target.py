"""Device profiles: the shipped ones load, a user's own is read as strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimport.errors import UsageError
from slimport.targets.target import Limit, Target, load_target, names


@pytest.mark.parametrize("name", names())
def test_shipped_profiles(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    if target.hexagon is None:
        assert target.prompt_lengths == (200, 400, 600, 800, 1000)
    assert max(target.prompt_lengths) < target.context_length
    for limit in (*target.budgets.values(), *target.limits.values()):
        assert limit.limit > 0 and limit.source
    assert {"device_bytes", "memory_bytes", "kl_mean"} <= target.budgets.keys()
    # The App Store limits what an app takes, Google Play what is downloaded.
    assert ("download_bytes" in target.budgets) == (target.platform == "android")


def test_a_device_extends_its_platform() -> None:
    phone, platform = load_target("galaxy-s24"), load_target("android")
    assert phone.containers == platform.containers == ("gguf", "onnx")
    assert phone.isa == ("arm64", "dotprod", "i8mm")
    assert phone.budgets["memory_bytes"].limit > platform.budgets["memory_bytes"].limit
    assert phone.budgets["download_bytes"] == platform.budgets["download_bytes"]
    assert phone.to_json()["budgets"]["top1"]["limit"] == 0.85


def test_an_npu_has_its_processor_and_all_of_the_model() -> None:
    assert load_target("android").hexagon is None
    for name, hexagon in {"": 73, "-v75": 75, "-v79": 79, "-v81": 81}.items():
        target = load_target(f"android-qnn{name}")
        assert (target.hexagon, target.containers) == (hexagon, ("qnn",))
        assert target.budgets["npu_nodes"].limit == target.budgets["npu_weight_bytes"].limit == 1
        assert Target.from_json(json.loads(json.dumps(target.to_json()))) == target


def test_a_gpu_has_its_container_and_cache() -> None:
    target = load_target("android-onnx-gpu")
    assert (target.containers, target.kv_cache) == (("onnx-fp16",), "f16")
    assert "GPU" in target.title
    target = load_target("android-gpu")
    assert (target.containers, target.kv_cache) == (("executorch-vulkan",), "f32")
    assert target.budgets["gpu_nodes"].limit == target.budgets["gpu_weight_bytes"].limit == 1
    assert "GPU" in target.title


@pytest.mark.parametrize(("name", "ios"), [("ios", 18), ("ios18-gpu", 18), ("ios26", 26)])
def test_an_iphone_has_its_release(name: str, ios: int) -> None:
    target = load_target(name)
    assert (target.platform, target.ios, target.kv_cache) == ("ios", ios, "f16")
    assert target.containers[0] == "coreml" and "gguf" in target.containers
    assert target.context_length == 1024 and "iPhone" in target.title
    assert target.budgets["device_bytes"].limit == target.limits["store_module"].limit == 4e9
    assert target.hexagon is None and load_target("android").ios is None
    assert Target.from_json(json.loads(json.dumps(target.to_json()))) == target


def test_profiles_of_one_platform_differ_where_they_say_so() -> None:
    phone, gpu, newer = (load_target(name) for name in ("ios", "ios18-gpu", "ios26"))
    assert "GPU" in gpu.title and "iOS 26" in newer.title
    assert gpu.budgets == phone.budgets == newer.budgets and gpu.limits == newer.limits


def test_play_limits() -> None:
    limits = load_target("android").limits
    assert limits["store_module"].limit == 200_000_000
    assert limits["store_pack"].limit == 1_500_000_000
    assert limits["page"].limit == 16384


def test_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "watch.toml").write_text(
        'extends = "base.toml"\n[budgets.memory_bytes]\nlimit = "90 MB"\nsource = "measured"'
    )
    (tmp_path / "base.toml").write_text('extends = "galaxy-s24"\ncontext_length = 64')
    target = load_target(str(tmp_path / "watch.toml"))
    assert (target.name, target.context_length) == ("watch", 64)
    assert target.budgets["memory_bytes"] == Limit(90_000_000, "measured")
    assert target.isa[-1] == "i8mm"
    monkeypatch.chdir(tmp_path)
    assert load_target("watch.toml") == target


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('extends = "android"\ncontext = 3', "mine.toml: context is not a key"),
        ('extends = "android"\n[budgets.size]\nlimit = 3', "budgets.size is not a key"),
        ('extends = "android"\n[limits.heap]\nlimit = 3', "limits.heap is not a key"),
        ('extends = "android"\n[budgets.top1]\nlimit = 0.9', "mine.toml: budgets.top1"),
        ('extends = "android"\n[budgets.top1]\nlimit = 9\nsource = "x"', "budgets.top1.limit is 9"),
        ('extends = "android"\nprompt_lengths = [0]', "prompt_lengths is 0"),
        ('extends = "android"\nprompt_lengths = 9', "prompt_lengths is 9"),
        ('extends = "android"\nhexagon = 74', "hexagon is 74"),
        ('extends = "android"\nhexagon = true', "hexagon is True"),
        ('extends = "android"\nhexagon = "v73"', "hexagon is 'v73'"),
        ('extends = "ios"\nios = 17', "mine.toml: ios is 17"),
        ('extends = "ios"\nios = true', "ios is True"),
        ('extends = "ios"\nios = "18"', "ios is '18'"),
        ('extends = "ios"\nios = [26]', "ios is [26]"),
        ('extends = "mine.toml"', "mine.toml extends itself"),
        ('extends = "nokia"', "no target 'nokia'"),
        ('title = "x"', "mine.toml has no budgets, containers"),
    ],
)
def test_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError) as raised:
        load_target(str(tmp_path / "mine.toml"))
    assert words in raised.value.what


def test_a_circle_of_two(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(UsageError, match=r"a\.toml > b\.toml > a\.toml"):
        load_target(str(tmp_path / "a.toml"))


@pytest.mark.parametrize("name", ["nokia", "absent.toml", "../targets/android", ""])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(UsageError, match=r"android, .*, android-qnn, .*, galaxy-s24"):
        load_target(name)
