"""ExecuTorch programs beside those of its own `export_llm`: cost, size, speed and quality.

Both write a random model of SmolLM-135M's shape with int4 layers in groups of 32 and an int8
embedding, in processes of their own (its head is int4, ours int8). Then both programs run token by
token in ExecuTorch, in turns. Quality: KL divergence against transformers in float32, of our
program in ExecuTorch, and of what export_llm lowers: torchao's weights and activations in torch.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from meter import Run, anonymous, cache_folder, watch
from quality import _EXAMPLE, Case, open_case
from random_llama import SMOLLM, random_llama
from safetensors.torch import load_file

from slimport.architectures import Kind, weights
from slimport.export import executorch as container
from slimport.export.container import Deployment
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.validation import divergence
from slimport.validation.runtimes import executorch as runtime
from slimport.validation.runtimes.executorch_worker import runtime as load_runtime

_LAYERS, _CONTEXT = 30, 1024
_PROMPT, _GENERATED, _TURNS, _THREADS = 256, 64, 5, 2
_META = {  # names of export_llm's checkpoints
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.layers.": "layers.",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=3, action="append", metavar=("MODEL", "TEXT", "HELD_OUT"))
    parser.add_argument("--parts", nargs="*", default=["cost", "quality"])
    parser.add_argument("--runs", type=int, default=1, help="of export_llm; 3 of slimport")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--torchao", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        print(json.dumps(decode(options.decode)))
        return
    if options.torchao:
        torchao_logits(*options.torchao)
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
        if "cost" in options.parts:
            model = random_llama(_LAYERS, cache_folder(), SMOLLM)
            print_speed(print_cost(model, Path(work), options.runs))
        if "quality" in options.parts:
            for model, text, held_out in options.case or [_EXAMPLE]:
                with tempfile.TemporaryDirectory(dir=work) as place:
                    paths = (Path(model), Path(text), Path(held_out))
                    print_quality(open_case(*paths, Path(place), 128, options.windows, 512))


def print_cost(model: Path, work: Path, runs: int) -> dict[str, Path]:
    """A line per command; returns what each wrote."""
    ours, theirs = work / "slimport", work / "export_llm"
    commands = {
        "slimport": (_slimport(model, ours), 3, ours / "android" / "model.pte"),
        "export_llm": (_export_llm(model, theirs), runs, theirs / "model.pte"),
    }
    print(f"{'135M shape':12}{'s':>8}{'CPU-s':>8}{'peak MB':>9}{'file MB':>9}", flush=True)
    for name, (command, times, file) in commands.items():
        costs: list[Run] = []
        for _ in range(times):
            if name == "slimport":
                shutil.rmtree(ours, ignore_errors=True)
            costs.append(watch(command))
        size = file.stat().st_size
        print(
            f"{name:12}{median(c.wall for c in costs):8.1f}{median(c.cpu for c in costs):8.1f}"
            f"{max(c.peak for c in costs) / 1e6:9.0f}{size / 1e6:9.1f}",
            flush=True,
        )
    print()
    return {name: file for name, (_, _, file) in commands.items()}


def _slimport(model: Path, folder: Path) -> list[str]:
    command = f"export {model} --container executorch --target android --no-validate -q"
    return [sys.executable, "-m", "slimport", *f"{command} --method rtn --output {folder}".split()]


def _export_llm(model: Path, folder: Path) -> list[str]:
    folder.mkdir()
    checkpoint, params = folder / "checkpoint.pth", folder / "params.json"
    torch.save(_renamed(model), checkpoint)
    params.write_text(json.dumps(_params(json.loads((model / "config.json").read_text()))))
    settings = f"""
        base.model_class=smollm2 base.checkpoint={checkpoint} base.params={params}
        model.use_kv_cache=true model.use_sdpa_with_kv_cache=true model.dtype_override=fp32
        export.max_seq_length={_CONTEXT} export.max_context_length={_CONTEXT}
        export.output_name={folder / "model.pte"}
        quantization.qmode=8da4w quantization.group_size=32 quantization.embedding_quantize="8,0"
        backend.xnnpack.enabled=true backend.xnnpack.extended_ops=true hydra.run.dir={folder}
    """
    module = "executorch.extension.llm.export.export_llm"
    return [sys.executable, "-m", module, *settings.replace('"', "'").split()]


def _renamed(model: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            for ours, theirs in _META.items():
                name = name.replace(ours, theirs)
            found[name] = tensor.float()
    found["output.weight"] = found["tok_embeddings.weight"]
    return found


def _params(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": 10000.0,
        "use_scaled_rope": False,
        "use_hf_rope": True,
        "vocab_size": config["vocab_size"],
        "attention_qkv_bias": False,
    }


def print_speed(files: Mapping[str, Path]) -> None:
    """Tokens per second, the programs in turns; a process each."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(_TURNS):
        for name, file in files.items():
            command = [sys.executable, __file__, "--decode", str(file)]
            done = subprocess.run(command, check=True, capture_output=True)
            found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'ExecuTorch':12}{'load s':>8}{'prompt/s':>10}{'tokens/s':>10}{'RssAnon MB':>12}")
    for name, turns in found.items():
        load, prompt, tokens, anonymous = (median(t[key] for t in turns) for key in turns[0])
        print(f"{name:12}{load:8.2f}{prompt:10.1f}{tokens:10.1f}{anonymous:12.0f}", flush=True)


def decode(file: Path) -> dict[str, float]:
    """Speed of one program: a prompt at once, then token by token."""
    portable = load_runtime(_THREADS)
    before, start = anonymous(), time.perf_counter()
    module = portable._load_for_executorch(str(file))
    ids = torch.arange(_PROMPT)[None] % 1000
    module.run_method("forward", (ids, torch.tensor([0])))
    loaded = time.perf_counter()
    module.run_method("forward", (ids, torch.tensor([0])))
    prompted = time.perf_counter()
    for step in range(_GENERATED):
        module.run_method("forward", (ids[:, :1], torch.tensor([_PROMPT + step])))
    end = time.perf_counter()
    return {
        "load_s": loaded - start,
        "prompt_tps": _PROMPT / (prompted - loaded),
        "tokens_tps": _GENERATED / (end - prompted),
        "anonymous": (anonymous() - before) / 1e6,
    }


def print_quality(case: Case) -> None:
    print(
        f"{case.checkpoint.name}: {case.held_out.ids.size:,} held-out tokens\n"
        f"{'program':28}{'bytes':>12}{'KL mean':>11}{'+-':>10}{'top-1':>8}"
    )
    for name, size, artifact in _candidates(case):
        found = divergence.compare(case.oracle, artifact, case.held_out.ids)
        print(
            f"{name:28}{size:12,}{found.kl_mean:11.6f}{found.kl_mean_error or 0:10.6f}"
            f"{found.top1:8.4f}",
            flush=True,
        )
    print()


def _candidates(case: Case) -> Iterator[tuple[str, int, Path]]:
    """Name, bytes and logits."""
    artifact, ids = case.work / "artifact.npy", case.work / "ids.npy"
    np.save(ids, case.held_out.ids)
    folder = str(case.checkpoint.folder)
    command = [sys.executable, __file__, "--torchao", folder, str(ids), str(artifact)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    yield "torchao rtn 8da4w", _theirs(case), artifact
    for preset in ("int4-all", "int4"):
        for method in ("rtn", "gptq"):
            plan = make_plan(case.decoder, preset, method)
            made = quantize(
                case.checkpoint,
                case.checkpoint.config,
                plan,
                case.work / "quantized",
                calibration=case.calibration if plan.uses("gptq") else None,
                tokenizer_folder=case.checkpoint.folder,
                progress=lambda stage, done, total: None,
            )
            place = case.work / f"{preset}-{method}"
            place.mkdir()
            file, _ = container.write(made, case.tokenizer, place, Deployment(512))
            runtime.logits(file, case.held_out.ids, artifact)
            yield f"slimport {preset} {method}", file.stat().st_size, artifact


def _theirs(case: Case) -> int:
    """Bytes of codes and scales alone: 4 bits and bfloat16 scales, the embedding in 8 bits."""
    size = 0
    for weight in weights(case.decoder):
        if not weight.is_matrix:
            size += 4 * math.prod(weight.shape)
            continue
        rows, columns = weight.shape
        if weight.kind is Kind.EMBEDDING:
            size += rows * (columns + 4)
        if weight.kind is not Kind.EMBEDDING or case.decoder.tied:
            size += rows * columns * 9 // 16
    return size


def torchao_logits(model: Path, ids: Path, out: Path) -> None:
    """What export_llm quantizes with `8da4w`, groups of 32 and `embedding_quantize=8,0`."""
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.detach().clone())
    embedding = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    quantize_(loaded, embedding, lambda module, name: isinstance(module, torch.nn.Embedding))
    layers = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))
    quantize_(loaded, layers)
    with torch.no_grad():
        found = [loaded(torch.from_numpy(window)[None].long()).logits[0] for window in np.load(ids)]
    np.save(out, torch.stack(found).float().numpy())


if __name__ == "__main__":
    main()
