"""Exact tasks on the demo's real model: what one forward pass says of an item is what `generate` does."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from accullm_cli.config_file import load_config
from accullm_cli.model.source import open_source
from accullm_cli.progress import silent
from accullm_cli.run import RunDirectory
from accullm_cli.stages.answers import JUDGED, load_answers, original_answers, questions_of
from accullm_cli.stages.job import Job
from accullm_cli.stages.stage import walk
from accullm_cli.tasks import is_right
from tests.end_to_end.test_real_model import smollm2  # noqa: F401  a fixture

ITEMS = 10  # of each of two tasks


def test_teacher_forced_exactness_is_what_generate_gives(smollm2: Path, tmp_path: Path) -> None:  # noqa: F811
    sets = ["validation.tasks=identifiers:easy,arithmetic:easy", f"validation.task_items={ITEMS}"]
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        job = Job(load_config(str(smollm2), sets=sets), run, open_source(str(smollm2), run.path, silent), silent)
        list(walk(job, [original_answers(JUDGED)]))
        prompter, questions = questions_of(job, JUDGED)
        told = load_answers(job, JUDGED, None)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    right = 0
    for question, answer in zip(questions, told, strict=True):
        prompt = torch.tensor([question.prompt])
        # Room for the end, and for an answer that is spelled with more tokens than the tokenizer's own.
        longest = max(*map(len, question.rows), len(answer.path)) + 1
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=longest, do_sample=False)
        said = ids[0, len(question.prompt) :].tolist()
        ended = said[-1] in prompter.ends
        text = prompter.text_of(said[:-1] if ended else said)
        assert answer.is_right == (ended and text in (question.item.answer, *question.item.also)), question.item
        assert answer.is_right == (ended and is_right(question.item, text)) or question.item.kind == "JSON"
        if not answer.is_right and len(question.rows) == 1:
            assert said[answer.place] == answer.other
        right += answer.is_right
    assert len(questions) == 2 * ITEMS
    assert 4 < right < 2 * ITEMS - 4
