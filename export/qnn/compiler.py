"""The child process of `compilation`: one graph, in the working directory."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import onnxruntime_qnn as qnn

from . import sdk
from .compilation import TRACE


def session(model: str, options: Mapping[str, str], entries: Mapping[str, str]) -> Any:
    """A session on the NPU's emulator alone: whatever does not run there raises.

    Without these two settings ONNX Runtime would run it on the CPU, with a printed notice or none.
    """
    ort.set_default_logger_severity(4)
    if not any(device.ep_name == sdk.PROVIDER for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(sdk.PROVIDER, qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == sdk.PROVIDER]
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    settings.add_provider_for_devices(devices, {"backend_path": qnn.get_qnn_htp_path(), **options})
    return ort.InferenceSession(model, settings, enable_fallback=0)


def compile_graph(name: str, graph: str, chip: Mapping[str, Any]) -> None:
    """Write `name`.onnx and `name`_qnn.bin for a chip."""
    Path(TRACE).mkdir()
    options = {
        "soc_model": str(chip["soc_model"]),
        "htp_arch": str(chip["hexagon"]),
        "enable_framework_op_trace": "1",
        "framework_op_trace_dir": TRACE,
    }
    entries = {
        "ep.context_enable": "1",
        "ep.context_embed_mode": "0",
        "ep.context_file_path": f"{name}.onnx",
    }
    session(graph, options, entries)


if __name__ == "__main__":
    try:
        compile_graph(**json.loads(sys.argv[1]))
        status = 0
    except Exception as error:
        print(str(error).strip().splitlines()[0], file=sys.stderr)
        status = 1
    sys.stderr.flush()
    os._exit(status)  # no teardown of native libraries: the files are written
