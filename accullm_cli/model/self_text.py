"""Calibration text that the model writes itself, for models whose training data is not at hand.

LLM-QAT (arXiv 2305.17888, section 2.1) found that text sampled from a model's own distribution calibrates it as well
as its training data does, provided that tokens are drawn and not chosen greedily, which repeats itself. Each text
starts with the BOS token where the tokenizer adds one (of which half of the windows do without, see `model.text`), and
otherwise with a token drawn from the vocabulary.

Of a chat the model writes both sides: behind what its template puts before a user's turn, a model that was tuned on
chats writes what users ask (Magpie, arXiv 2406.08464), and behind what it puts before an answer, the answer.
"""

from __future__ import annotations

import gc
import hashlib
import math
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.model.other_text import rendered
from accullm_cli.model.source import ModelSource
from accullm_cli.model.text import Windows, ids_sha256, start_of_text
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.run import available_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPERATURE = 1.0
# Tokens are drawn from the likeliest ones that hold this much probability: the tail of a large vocabulary is noise.
TOP_P = 0.95
# Windows that are written at once: a step reads all weights, whether for one window or for many.
WINDOWS_PER_BATCH = 32
# A question that takes more than this share of a window is cut off there, so that answers come into it.
LONGEST_QUESTION = 0.25

# Gives the windows of a batch, int64 [count, seq_len], by its number: kept ones, or what the function makes.
Keep = Callable[[int, int, Callable[[], torch.Tensor]], torch.Tensor]


def make_anew(number: int, count: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Keeps nothing."""
    return make()


def sampled_windows(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    samples: int,
    seq_len: int,
    seed: int,
    keep: Keep = make_anew,
    progress: Progress = silent,
) -> Windows:
    """Windows sampled from the model, whole in memory in float32. The same seed gives the same ids on one machine.

    A text that ends before its window is full is followed by the next, as in windows cut from documents.

    Args:
        text: "self", or "self-chat" for chats through the model's template.
        samples: number of windows.
        seq_len: tokens in a window.
        keep: is asked for every batch. Batches depend on seed and number, and not on each other.
        progress: is told of every finished batch, as steps of the stage "calibrate".

    Raises:
        MachineError: the model does not fit in memory.
        AccullmError: its logits are not finite, or it has no template to chat with.
    """
    turns = chat_turns(tokenizer) if text == "self-chat" else None
    batch = min(samples, WINDOWS_PER_BATCH)
    adds_bos = bool(start_of_text(tokenizer))
    length = seq_len + 1 if adds_bos else seq_len
    _check_memory(source, batch, seq_len, where_of(text))
    models: list[PreTrainedModel] = []  # read where a batch is not there yet

    def write(number: int, count: int) -> torch.Tensor:
        if not models:
            models.append(_load(source))
        generator = torch.Generator().manual_seed(_batch_seed(text, seed, number))
        return _Sampler(models[0], tokenizer, generator, turns).windows(count, length)

    done: list[torch.Tensor] = []
    for number, start in enumerate(range(0, samples, batch)):
        count = min(batch, samples - start)
        done.append(keep(number, count, partial(write, number, count)))
        written = start + count
        progress(Event("calibrate", "step", f"text {written}/{samples}", None, written, samples))
    # A model's modules refer to each other in circles; the stages after this must not hold two models.
    models.clear()
    gc.collect()
    ids = torch.cat(done)
    if adds_bos:
        ids = torch.stack([window[1:] if number % 2 else window[:-1] for number, window in enumerate(ids)])
    wrote = "of chats that the model wrote" if turns else "that the model wrote"
    drawn = f"(temperature {TEMPERATURE:g}, top-p {TOP_P:g}, seed {seed})"
    return Windows(ids, f"{samples} windows of {seq_len} tokens {wrote} {drawn}", ids_sha256(ids))


def where_of(text: str) -> str:
    """What errors call it."""
    return f"calibration text {text}"


def _batch_seed(text: str, seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{text} {seed} {number}".encode()).digest()[:8], "little") >> 1


# -- the template ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatTurns:
    """What a chat template writes around the turns, as tokens: before the first question, and behind each turn."""

    opening: tuple[int, ...]
    behind_question: tuple[int, ...]
    behind_answer: tuple[int, ...]


def chat_turns(tokenizer: PreTrainedTokenizerBase) -> ChatTurns:
    """The template's text around turns, found by rendering turns that are known.

    Raises:
        AccullmError: there is no template, or it has no place for turns that are as they were given.
    """
    where = where_of("self-chat")
    if tokenizer.chat_template is None:
        raise AccullmError("the model's tokenizer has no chat template", where, "use self, or give a file")
    words = ["first-question", "first-answer", "second-question", "second-answer"]
    roles = ["user", "assistant"] * 2
    text = rendered(list(zip(roles, words, strict=True)), tokenizer, where)
    parts = re.split("|".join(words), text)
    if len(parts) != len(words) + 1:
        raise AccullmError(
            "the model's chat template does not give turns as they are", where, "use self, or give a file"
        )
    opening, behind_question, behind_answer = (
        tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts[:3]
    )
    start = tuple(start_of_text(tokenizer))
    if opening[: len(start)] != start:
        opening = start + opening
    return ChatTurns(opening, behind_question, behind_answer)


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


def _check_memory(source: ModelSource, batch: int, seq_len: int, where: str) -> None:
    needed, free = needed_memory(source, batch, seq_len), available_memory()
    if free is not None and needed > free:
        raise MachineError(
            f"writing text takes the whole model in memory, {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free",
            where,
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

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generator: torch.Generator,
        turns: ChatTurns | None = None,
    ) -> None:
        self._model = model
        self._generator = generator
        self._turns = turns
        vocabulary = model.get_input_embeddings().weight.shape[0]
        # Rows of the embedding beyond the tokenizer's vocabulary are padding, and stand for no text.
        self._tokens = min(len(tokenizer), vocabulary)
        special = {*tokenizer.all_special_ids}
        self._ordinary = torch.tensor([token for token in range(self._tokens) if token not in special])
        self._bos = start_of_text(tokenizer)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        behind = (turns.behind_question[0], turns.behind_answer[0]) if turns else ()
        self._ends = {
            *(ends if isinstance(ends, list) else [ends]),
            tokenizer.eos_token_id,
            *special.intersection(behind),
        }

    @torch.no_grad()
    def windows(self, count: int, seq_len: int) -> torch.Tensor:
        """int64 [count, seq_len]."""
        ids = torch.empty(count, seq_len, dtype=torch.int64)
        rows = [_Row(self._turns, self._ends, int(seq_len * LONGEST_QUESTION), self._start) for _ in range(count)]
        pending = [self._opening() for _ in range(count)]
        cache = None
        for position in range(seq_len):
            if position:
                step = self._model(input_ids=ids[:, position - 1 : position], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                drawn = self._draw(step.logits[:, -1].float()).tolist()
            for row in range(count):
                pending[row] = pending[row] or rows[row].behind(drawn[row])
                ids[row, position] = pending[row].pop(0)
        return ids

    def _opening(self) -> list[int]:
        """What a window begins with."""
        return [*self._turns.opening] if self._turns else (self._bos[:1] or [self._start()])

    def _start(self) -> int:
        """The first token of a text: any ordinary one, each as likely as the other."""
        return int(self._ordinary[torch.randint(len(self._ordinary), (), generator=self._generator)])

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """One token for each row of logits [B, V] from its nucleus (top-p, arXiv 1904.09751).

        Whatever falls outside of the nucleus is drawn again, which gives exactly the nucleus' own distribution and
        spares a sort of the vocabulary.
        """
        if not bool(torch.isfinite(logits).all()):
            where = where_of("self-chat" if self._turns else "self")
            raise AccullmError("the model's logits are not finite", where, "give a file with --calibration")
        probabilities = torch.softmax(logits[:, : self._tokens] / TEMPERATURE, -1)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        while bool((outside := _outside_nucleus(probabilities, drawn)).any()):
            again = torch.multinomial(probabilities, 1, generator=self._generator)
            drawn = torch.where(outside, again, drawn)
        return drawn.squeeze(1)


@dataclass
class _Row:
    """What follows in a window on the tokens that the model draws.

    ends: tokens that end a text or a turn. longest: tokens of a question. start: draws a text's first token.
    """

    turns: ChatTurns | None
    ends: Container[int | None]
    longest: int
    start: Callable[[], int]
    asks: bool = True
    written: int = 0

    def behind(self, drawn: int) -> list[int]:
        """The tokens that stand where `drawn` would: itself, and what its end of a text or a turn brings."""
        self.written += 1
        is_end = drawn in self.ends
        if self.turns is None:
            # What a model says after the end of a text is undefined, most often the end again.
            return [drawn, self.start()] if is_end else [drawn]
        if not is_end and not (self.asks and self.written > self.longest):
            return [drawn]
        behind = self.turns.behind_question if self.asks else self.turns.behind_answer
        self.asks, self.written = not self.asks, 0
        return [*behind]


def _outside_nucleus(probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether more likely tokens alone hold TOP_P already: bool [B, 1] for one token [B, 1] a row."""
    own = probabilities.gather(1, tokens)
    likelier = probabilities.masked_fill(probabilities <= own, 0).sum(1, keepdim=True)
    return likelier >= TOP_P
