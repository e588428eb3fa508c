"""Calibration text that the model writes itself, for models whose training data is not at hand.

LLM-QAT (arXiv 2305.17888, section 2.1) found that text sampled from a model's own distribution calibrates it as well
as its training data does, provided that tokens are drawn and not chosen greedily, which repeats itself. Each text
starts with the BOS token where the tokenizer adds one (of which half of the windows do without, see `model.text`), and
otherwise with a token drawn from the vocabulary.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.model.source import ModelSource
from accullm_cli.model.text import Windows, start_of_text
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.run import available_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPERATURE = 1.0
# Tokens are drawn from the likeliest ones that hold this much probability: the tail of a large vocabulary is noise.
TOP_P = 0.95
# Windows that are written at once: a step reads all weights, whether for one window or for many.
WINDOWS_PER_BATCH = 32
WHERE = "calibration text self"


def sampled_windows(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    progress: Progress = silent,
) -> Windows:
    """Windows sampled from the model, whole in memory in float32. The same seed gives the same ids on one machine.

    A text that ends before its window is full is followed by the next, as in windows cut from documents.

    Args:
        samples: number of windows.
        seq_len: tokens in a window.
        progress: is told of every finished batch, as steps of the stage "calibrate".

    Raises:
        MachineError: the model does not fit in memory.
        AccullmError: its logits are not finite.
    """
    batch = min(samples, WINDOWS_PER_BATCH)
    adds_bos = bool(start_of_text(tokenizer))
    _check_memory(source, batch, seq_len)
    model = _load(source)
    generator = torch.Generator().manual_seed(seed)
    sampler = _Sampler(model, tokenizer, generator)
    done: list[torch.Tensor] = []
    for start in range(0, samples, batch):
        done.append(sampler.windows(min(batch, samples - start), seq_len + 1 if adds_bos else seq_len))
        written = start + len(done[-1])
        progress(Event("calibrate", "step", f"text {written}/{samples}", None, written, samples))
    # A model's modules refer to each other in circles; the stages after this must not hold two models.
    del model, sampler
    gc.collect()
    ids = torch.cat(done)
    if adds_bos:
        ids = torch.stack([window[1:] if number % 2 else window[:-1] for number, window in enumerate(ids)])
    return Windows(
        ids,
        f"{samples} windows of {seq_len} tokens that the model wrote (temperature {TEMPERATURE:g}, top-p {TOP_P:g}, "
        f"seed {seed})",
        hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
    )


def needed_memory(source: ModelSource, batch: int, seq_len: int) -> int:
    """Bytes that sampling takes at its peak: weights and key/value cache in float32, and a step's logits."""
    weights = sum(math.prod(info.shape) for info in source.tensors.values())
    text = source.config.get("text_config") or source.config  # models with other inputs keep their decoder's here
    layers, heads = _number(text, "num_hidden_layers", "n_layer"), _number(text, "num_attention_heads", "n_head")
    hidden = _number(text, "hidden_size", "n_embd")
    head_dim = text.get("head_dim") or hidden // max(heads, 1)
    cache = 2 * layers * (text.get("num_key_value_heads") or heads) * head_dim * batch * seq_len
    # Logits, probabilities, and what drawing from them takes.
    logits = 6 * batch * _number(text, "vocab_size")
    return 4 * (weights + cache + logits)


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of the names that the configuration has; 0 where it has none."""
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _check_memory(source: ModelSource, batch: int, seq_len: int) -> None:
    needed, free = needed_memory(source, batch, seq_len), available_memory()
    if free is not None and needed > free:
        raise MachineError(
            f"writing text takes the whole model in memory, {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free",
            WHERE,
            "give a file with --calibration",
        )


def _load(source: ModelSource) -> PreTrainedModel:
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return model.eval().requires_grad_(False)


class _Sampler:
    """Draws windows of tokens from a model, all random choices from one generator."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> None:
        self._model = model
        self._generator = generator
        vocabulary = model.get_input_embeddings().weight.shape[0]
        # Rows of the embedding beyond the tokenizer's vocabulary are padding, and stand for no text.
        self._tokens = min(len(tokenizer), vocabulary)
        special = {*tokenizer.all_special_ids}
        self._ordinary = torch.tensor([token for token in range(self._tokens) if token not in special])
        self._bos = next(iter(start_of_text(tokenizer)), None)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = torch.tensor([token for token in {*ends, tokenizer.eos_token_id} if token is not None])

    @torch.no_grad()
    def windows(self, count: int, seq_len: int) -> torch.Tensor:
        """int64 [count, seq_len]."""
        ids = torch.empty(count, seq_len, dtype=torch.int64)
        ids[:, 0] = self._starts(count) if self._bos is None else self._bos
        cache = None
        for position in range(1, seq_len):
            step = self._model(input_ids=ids[:, position - 1 : position], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            drawn = self._draw(step.logits[:, -1].float())
            # What a model says after the end of a text is undefined, most often the end again.
            ended = torch.isin(ids[:, position - 1], self._ends)
            ids[:, position] = torch.where(ended, self._starts(count), drawn)
        return ids

    def _starts(self, count: int) -> torch.Tensor:
        """The first tokens of texts: any ordinary token, each as likely as the other."""
        return self._ordinary[torch.randint(len(self._ordinary), (count,), generator=self._generator)]

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """One token for each row of logits [B, V] from its nucleus (top-p, arXiv 1904.09751).

        Whatever falls outside of the nucleus is drawn again, which gives exactly the nucleus' own distribution and
        spares a sort of the vocabulary.
        """
        if not bool(torch.isfinite(logits).all()):
            raise AccullmError("the model's logits are not finite", WHERE, "give a file with --calibration")
        probabilities = torch.softmax(logits[:, : self._tokens] / TEMPERATURE, -1)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        while bool((outside := _outside_nucleus(probabilities, drawn)).any()):
            again = torch.multinomial(probabilities, 1, generator=self._generator)
            drawn = torch.where(outside, again, drawn)
        return drawn.squeeze(1)


def _outside_nucleus(probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether more likely tokens alone hold TOP_P already: bool [B, 1] for one token [B, 1] a row."""
    own = probabilities.gather(1, tokens)
    likelier = probabilities.masked_fill(probabilities <= own, 0).sum(1, keepdim=True)
    return likelier >= TOP_P
