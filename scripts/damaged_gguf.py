"""A GGUF file of a tiny llama, written from values that may be anything: what bench_fuzz.py damages."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any


def gguf_model() -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The metadata of a llama of one block, and the shapes of its tensors, all of float32."""
    tokens = [*map(chr, range(33, 127)), "th", "er"]
    metadata = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.alignment": 32,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 1,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["t h", "e r"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        "split.count": 1,
    }
    tensors = {"token_embd.weight": [len(tokens), 32], "output_norm.weight": [32]}
    for name, rows in {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}.items():
        tensors[f"blk.0.{name}.weight"] = [rows, 32]
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{name}.weight"] = [32, 32]
    return metadata, tensors | {"blk.0.attn_norm.weight": [32], "blk.0.ffn_norm.weight": [32]}


def gguf_data(tensors: Mapping[str, Sequence[int]]) -> bytes:
    return b"\0\0\0\0" * sum(prod(shape) for shape in tensors.values())


def gguf_head(metadata: Any, tensors: Any) -> bytes:
    """What stands before the data. What it cannot hold is a text there, or nothing."""
    keys = metadata if isinstance(metadata, dict) else {}
    shapes = tensors if isinstance(tensors, dict) else {}
    found = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(keys))
    for key, value in keys.items():
        kind = _gguf_type(value)
        found += _gguf_text(key) + struct.pack("<I", kind) + _gguf_value(value, kind)
    offset = 0
    for name, shape in shapes.items():
        sizes = [size & (2**64 - 1) for size in shape if type(size) is int] if isinstance(shape, list) else []
        found += _gguf_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes[::-1], 0, offset)
        offset = (offset + 4 * prod(sizes)) % 2**64
    return found + bytes(-len(found) % 32)


def _gguf_type(value: Any) -> int:
    """BOOL, UINT32 or INT64, FLOAT32, ARRAY, and STRING for all else."""
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 4 if 0 <= value < 2**32 else 11
    return {float: 6, list: 9}.get(type(value), 8)


def _gguf_value(value: Any, kind: int) -> bytes:
    if kind == 9:
        kinds = {_gguf_type(entry) for entry in value}
        of = kinds.pop() if len(kinds) == 1 else 8
        return struct.pack("<IQ", of, len(value)) + b"".join(_gguf_value(entry, of) for entry in value)
    return _gguf_text(value) if kind == 8 else struct.pack({7: "<?", 4: "<I", 11: "<q", 6: "<f"}[kind], value)


def _gguf_text(value: Any) -> bytes:
    encoded = str(value).encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded
