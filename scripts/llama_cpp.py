"""Stock llama.cpp as a library: tokens, logits, speed, and its own quantization, by ctypes and nothing else.

`make llama-cpp` puts the library into work/llama.cpp: binaries from the npm package @node-llama-cpp/linux-x64, of the
version below. The structures that are passed by value are those of that version's llama.h.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32
from ctypes import c_void_p as pointer
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
PLACE = Path(__file__).resolve().parents[1] / "work" / "llama.cpp"

# enum llama_ftype, those that people use.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}


class _ModelParams(Structure):
    _fields_ = (
        ("devices", pointer),
        ("tensor_buft_overrides", pointer),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", pointer),
        ("progress_callback", pointer),
        ("progress_callback_user_data", pointer),
        ("kv_overrides", pointer),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class _ContextParams(Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", pointer),
        ("cb_eval_user_data", pointer),
        ("type_k", c_int),
        ("type_v", c_int),
        ("abort_callback", pointer),
        ("abort_callback_data", pointer),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", pointer),
        ("n_samplers", c_size_t),
        ("ctx_other", pointer),
    )


class _Batch(Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class _Importance(Structure):
    _fields_ = (("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t))


class _QuantizeParams(Structure):
    _fields_ = (
        ("nthread", c_int32),
        ("ftype", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        *((name, c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split")),
        ("dry_run", c_bool),
        ("imatrix", POINTER(_Importance)),
        ("kv_overrides", pointer),
        ("tt_overrides", pointer),
        ("prune_layers", POINTER(c_int32)),
        ("max_buf_size", c_size_t),
    )


# enum ggml_type, enum llama_flash_attn_type.
_F32, _NO_FLASH_ATTENTION = 0, 0
_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, pointer)
# The library is loaded once in a process, and calls the last one of these whatever became of the object that set it.
_callbacks: list[Any] = []

# Results and arguments of the functions that are called.
_FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, pointer)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_quantize_default_params": (_QuantizeParams, ()),
    "llama_model_load_from_file": (pointer, (c_char_p, _ModelParams)),
    "llama_model_free": (None, (pointer,)),
    "llama_model_get_vocab": (pointer, (pointer,)),
    "llama_vocab_n_tokens": (c_int32, (pointer,)),
    "llama_tokenize": (c_int32, (pointer, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_init_from_model": (pointer, (pointer, _ContextParams)),
    "llama_free": (None, (pointer,)),
    "llama_get_memory": (pointer, (pointer,)),
    "llama_memory_clear": (None, (pointer, c_bool)),
    "llama_batch_init": (_Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (c_int32, (pointer, _Batch)),
    "llama_get_logits_ith": (POINTER(c_float), (pointer, c_int32)),
    "llama_model_quantize": (c_uint32, (c_char_p, c_char_p, POINTER(_QuantizeParams))),
}


class LlamaCpp:
    """The library in a folder; what it says while it works is kept in `said`.

    Raises:
        FileNotFoundError: it is not there.
    """

    def __init__(self, folder: Path = PLACE) -> None:
        if not (folder / "libllama.so").exists():
            raise FileNotFoundError(f"no libllama.so in {folder}; make llama-cpp fetches it")
        folder = folder.resolve()
        # They name each other without a place, so that those already loaded are found.
        for name in ("libggml-base.so", "libggml.so", "libllama.so"):
            library = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            if name == "libggml.so":
                library.ggml_backend_load_all_from_path.argtypes = [c_char_p]
                library.ggml_backend_load_all_from_path(str(folder).encode())
        self.said: list[str] = []
        _callbacks.append(_LogCallback(lambda _, text, __: self.said.append(text.decode(errors="replace"))))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
        self.api = library
        library.llama_log_set(_callbacks[-1], None)
        library.llama_backend_init()

    @contextmanager
    def model(self, path: Path, tokens: int = 512, threads: int = 1, exact: bool = False) -> Iterator[LoadedModel]:
        """A file, loaded for windows of so many tokens.

        Args:
            exact: no float16 in attention, where llama.cpp keeps keys and values in it.

        Raises:
            RuntimeError: llama.cpp does not load it; says what it said.
        """
        self.said.clear()
        model = self.api.llama_model_load_from_file(os.fsencode(path), self.api.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path}: {''.join(self.said)[-600:]}")
        params = self.api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = _F32
            params.flash_attn_type = _NO_FLASH_ATTENTION
        context = self.api.llama_init_from_model(model, params)
        try:
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {path}: {''.join(self.said)[-600:]}")
            yield LoadedModel(self.api, model, context)
        finally:
            if context:
                self.api.llama_free(context)
            self.api.llama_model_free(model)

    def quantize(
        self,
        source: Path,
        target: Path,
        file_type: str,
        importance: Mapping[str, np.ndarray] | None = None,
        threads: int = 1,
        pure: bool = False,
    ) -> None:
        """llama.cpp's own quantization of a file; to F32, of a quantized one, its own dequantization.

        Args:
            file_type: of FILE_TYPES.
            pure: all matrices in the one encoding that the type is named after.
            importance: by tensor name in the file, the mean square of each input feature, float32 [K].

        Raises:
            RuntimeError: it failed.
        """
        self.said.clear()
        params = self.api.llama_model_quantize_default_params()
        params.nthread, params.ftype = threads, FILE_TYPES[file_type]
        params.allow_requantize, params.pure = file_type == "F32", pure
        entries = (_Importance * (len(importance or {}) + 1))()  # ended by an empty one
        arrays = [np.ascontiguousarray(values, dtype=np.float32) for values in (importance or {}).values()]
        for entry, name, values in zip(entries, importance or {}, arrays, strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(POINTER(c_float))
        if importance:
            params.imatrix = ctypes.cast(entries, POINTER(_Importance))
        if self.api.llama_model_quantize(os.fsencode(source), os.fsencode(target), byref(params)):
            raise RuntimeError(f"llama.cpp does not quantize {source}: {''.join(self.said)[-600:]}")


class LoadedModel:
    """A model and a context of llama.cpp's."""

    def __init__(self, library: Any, model: int, context: int) -> None:
        self._api, self._context = library, context
        self._vocabulary = library.llama_model_get_vocab(model)
        self.vocabulary = int(library.llama_vocab_n_tokens(self._vocabulary))

    def tokenize(self, text: str, special: bool = False, add_special: bool = False) -> list[int]:
        """Args: special: names of special tokens in the text stand for these. add_special: put BOS in front, say."""
        encoded = text.encode()
        room = (c_int32 * (len(encoded) + 8))()
        count = self._api.llama_tokenize(self._vocabulary, encoded, len(encoded), room, len(room), add_special, special)
        if count < 0:
            raise RuntimeError("llama.cpp does not tokenize the text")
        return list(room[:count])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [T, vocabulary] of a window by itself."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._decode(ids, 0, every=True)
        rows = [self._api.llama_get_logits_ith(self._context, position) for position in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)).copy() for row in rows])

    def tokens_per_second(self, ids: Sequence[int], count: int) -> float:
        """Of decoding one token after another behind a prompt, the next ones taken from the prompt again."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._decode(ids, 0, every=False)
        self._decode(ids[:1], len(ids), every=False)
        started = time.perf_counter()
        for number in range(count):
            self._decode([ids[number % len(ids)]], len(ids) + 1 + number, every=False)
        return count / (time.perf_counter() - started)

    def _decode(self, ids: Sequence[int], begin: int, every: bool) -> None:
        batch = self._api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place] = int(token), begin + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = every or place == len(ids) - 1
            if status := self._api.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returns {status}")
        finally:
            self._api.llama_batch_free(batch)
