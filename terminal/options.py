"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import log

Command = TypeVar("Command", bound=Callable[..., Any])


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, first one first in --help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _log(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Open the log for as long as the command runs."""
    if path is not None:
        context.with_resource(log.writing(Path(path)))


output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
    click.option("--debug", is_flag=True, help="A traceback with errors."),
    click.option(
        "--log",
        type=click.Path(),
        expose_value=False,
        callback=_log,
        help="Add to this file what compilers and runtimes print, and when each stage began.",
    ),
)
source_options = _options(
    click.argument("model", required=False),
    click.option("--config", type=click.Path(), help="A recipe; default ./slimport.toml."),
    click.option("--adapter", multiple=True, metavar="NAME=PATH[:SCALE]", help="A LoRA adapter."),
    click.option("--adapter-mode", type=click.Choice(["merged", "separate"])),
    click.option("--revision", help="Of a hub model."),
    click.option("--offline", is_flag=True, help="Never reach out to a hub."),
    click.option("--name", help="What the bundle calls the model."),
    click.option("--pre", help="tokenizer.ggml.pre, where it cannot be derived."),
)
quantize_options = _options(
    click.option(
        "--preset",
        help="int4 (default), int4-all, int4-signed, int8, int2, nf4, lut4, lut6, mixed.",
    ),
    click.option("--gguf-type", help="In its place one of llama.cpp's types, such as Q4_K_M."),
    click.option(
        "--method",
        help="gptq (default), autoround (learnt: slow, best at few bits), auto (the best by layer),"
        " rtn, rtn-absmax, hqq, imatrix (ggml's kernels; k-means weighed by it), kmeans (palettized"
        " grids).",
    ),
    click.option(
        "--grid", multiple=True, metavar="PATTERN=GRID", help="A grid for weights by name."
    ),
    click.option("--calibration", type=click.Path(), help="Text for methods that calibrate."),
    click.option(
        "--imatrix", type=click.Path(), help="llama.cpp's importance matrix for method imatrix."
    ),
)
fit_options = _options(
    click.option(
        "--fit",
        "device_bytes",
        metavar="SIZE",
        help="Search the grids: the least loss of a bundle of at most this size, such as 900MB.",
    ),
    click.option(
        "--fit-memory",
        "memory_bytes",
        metavar="SIZE",
        help="The same for the device's memory at the target's context.",
    ),
    click.option(
        "--max-kl",
        "kl_mean",
        type=float,
        metavar="NATS",
        help="Search the smallest bundle of at most this mean KL divergence.",
    ),
    click.option(
        "--fit-grid", "grids", multiple=True, metavar="GRID", help="Choose among these; repeats."
    ),
    click.option(
        "--sensitivities",
        type=click.Path(),
        help="Keeps what a search measures: read if it is there, else written.",
    ),
)
training_options = _options(
    click.option("--train", type=click.Path(), help="Text to train on."),
    click.option("--steps", type=int, help="Of the optimizer, at most."),
    click.option("--batch", type=int, help="Windows of text in a step."),
    click.option("--train-length", type=int, help="Tokens in each."),
    click.option("--learning-rate", type=float, help="Of the weights, in steps between codes."),
    click.option(
        "--train-only",
        type=click.Choice(["weights", "lora"]),
        help="lora: codes stay as they are, and an adapter beside them learns.",
    ),
    click.option("--evaluate-every", type=int, help="Steps between two measurements."),
    click.option("--seed", type=int, help="Of the order of the text."),
)
text_options = _options(
    click.option(
        "--eval",
        "eval_text",
        type=click.Path(),
        help="Held-out text, judged on; pairs for a reward model.",
    ),
    click.option("--eval-ood", type=click.Path(), help="Out-of-distribution text."),
)
