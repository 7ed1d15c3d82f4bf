"""llama.cpp's C API through ctypes: structs, argument types, log, and a probe of all that.

Structs are those of `include/llama.h` in the release that `quantize.ggml` accepts; their known
defaults are compared before any struct is passed back.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_bool, c_float, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache

from ...errors import DependencyMissing, ValidationFailed
from ...quantize import ggml


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, c_void_p)
log_lines: list[str] = []
error_lines: list[str] = []
_LOG_LEVEL_ERROR = 4


def _keep_log(level: int, text: bytes, _: int) -> None:
    line = text.decode("utf-8", "replace")
    (error_lines if level == _LOG_LEVEL_ERROR else log_lines).append(line)
    sys.stderr.write(line)  # so that the parent sees the last lines of a crash
    sys.stderr.flush()


_callback = _Log(_keep_log)  # llama.cpp keeps the pointer: it must live as long as the process


@cache
def library() -> ctypes.CDLL:
    """llama.cpp with its argument types declared, logging to `log_lines`, probed."""
    lib = ggml.library()
    pointer, text = c_void_p, ctypes.c_char_p
    for name, result, *arguments in (
        ("llama_model_default_params", _ModelParams),
        ("llama_context_default_params", _ContextParams),
        ("llama_log_set", None, _Log, pointer),
        ("llama_backend_init", None),
        ("llama_model_load_from_file", pointer, text, _ModelParams),
        ("llama_init_from_model", pointer, pointer, _ContextParams),
        ("llama_batch_init", _Batch, c_int32, c_int32, c_int32),
        ("llama_decode", c_int32, pointer, _Batch),
        ("llama_get_logits", POINTER(c_float), pointer),
        ("llama_get_logits_ith", POINTER(c_float), pointer, c_int32),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, c_bool),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_model_chat_template", text, pointer, text),
        ("llama_vocab_n_tokens", c_int32, pointer),
        ("llama_vocab_is_eog", c_bool, pointer, c_int32),
        ("llama_vocab_bos", c_int32, pointer),
        ("llama_vocab_get_add_bos", c_bool, pointer),
        (
            *("llama_tokenize", c_int32, pointer, text, c_int32),
            *(POINTER(c_int32), c_int32, c_bool, c_bool),
        ),
        ("llama_adapter_lora_init", pointer, pointer, text),
        (
            *("llama_set_adapters_lora", c_int32, pointer, POINTER(pointer), c_size_t),
            POINTER(c_float),
        ),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    probe(lib)
    lib.llama_log_set(_callback, None)
    lib.llama_backend_init()
    return lib


def probe(lib: ctypes.CDLL) -> None:
    """Compare defaults at the start, middle and end of both structs with what they must be."""
    context, model = lib.llama_context_default_params(), lib.llama_model_default_params()
    names = (
        "n_batch",
        "n_ubatch",
        "yarn_ext_factor",
        "type_k",
        "type_v",
        "n_samplers",
        "ctx_other",
    )
    found = [getattr(context, name) for name in names]
    flags = (model.vocab_only, model.check_tensors, model.use_extra_bufts, model.no_alloc)
    if found != [2048, 512, -1.0, 1, 1, 0, None] or flags != (False, False, True, False):
        raise DependencyMissing(
            f"{ggml.DISTRIBUTION} {ggml.RELEASE} has other C structs than it should",
            f"its default parameters read {found} and {flags}",
            f"pip install --force-reinstall {ggml.DISTRIBUTION}=={ggml.RELEASE}",
        )


def refused(what: str) -> ValidationFailed:
    lines = "".join(error_lines or log_lines).strip().splitlines()
    last = "; ".join(line.strip() for line in lines[-3:]) or "nothing"
    return ValidationFailed(what, f"its log says: {last}", "export the file again from the model")
