"""Text that the model writes: drawn from its own nucleus, from one seed, and refused where memory is short."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accullm_cli.errors import AccullmError
from accullm_cli.model import self_text
from accullm_cli.model.self_text import _Sampler, chat_turns, needed_memory, sampled_windows
from accullm_cli.model.source import ModelSource, open_source
from accullm_cli.progress import Event
from tests.model.test_text import BOS, EOS, byte_tokenizer

VOCABULARY = 264  # six rows of padding behind the tokenizer's 258
SAMPLES, SEQ_LEN = 6, 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,  # distributions of some 60 tokens in the nucleus, far from uniform
        max_position_embeddings=64,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    directory = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(directory)
    return open_source(str(directory), tmp_path_factory.mktemp("cache"))


def write(source: ModelSource, seed: int = 0, bos: bool = False, samples: int = SAMPLES) -> torch.Tensor:
    return sampled_windows(source, byte_tokenizer(bos), "self", samples, SEQ_LEN, seed).ids


class Says:
    """A model that always gives the same logits."""

    generation_config = None

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(len(self.logits), 2)

    def __call__(self, input_ids: torch.Tensor, past_key_values: None, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1), past_key_values=None)


def sampler(logits: torch.Tensor, bos: bool = False) -> _Sampler:
    return _Sampler(Says(logits), byte_tokenizer(bos), torch.Generator().manual_seed(0))  # type: ignore[arg-type]


# -- windows -----------------------------------------------------------------------------------------------


def test_gives_the_windows_asked_for(source: ModelSource) -> None:
    found = sampled_windows(source, byte_tokenizer(), "self", SAMPLES, SEQ_LEN, 3)
    assert (found.ids.shape, found.ids.dtype) == ((SAMPLES, SEQ_LEN), torch.int64)
    assert found.sha256 == hashlib.sha256(np.asarray(found.ids.tolist(), dtype="<i8").tobytes()).hexdigest()
    assert found.description == ("6 windows of 40 tokens that the model wrote (temperature 1, top-p 0.95, seed 3)")


def test_the_same_seed_gives_the_same_ids_whatever_the_global_generator_does(source: ModelSource) -> None:
    torch.manual_seed(1)
    first = write(source)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert write(source).tolist() == first.tolist()
    assert torch.get_rng_state().tolist() == before.tolist()


def test_another_seed_gives_other_ids(source: ModelSource) -> None:
    assert (write(source, 0) != write(source, 1)).float().mean() > 0.5


def test_the_windows_of_a_run_differ_from_each_other(source: ModelSource) -> None:
    assert len({tuple(row) for row in write(source, bos=True).tolist()}) == SAMPLES


def test_every_token_is_in_the_nucleus_of_what_the_whole_model_gives_without_a_cache(source: ModelSource) -> None:
    ids = write(source)
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float64)
    with torch.no_grad():
        probabilities = model(ids).logits[:, :-1, :258].softmax(-1)
    drawn = 0
    for row, distributions in zip(ids.tolist(), probabilities, strict=True):
        for previous, token, distribution in zip(row, row[1:], distributions, strict=False):
            if previous == EOS:
                continue  # a new text
            likelier = [value for value in distribution.tolist() if value > distribution[token] * (1 + 1e-4)]
            assert sum(likelier) < 0.95 + 1e-4
            drawn += 1
    assert drawn > 200


def test_tokens_are_drawn_as_often_as_the_nucleus_says() -> None:
    probabilities = torch.zeros(260)
    probabilities[[5, 17, 40, 41, 99]] = torch.tensor([0.5, 0.3, 0.16, 0.02, 0.02])
    draws = sampler(probabilities.log().clamp(min=-1e4))._draw(probabilities.log().clamp(min=-1e4).expand(20_000, -1))
    counts = torch.bincount(draws, minlength=260)
    # 0.5 + 0.3 + 0.16 pass 0.95, so that 41 and 99 are out and the rest is scaled up.
    expected = torch.zeros(260)
    expected[[5, 17, 40]] = torch.tensor([0.5, 0.3, 0.16]) / 0.96
    assert counts[[41, 99]].tolist() == [0, 0]
    assert torch.allclose(counts / 20_000, expected, atol=0.012)  # 3.5 standard deviations


def test_every_other_window_starts_with_bos_where_the_tokenizer_adds_one(source: ModelSource) -> None:
    ids = write(source, bos=True)
    assert ids.shape == (SAMPLES, SEQ_LEN)
    assert (ids[:, 0] == BOS).tolist() == [number % 2 == 0 for number in range(SAMPLES)]


def test_else_starts_with_ordinary_tokens_from_all_over_the_vocabulary() -> None:
    starts = sampler(torch.zeros(264)).windows(500, 1)[:, 0]
    assert 0 <= int(starts.min()) < 10
    assert 245 < int(starts.max()) < BOS
    assert len(set(starts.tolist())) > 150


def test_never_writes_what_the_tokenizer_has_no_token_for() -> None:
    logits = torch.zeros(264)
    logits[258:] = 20
    assert int(sampler(logits).windows(8, 30).max()) < 258


def test_a_text_that_ends_is_followed_by_another_and_not_by_more_ends() -> None:
    logits = torch.zeros(264)
    logits[EOS] = 50
    ids = sampler(logits).windows(4, 9)
    assert (ids[:, 1::2] == EOS).all()
    assert (ids[:, 0::2] < BOS).all()


def test_every_end_that_the_generation_config_names_counts() -> None:
    logits = torch.zeros(264)
    logits[7] = 50
    model = Says(logits)
    model.generation_config = SimpleNamespace(eos_token_id=[EOS, 7])  # type: ignore[assignment]
    ids = _Sampler(model, byte_tokenizer(), torch.Generator().manual_seed(0)).windows(4, 9)  # type: ignore[arg-type]
    assert (ids[:, 1::2] == 7).all()
    assert (ids[:, 2::2] != 7).any()


def test_batches_are_reported_and_make_up_the_number(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "WINDOWS_PER_BATCH", 4)
    events: list[Event] = []
    found = sampled_windows(source, byte_tokenizer(), "self", SAMPLES, SEQ_LEN, 0, progress=events.append)
    assert len({tuple(row) for row in found.ids.tolist()}) == SAMPLES
    assert [(event.stage, event.label, event.done, event.total) for event in events] == [
        ("calibrate", "text 4/6", 4, 6),
        ("calibrate", "text 6/6", 6, 6),
    ]


def test_a_batch_that_is_kept_is_not_written_again(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches depend on their number, and neither on one another nor on how many there are."""
    monkeypatch.setattr(self_text, "WINDOWS_PER_BATCH", 4)
    kept: dict[int, torch.Tensor] = {}
    made: list[tuple[int, int]] = []

    def keep(number: int, count: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if number not in kept:
            made.append((number, count))
            kept[number] = make()
        return kept[number]

    whole = sampled_windows(source, byte_tokenizer(), "self", 6, SEQ_LEN, 0, keep).ids
    assert made == [(0, 4), (1, 2)]
    del kept[0]
    assert sampled_windows(source, byte_tokenizer(), "self", 6, SEQ_LEN, 0, keep).ids.tolist() == whole.tolist()
    assert made == [(0, 4), (1, 2), (0, 4)]
    # Nothing is left to write: the model is not read.
    monkeypatch.setattr(self_text, "_load", lambda source: pytest.fail("the model was read"))
    assert sampled_windows(source, byte_tokenizer(), "self", 6, SEQ_LEN, 0, keep).ids.tolist() == whole.tolist()


# -- chats -------------------------------------------------------------------------------------------------------

TEMPLATE = "{{ '^' }}{% for m in messages %}<{{ m.role[0] }}:{{ m.content }}>{% endfor %}"


def chatting(bos: bool = False, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(bos)
    tokenizer.chat_template = template
    return tokenizer


def test_the_template_says_what_stands_around_turns() -> None:
    tokenizer = chatting()
    found = chat_turns(tokenizer)
    around = (found.opening, found.behind_question, found.behind_answer)
    assert list(map(tokenizer.decode, around)) == ["^<u:", "><a:", "><u:"]
    assert chat_turns(chatting(bos=True)).opening == (BOS, *found.opening)


def says(ends: float) -> list[str]:
    """Windows of 100 tokens by a model that says "w", or ends with this probability."""
    tokenizer = chatting()
    (letter,) = tokenizer("w")["input_ids"]
    logits = torch.full((264,), -50.0)
    logits[[letter, EOS]] = torch.tensor([1 - ends, ends]).log().clamp(min=-50)
    generator = torch.Generator().manual_seed(0)
    chatter = _Sampler(Says(logits), tokenizer, generator, chat_turns(tokenizer))  # type: ignore[arg-type]
    return [tokenizer.decode(row) for row in chatter.windows(4, 100)]


def test_both_sides_of_a_chat_are_the_models_and_end_as_the_template_ends_them() -> None:
    windows = says(ends=0.2)
    for window in windows:
        turns = re.findall(r"<([ua]):(w*)", window)
        assert [role for role, _ in turns] == ["u", "a", *["u", "a"] * len(turns)][: len(turns)]
        assert window.startswith("^" + "".join(f"<{role}:{text}>" for role, text in turns[:-1]))
    assert sum(window.count("><a:") for window in windows) > 10
    assert max(len(text) for window in windows for text in re.findall("<a:(w*)", window)) > 5


def test_a_question_without_an_end_is_cut_off_so_that_answers_come_into_the_window() -> None:
    assert says(ends=0.0) == ["^<u:" + "w" * 25 + "><a:" + "w" * 67] * 4


def test_chats_come_from_the_whole_model(source: ModelSource) -> None:
    found = sampled_windows(source, chatting(), "self-chat", 3, SEQ_LEN, 0)
    assert found.ids[:, :4].tolist() == [[*chat_turns(chatting()).opening]] * 3
    assert found.description == (
        "3 windows of 40 tokens of chats that the model wrote (temperature 1, top-p 0.95, seed 0)"
    )
    bos = sampled_windows(source, chatting(bos=True), "self-chat", 3, SEQ_LEN, 0).ids
    assert (bos == BOS).nonzero().tolist() == [[0, 0], [2, 0]]
    assert bos.shape == (3, SEQ_LEN)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "the model's tokenizer has no chat template"),
        ("{{ messages[-1].content }}", "the model's chat template does not give turns as they are"),
    ],
)
def test_a_model_that_cannot_chat_is_told_so(template: str | None, problem: str) -> None:
    with pytest.raises(AccullmError) as caught:
        chat_turns(chatting(template=template))
    assert caught.value.line() == f"calibration text self-chat: {problem}; use self, or give a file"


# -- refusals ----------------------------------------------------------------------------------------------


def test_needed_memory_counts_weights_cache_and_logits(source: ModelSource) -> None:
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source.directory).parameters())
    cache = 2 * 2 * 2 * 8 * 5 * 100  # keys and values, layers, heads, head size, windows, tokens
    assert needed_memory(source, 5, 100) == 4 * (weights + cache + 6 * 5 * VOCABULARY)


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: ModelSource) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr(self_text, "_load", fail)
    monkeypatch.setattr(self_text, "available_memory", lambda: 1_500_000_000)
    monkeypatch.setattr(self_text, "needed_memory", lambda *arguments: 28_000_000_000)
    with pytest.raises(AccullmError) as caught:
        write(source)
    assert caught.value.line() == (
        "calibration text self: writing text takes the whole model in memory, 28.0 GB, but 1.5 GB are free; "
        "give a file with --calibration"
    )
    assert caught.value.exit_code == 4


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    logits = torch.zeros(264)
    logits[3] = float("nan")
    with pytest.raises(AccullmError) as caught:
        sampler(logits).windows(2, 5)
    assert caught.value.line() == (
        "calibration text self: the model's logits are not finite; give a file with --calibration"
    )
