import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import Unsupported, UsageError
from slimport.quantize import ggml, quantizer
from slimport.quantize.calibration import importance, layer_statistics
from slimport.quantize.imatrix import Imatrix
from slimport.quantize.methods import gptq
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize, restore
from slimport.quantize.windows import windows_of

UP = "model.layers.1.mlp.up_proj.weight"
Q0, Q1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


class Changed:
    """Weights of which some are replaced."""

    def __init__(self, base, **replaced):
        self.base, self.replaced = base, {name: array for name, array in replaced.items()}

    def names(self):
        return self.base.names()

    def shape(self, name):
        return self.base.shape(name)

    def rows(self, name, start=0, stop=None):
        if name in self.replaced:
            return self.replaced[name][start:stop]
        return self.base.rows(name, start, stop)


def run(base, source, folder, *, windows=None, progress=lambda *_: None, **plan):
    return quantize(
        base,
        source.config,
        make_plan(decoder_config(source.config), **plan),
        folder,
        calibration=windows,
        tokenizer_folder=source.folder,
        progress=progress,
    )


@pytest.fixture(scope="module")
def source(tiny_llama):
    return Checkpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def windows():
    return windows_of(np.random.default_rng(0).integers(0, 400, (12, 64)))


def test_calibration_has_the_same_threads_on_any_machine(source, windows, tmp_path, monkeypatch):
    """Products of real models add up otherwise with other threads: their codes differed."""
    seen, solve = [], gptq.solve
    monkeypatch.setattr(gptq, "solve", lambda *a: seen.append(torch.get_num_threads()) or solve(*a))
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        run(source, source, tmp_path / str(threads), windows=windows)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert len(set(seen)) == 1 and len(seen) == 2 * 14


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", ["rtn", "rtn-absmax", "gptq"])
def test_two_runs_write_the_same_bytes(source, windows, tmp_path, method):
    first = run(source, source, tmp_path / "a", windows=windows, method=method)
    run(source, source, tmp_path / "b", windows=windows, method=method)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert first.calibration == (windows.digest if method == "gptq" else None)


def test_codes_do_not_depend_on_the_size_of_blocks(source, tmp_path, monkeypatch):
    whole = run(source, source, tmp_path / "whole", method="rtn")
    monkeypatch.setattr(quantizer, "_BLOCK", 1000)
    parts = run(source, source, tmp_path / "parts", method="rtn")
    assert parts.weights_digest == whole.weights_digest
    assert parts.float_digest == whole.float_digest
    assert parts.errors == pytest.approx(whole.errors, rel=1e-12)


def test_restore_writes_the_same_weights(source, tmp_path):
    model = run(source, source, tmp_path / "out", method="rtn")
    tensors = [(name, model.load(name)) for name in model.names()]
    again = restore(
        tensors, model.config, model.plan, tmp_path / "again", tokenizer_folder=source.folder
    )
    assert again.weights_digest == model.weights_digest
    assert again.float_digest == model.float_digest
    with pytest.raises(ValueError, match="comes where the plan has"):
        restore(
            tensors[::-1],
            model.config,
            model.plan,
            tmp_path / "odd",
            tokenizer_folder=source.folder,
        )


def test_gptq_is_calibrated_on_layers_already_quantized(source, windows, tmp_path):
    model = run(source, source, tmp_path / "out", windows=windows, method="gptq")
    stream = layer_statistics(source, model.decoder, windows)
    _, first = next(stream)
    expected = gptq.solve(source.rows(Q0), model.plan[Q0].grid, *first[Q0])
    assert expected.digest(Q0) == model.records[Q0].digest
    linears = [c.weight.name for c in model.plan.quantized if c.weight.layer == 0]
    _, second = stream.send({name: model.rows(name) for name in linears})
    expected = gptq.solve(source.rows(Q1), model.plan[Q1].grid, *second[Q1])
    assert expected.digest(Q1) == model.records[Q1].digest


def test_gptq_lowers_the_error_of_outputs_and_leaves_tables(source, windows, tmp_path):
    model = run(source, source, tmp_path / "gptq", windows=windows, method="gptq")
    plain = run(source, source, tmp_path / "rtn", method="rtn")
    assert model.records[EMBEDDING] == plain.records[EMBEDDING]
    assert model.errors[Q0] > plain.errors[Q0]  # of weights; it trades them for outputs
    _, statistics = next(layer_statistics(source, model.decoder, windows))

    def output_error(quantized):
        miss = quantized.rows(Q0) - source.rows(Q0)
        return np.einsum("ri,ij,rj->", miss, statistics[Q0].hessian, miss)

    assert output_error(model) < 0.95 * output_error(plain)  # measured 0.90; inputs are noise


def test_gptq_needs_windows(source, tmp_path):
    with pytest.raises(UsageError, match="calibration"):
        run(source, source, tmp_path / "out", method="gptq")
    assert not any(tmp_path.iterdir())


def test_progress_counts_every_weight_once(source, tmp_path):
    calls = []
    run(source, source, tmp_path / "out", method="rtn", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    total = sum(int(np.prod(source.shape(name))) for name in source.names())
    assert calls[-1] == ("quantize", total, total)


def test_a_few_tiny_groups_are_floored_and_recorded(source, tmp_path):
    weight = source.rows(UP)
    weight[3] *= np.float32(2.0**-20)
    model = run(Changed(source, **{UP: weight}), source, tmp_path / "out", method="rtn")
    assert 0 < model.records[UP].added < 1e-4
    assert model.records[Q0].added == 0


@pytest.mark.parametrize("factor", [2.0**-16, 2.0**23])
def test_scales_beyond_fp16_are_refused(source, tmp_path, factor):
    weight = source.rows(UP) * np.float32(factor)
    with pytest.raises(Unsupported, match="float16"):
        run(Changed(source, **{UP: weight}), source, tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists()


def test_a_zero_weight_has_no_error(source, tmp_path):
    weight = np.zeros_like(source.rows(UP))
    model = run(Changed(source, **{UP: weight}), source, tmp_path / "out", method="rtn")
    assert model.errors[UP] == 0
    assert (model.load(UP).scale == 1).all() and not model.load(UP).codes.any()


MEASURE = """
import sys, threading, time
from pathlib import Path
import numpy as np
from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.quantize.windows import windows_of
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def run(folder, method):
    source = Checkpoint.open(folder)
    plan = make_plan(decoder_config(source.config), method=method)
    windows = windows_of(np.random.default_rng(0).integers(0, 500, (4, 128)))
    quantize(source, source.config, plan, Path(sys.argv[3]), calibration=windows,
             tokenizer_folder=Path(folder), progress=lambda *_: None)

run(sys.argv[1], sys.argv[4])  # compiles and loads, before the start is measured
peak, finished = 0, threading.Event()
def watch():
    global peak
    while not finished.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
start = anonymous()
watcher.start()
run(sys.argv[2], sys.argv[4])
finished.set()
watcher.join()
print(peak - start)
"""


def write_model(folder, layers):
    """Random bf16 weights, 0.74 million to a layer (2.9 MB as float32)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_twice_the_layers_the_same_memory(tmp_path, method):
    peaks = {}
    small = write_model(tmp_path / "1", 1)
    for layers in (16, 32):
        large = write_model(tmp_path / str(layers), layers)
        command = [sys.executable, "-c", MEASURE, small, large, tmp_path / "out", method]
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks[layers] = json.loads(done.stdout)
    # Sixteen layers more are 47 MB as float32 and 12 MB as codes; repeated runs differ by 5 MB.
    assert peaks[32] - peaks[16] < 8e6, peaks


@pytest.fixture(scope="module")
def wide(make_model):
    """Rows of 256 and 512: every block of ggml divides them."""
    return Checkpoint.open(make_model("llama", hidden_size=256, intermediate_size=512))


def test_method_imatrix_gives_the_bytes_of_ggmls_kernel(wide, windows, tmp_path):
    config = decoder_config(wide.config)
    measured = importance(wide, config, windows, lambda *_: None)
    given = replace(measured, texts=("text",))
    by_text = run(wide, wide, tmp_path / "a", windows=windows, preset="Q4_K_M", method="imatrix")
    by_file = run(wide, wide, tmp_path / "b", windows=given, preset="Q4_K_M", method="imatrix")
    assert by_text.weights_digest == by_file.weights_digest
    assert (by_text.calibration, by_file.calibration) == (windows.digest, given.digest)
    for choice in by_text.plan.quantized:
        name = choice.weight.name
        weighed = measured.importance[name] if choice.weight.is_linear else None
        expected = ggml.quantize_rows(choice.grid.type, wide.rows(name), weighed)
        np.testing.assert_array_equal(by_text.load(name).blocks, expected)
    by_text.verify()


def test_gptq_beside_types_whose_codes_it_cannot_choose(wide, windows, tmp_path):
    """IQ3_S gets the diagonal of the Hessian; the layers after it see what it became."""
    made = run(wide, wide, tmp_path / "a", windows=windows, preset="IQ3_XS")
    methods = {choice.grid.name: choice.method for choice in made.plan.quantized}
    assert methods["IQ3_S"] == methods["IQ3_XXS"] == "imatrix"
    changed = Changed(wide, **{Q0: wide.rows(Q0) * 2})
    after = run(changed, wide, tmp_path / "b", windows=windows, preset="IQ3_XS")
    assert made.load(Q1).digest("") != after.load(Q1).digest("")
    assert all(0 < error < 0.6 for error in made.errors.values())


def test_the_error_of_blocks_is_that_of_their_weights(wide, windows, tmp_path):
    made = run(wide, wide, tmp_path / "a", windows=windows, preset="Q2_K")
    for name, error in made.errors.items():
        before = wide.rows(name).astype(np.float64)
        difference = before - made.rows(name)
        assert error == pytest.approx(np.sqrt((difference**2).sum() / (before**2).sum()), rel=1e-5)


def test_blocks_go_through_restore(wide, windows, tmp_path):
    made = run(wide, wide, tmp_path / "a", windows=windows, preset="Q3_K_M")
    tensors = ((name, made.load(name)) for name in made.names())
    again = restore(tensors, wide.config, made.plan, tmp_path / "b", tokenizer_folder=wide.folder)
    assert again.weights_digest == made.weights_digest
    np.testing.assert_array_equal(again.rows(UP, 3, 7), made.rows(UP)[3:7])


def test_gptq_does_not_start_from_an_importance_matrix(wide, tmp_path):
    with pytest.raises(UsageError, match="gptq cannot start from an importance matrix"):
        run(wide, wide, tmp_path / "a", windows=Imatrix({}, 1, 1, ()), preset="Q4_K_M")


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q4_0", "IQ4_NL"])
@pytest.mark.parametrize("factor", [1e8, 1e30])
def test_weights_beyond_the_scales_of_blocks_are_refused(preset, factor, wide, tmp_path):
    huge = Changed(wide, **{UP: wide.rows(UP) * np.float32(factor)})
    with pytest.raises(Unsupported, match="no numbers"):
        run(huge, wide, tmp_path / "a", preset=preset, method="rtn")
    assert not (tmp_path / "a").exists()


DOWN = "model.layers.1.mlp.down_proj.weight"  # the last: whatever it holds breaks no input


@pytest.mark.parametrize("preset", ["int4", "int8", "int2", "lut4", "Q4_K_M", "Q3_K_S"])
@pytest.mark.parametrize(
    ("method", "factor"),
    # Tiny weights become what gives drift back under gptq.
    [("rtn", 1e-18), ("rtn", 1e-12)]
    + [(method, factor) for method in ("rtn", "gptq") for factor in (1e10, 1e13, 1e18, 1e19, 3e19)],
)
def test_weights_far_beyond_float16_are_refused(method, factor, preset, wide, windows, tmp_path):
    far = Changed(wide, **{DOWN: wide.rows(DOWN) * np.float32(factor)})
    with pytest.raises(Unsupported, match="float16"):
        run(far, wide, tmp_path / "a", windows=windows, preset=preset, method=method)


def test_inputs_that_never_mattered_keep_their_weights(wide, windows, tmp_path):
    config = decoder_config(wide.config)
    measured = importance(wide, config, windows, lambda *_: None)
    dead = {
        name: np.where(np.arange(sums.size) < 128, 0, sums) for name, sums in measured.sums.items()
    }
    none = {name: sums * 0 for name, sums in measured.sums.items()}
    for preset in ("Q4_0", "Q4_K_M", "IQ4_XS", "IQ2_M"):
        for sums in (dead, none):
            given = replace(measured, sums=sums)
            made = run(wide, wide, tmp_path / "a", windows=given, preset=preset, method="imatrix")
            for name in (UP, Q0):
                wrong = made.rows(name)[:, :128] - wide.rows(name)[:, :128]
                limit = 0.5 if preset == "IQ2_M" else 0.2
                assert np.square(wrong).mean() < limit**2 * np.square(wide.rows(name)).mean()


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q4_0", "IQ4_XS"])
@pytest.mark.parametrize("factor", [1e-7, 1e-12, 1e-18])
def test_weights_below_the_scales_of_blocks_are_refused(preset, factor, wide, tmp_path):
    tiny = Changed(wide, **{UP: wide.rows(UP) * np.float32(factor)})
    with pytest.raises(Unsupported, match="float16 holds no such scales"):
        run(tiny, wide, tmp_path / "a", preset=preset, method="rtn")
    little = Changed(wide, **{UP: wide.rows(UP) * np.float32(0.1)})
    made = run(little, wide, tmp_path / "a", preset=preset, method="rtn")
    assert made.records[UP].added < 1e-3
