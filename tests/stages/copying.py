"""A tiny model that has learned to copy: trained in seconds, exact on nearly all items."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tiny import make_tokenizer

LETTERS = 8
HEAD = 16  # features of a head


def words(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(string.ascii_lowercase) for _ in range(LETTERS)) for _ in range(count)]


def make_copier(directory: Path, steps: int = 200) -> Path:
    """A checkpoint that continues "abcdefgh|" with " abcdefgh" and a line's end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=260,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = make_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        texts = [f"{word}| {word}\n" for word in words(64, step)]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, LETTERS:-1].flatten(0, 1), ids[:, LETTERS + 1 :].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_items(path: Path, count: int, seed: int = 10_000) -> Path:
    rows = [{"prompt": f"{word}|", "answer": word} for word in words(count, seed)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def swap_heads(artifact: Path, linear: str) -> None:
    """Exchange the rows of a linear's first two heads in an artifact, in all that is stored of it."""
    shard = json.loads((artifact / "model.safetensors.index.json").read_text())["weight_map"][f"{linear}.qweight"]
    tensors = load_file(artifact / shard)
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] == linear and tensor.dim() == 2 and tensor.shape[0] == 4 * HEAD:
            swapped = tensor.clone()
            swapped[:HEAD], swapped[HEAD : 2 * HEAD] = tensor[HEAD : 2 * HEAD], tensor[:HEAD]
            tensors[name] = swapped
    save_file(tensors, artifact / shard, metadata={"format": "pt"})
