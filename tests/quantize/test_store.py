import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from slimport.architectures import decoder_config, weights
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, EnvironmentFailed, UsageError
from slimport.quantize import store
from slimport.quantize.methods import rtn
from slimport.quantize.packing import pack
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import Origin, QuantizedCheckpoint
from slimport.quantize.tensor import QuantizedTensor, weights_digest

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def quantized(source, folder):
    base = Checkpoint.open(source)
    plan = make_plan(decoder_config(base.config), method="rtn", patterns={GATE: "float16"})
    return quantize(
        base,
        base.config,
        plan,
        folder,
        calibration=None,
        tokenizer_folder=source,
        progress=lambda *_: None,
        origin=lambda: Origin("tiny", "sha256:00", {"style": "sha256:11"}),
    )


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(tiny_llama, source, dirs_exist_ok=True)
    (source / "LICENSE").write_text("free")
    return source, quantized(source, tmp_path_factory.mktemp("quantized") / "out")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[1].folder, tmp_path / "copy")


def test_names_are_those_of_the_forward_pass(finished):
    model = finished[1]
    assert model.names() == tuple(weight.name for weight in weights(model.decoder))


def test_weights_come_back(finished):
    source, model = finished
    base = Checkpoint.open(source)
    for choice in model.plan.choices:
        name = choice.weight.name
        loaded = model.load(name)
        if choice.grid is None:
            expected = base.rows(name)
            if choice.weight.is_matrix:  # rounded once, as every container holds it
                expected = expected.astype(np.float16).astype(np.float32)
            assert loaded.dtype == np.float32 and np.array_equal(loaded, expected)
            continue
        expected = rtn.solve(base.rows(name), choice.grid)
        assert loaded.grid is choice.grid
        assert np.array_equal(loaded.codes, expected.codes)
        assert np.array_equal(loaded.scale, expected.scale)
        assert model.records[name].digest == expected.digest(name)
        error = np.linalg.norm(base.rows(name) - expected.dequantize())
        assert model.errors[name] == pytest.approx(error / np.linalg.norm(base.rows(name)), 1e-5)


def test_digests_are_those_of_the_tensors(finished):
    model = finished[1]
    loaded = {name: model.load(name) for name in model.names()}
    by_hand = {n: t.digest(n) for n, t in loaded.items() if isinstance(t, QuantizedTensor)}
    assert model.weights_digest == weights_digest(by_hand)
    floats = {n: store.float_digest(n, t) for n, t in loaded.items() if n not in by_hand}
    assert model.float_digest == weights_digest(floats)
    assert NORM in floats and GATE in floats and UP in by_hand
    model.verify()


def test_rows_are_dequantized(finished):
    model = finished[1]
    whole = model.load(UP).dequantize()
    assert np.array_equal(model.rows(UP), whole)
    assert np.array_equal(model.rows(UP, 3, 7), whole[3:7])
    assert np.array_equal(model.rows(UP, 90, 1000), whole[90:])
    assert np.array_equal(model.rows(NORM, 3, 7), model.load(NORM)[3:7])
    assert model.shape(UP) == whole.shape


def test_files_as_documented(finished):
    source, model = finished
    names = sorted(path.name for path in model.folder.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    shard = load_file(model.folder / names[2])
    weight = model.load(UP)
    assert np.array_equal(shard[f"{UP}.codes"], pack(weight.codes, 4))
    assert shard[f"{UP}.scale"].dtype == np.float16
    assert np.array_equal(shard[f"{UP}.scale"].astype(np.float32), weight.scale)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (model.folder / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((model.folder / "config.json").read_text()) == Checkpoint.open(source).config


def test_what_is_recorded(finished):
    content = json.loads((finished[1].folder / store.QUANTIZATION).read_text())
    assert content["schema"] == "slimport.quantized/1"
    assert content["origin"]["adapters"] == {"style": "sha256:11"}
    assert content["calibration"] is None
    assert content["plan"]["weights"][UP]["grid"] == "int4-g32"
    assert set(content["records"][UP]) == {"digest", "error", "added"}
    reopened = QuantizedCheckpoint.open(finished[1].folder)
    assert reopened == finished[1]
    assert (reopened.name, reopened.origin.base) == ("tiny", "sha256:00")


def rewrite(folder, change):
    path = folder / store.QUANTIZATION
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_digests(content):
    records = content["records"]
    records[UP]["digest"] = "0" * 64


MALFORMED = {
    "no quantization.json": lambda f: (f / store.QUANTIZATION).unlink(),
    "not JSON": lambda f: (f / store.QUANTIZATION).write_text("{"),
    "another schema": lambda f: rewrite(f, lambda c: c.update(schema="slimport.quantized/2")),
    "no plan": lambda f: rewrite(f, lambda c: c.pop("plan")),
    "no records": lambda f: rewrite(f, lambda c: c.update(records=[])),
    "a record too few": lambda f: rewrite(f, lambda c: c["records"].pop(UP)),
    "an odd record": lambda f: rewrite(f, lambda c: c["records"].update({UP: {"size": 1}})),
    "another digest": lambda f: rewrite(f, swap_digests),
    "no config": lambda f: (f / "config.json").unlink(),
    "a shard too few": lambda f: (f / "model-00002-of-00004.safetensors").unlink(),
    "a shard too many": lambda f: (f / "other.safetensors").write_bytes(b""),
    "a shard in another's place": lambda f: shutil.copy(
        f / "model-00002-of-00004.safetensors", f / "model-00003-of-00004.safetensors"
    ),
    "a shard cut off": lambda f: (f / "model-00002-of-00004.safetensors").write_bytes(
        (f / "model-00002-of-00004.safetensors").read_bytes()[:-1]
    ),
    "a pointer": lambda f: (f / "model-00002-of-00004.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1"
    ),
}


@pytest.mark.parametrize("damage", MALFORMED.values(), ids=MALFORMED)
def test_damage_is_seen(copy, damage):
    QuantizedCheckpoint.open(copy)
    damage(copy)
    with pytest.raises(BadInput):
        QuantizedCheckpoint.open(copy)


def test_verify_sees_one_flipped_bit(copy):
    path = copy / "model-00002-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match="changed after it was quantized"):
        QuantizedCheckpoint.open(copy).verify()


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(UsageError):
        QuantizedCheckpoint.open(tmp_path / "nothing")


def test_only_a_quantized_checkpoint_is_replaced(finished, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("dear")
    with pytest.raises(UsageError):
        quantized(finished[0], folder)
    assert (folder / "thesis.txt").exists()
    (folder / "thesis.txt").unlink()
    first = quantized(finished[0], folder)
    (folder / "stale").touch()
    assert quantized(finished[0], folder) == first
    assert not (folder / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_failed_run_leaves_nothing(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), store.filling(folder):
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not folder.exists()


def test_a_place_that_cannot_be_written(finished, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailed):
        quantized(finished[0], tmp_path / "file" / "out")
