"""Models of random weights, of any size: Llama and Mixtral, with a tokenizer of bytes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from accullm_cli.errors import MachineError
from accullm_cli.run import existing_parent, write_text
from accullm_cli.units import size

# Raised whenever the bytes of the model change, so that an older one is written again.
RECIPE = 1


def ensure_model(directory: Path, shape: Mapping[str, int], seed: int = 0, with_weights: bool = True) -> None:
    """Write a model of normally distributed weights; nothing where it is there already. Holds one block at a time.

    Args:
        shape: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, vocab_size,
            num_hidden_layers; of a Mixtral num_local_experts, too, and of a Llama not.
        with_weights: otherwise files are as large, but take no disk: behind the header, they are a hole.

    Raises:
        MachineError: the disk has no room for it.
    """
    marker = {"recipe": RECIPE, "seed": seed, "with_weights": with_weights, **shape}
    made = directory / "made.json"
    if made.exists() and json.loads(made.read_text(encoding="utf-8")) == marker:
        return
    needed = checkpoint_bytes(shape) if with_weights else 0
    free = shutil.disk_usage(existing_parent(directory)).free
    # The model, and its artifact with the working files (4.5 of 16 bits, twice where the disk cannot link).
    if free < 1.6 * needed:
        raise MachineError(
            f"has {size(free)} free, but {size(int(1.6 * needed))} are needed", directory, "give another --work"
        )
    directory.mkdir(parents=True, exist_ok=True)
    made.unlink(missing_ok=True)
    write_weights(directory, shape, seed if with_weights else None)
    write_tokenizer(directory)
    kind = "Mixtral" if "num_local_experts" in shape else "Llama"
    config = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "dtype": "bfloat16",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 256,
        **shape,
    }
    write_text(directory / "config.json", json.dumps(config, indent=1) + "\n")
    write_text(made, json.dumps(marker, indent=1) + "\n")


def block_shapes(shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The tensors of one block, by the end of their name."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    attention = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
    }
    if (experts := shape.get("num_local_experts")) is None:
        of_mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        return {**attention, **{f"mlp.{name}.weight": sides for name, sides in of_mlp.items()}}
    of_expert = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    names = {
        f"block_sparse_moe.experts.{expert}.{name}.weight": sides
        for expert in range(experts)
        for name, sides in of_expert.items()
    }
    return {**attention, "block_sparse_moe.gate.weight": (experts, hidden), **names}


def outside_shapes(shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The tensors outside the blocks."""
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def checkpoint_bytes(shape: Mapping[str, int]) -> int:
    """Bytes of all weights in bfloat16."""

    def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(map(math.prod, shapes.values()))

    return 2 * (count(outside_shapes(shape)) + shape["num_hidden_layers"] * count(block_shapes(shape)))


def write_weights(directory: Path, shape: Mapping[str, int], seed: int | None) -> None:
    """One safetensors file for each block and one for the rest, with their index; without a seed, of holes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed or 0)

    def draw(sides: tuple[int, ...]) -> torch.Tensor:
        if len(sides) == 1:
            return torch.ones(sides, dtype=torch.bfloat16)
        # 0.02 is what Llama's own training started from.
        return torch.empty(sides, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    parts = [outside_shapes(shape)]
    for layer in range(shape["num_hidden_layers"]):
        parts.append({f"model.layers.{layer}.{name}": sides for name, sides in block_shapes(shape).items()})
    file_of: dict[str, str] = {}
    for number, shapes in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        if seed is None:
            write_hole(directory / file, shapes)
        else:
            say(f"writing {directory / file}")
            tensors = {name: draw(sides) for name, sides in shapes.items()}
            save_file(tensors, directory / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": checkpoint_bytes(shape)}, "weight_map": file_of}
    write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def write_hole(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of these bfloat16 tensors (its length, 8 bytes; a header in JSON; data), without the data."""
    header, end = {}, 0
    for name, sides in shapes.items():
        begin, end = end, end + 2 * math.prod(sides)
        header[name] = {"dtype": "BF16", "shape": sides, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes, 0 to 255, with the end of text as 256: it needs no training and no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(directory)


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
