"""answers: by blocks as by the whole model, what is lost is found, a call goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import accullm_cli.hf  # noqa: F401  teaches transformers the format
from accullm_cli.config import Config
from accullm_cli.measure.answers import Answer
from accullm_cli.measure.measurement import Measurement
from accullm_cli.pipeline import convert, dry_run, validate_artifact
from accullm_cli.progress import Event
from accullm_cli.run import Reason
from accullm_cli.stages import answers
from accullm_cli.stages import asking as module
from accullm_cli.stages.answers import (
    JUDGED,
    artifact_answers,
    load_agreement,
    load_answers,
    original_answers,
    questions_of,
)
from accullm_cli.stages.compute import Compute
from accullm_cli.stages.measures import found
from accullm_cli.stages.stage import finished, walk
from accullm_cli.tasks import FAMILIES
from tests.pipeline.observe import refusal
from tests.stages.copying import make_copier, swap_heads, write_items
from tests.streaming import fast_config, opened, reference_model, run_alone, short_config
from tests.tiny import edit_config, make_checkpoint

ITEMS = 60


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("copier")
    write_items(place / "copy.jsonl", ITEMS)
    return make_copier(place / "model")


def asking(model: Path, out: Path, **settings: object) -> Config:
    tasks = settings.pop("validation__tasks", model.with_name("copy.jsonl"))
    return short_config(model, out, validation__tasks=tasks, **settings)


@pytest.fixture(scope="module")
def faithful(copier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of 8 bits."""
    out = tmp_path_factory.mktemp("faithful") / "out"
    report = convert(asking(copier, out, plan__bits=8))
    assert report.figure("retention").value == 1.0
    return out


def tasks_of(report_or_job: object) -> Measurement:
    measurement = report_or_job.measurement("tasks")  # type: ignore[attr-defined]
    assert measurement is not None
    return measurement


def greedy(model: torch.nn.Module, prompt: tuple[int, ...], ends: tuple[int, ...], limit: int = 40) -> list[int]:
    """Token by token, each from the logits of the whole sequence: no cache, no library's generate."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_the_original_is_right_where_greedy_decoding_gives_the_answer(copier: Path, tmp_path: Path) -> None:
    model = reference_model(copier)
    with opened(asking(copier, tmp_path / "out")) as job:
        run_alone(job, original_answers(JUDGED))
        prompter, questions = questions_of(job, JUDGED)
        told = load_answers(job, JUDGED, None)
    for question, answer in zip(questions, told, strict=True):
        said = greedy(model, question.prompt, prompter.ends)
        assert answer.is_right == (prompter.text_of(said).split("\n")[0].strip() == question.item.answer)
        assert tuple(said[: answer.place]) == answer.path[: answer.place]
    assert sum(answer.is_right for answer in told) > 0.9 * ITEMS


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_rows_of_many_lengths_are_scored_as_each_alone_by_the_whole_model(name: str, tmp_path: Path) -> None:
    """Places, tokens and margins, on a model that gets nothing right."""
    source = make_checkpoint(name, tmp_path / "model")
    rows = [{"prompt": "12 and 3" * count, "answer": ["15", "fifteen", "15."]} for count in (1, 2, 3, 3, 9)]
    (tmp_path / "copy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = asking(source, tmp_path / "out")
    with opened(config) as job:
        run_alone(job, original_answers(JUDGED))
        prompter, questions = questions_of(job, JUDGED)
        told = load_answers(job, JUDGED, None)
    assert len({len(question.prompt) for question in questions}) == 4
    model = reference_model(source)
    for question, answer in zip(questions, told, strict=True):
        row = next(row for row in question.rows if row[: len(answer.path) - 1] == answer.path[:-1])
        logits = model(torch.tensor([[*question.prompt, *row]])).logits[0, len(question.prompt) - 1 :].double()
        for place, (token, margin) in enumerate(zip(answer.path, answer.margins, strict=True)):
            node = next(n for n in question.nodes if n.depth == place and question.rows[n.row][:place] == row[:place])
            right = {*node.tokens, *(prompter.ends if node.may_end else ())}
            assert token in right
            others = [other for other in range(logits.shape[-1]) if other not in right]
            assert margin == pytest.approx(
                float(logits[place, list(right)].max() - logits[place, others].max()), abs=1e-4
            )


def test_a_faithful_artifact_keeps_all_and_one_with_two_heads_exchanged_does_not(
    copier: Path, faithful: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(faithful, broken)
    swap_heads(broken, "model.layers.0.self_attn.q_proj")
    files = {"validation__junit": tmp_path / "tests.xml", "validation__summary": tmp_path / "summary.md"}
    config = asking(copier, tmp_path / "x", validation__require="[retention>=99%]", **files)
    report = validate_artifact(broken, config)
    assert not report.contract_met
    assert 'failures="1"' in files["validation__junit"].read_text()
    assert files["validation__summary"].read_text().startswith("## ❌ Contract not met: 1 of 1 condition missed\n")
    lost = dict(tasks_of(report).counts)["lost"]
    assert report.figure("retention").value < 0.9
    assert report.figure("retention").high < 1.0
    (cases,) = tasks_of(report).cases
    assert len(cases.cases) + cases.left_out == lost
    for case in cases.cases:
        assert case.original.same == case.artifact.same
        assert case.original.differs != case.artifact.differs
    (group,) = tasks_of(report).groups
    assert "right answers kept" in group.failure
    assert report.figure("margin_change").high < 0


def test_what_an_artifact_says_is_what_it_says_in_transformers(copier: Path, faithful: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    shutil.copytree(faithful, broken)
    swap_heads(broken, "model.layers.1.self_attn.q_proj")
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float32)
    with opened(asking(copier, tmp_path / "out")) as job:
        done = run_alone(job, original_answers(JUDGED))
        list(walk(job, [artifact_answers("accullm", broken, JUDGED)], finished([done])))
        prompter, questions = questions_of(job, JUDGED)
        told = load_answers(job, JUDGED, "accullm")
    for question, answer in list(zip(questions, told, strict=True))[:20]:
        with torch.no_grad():
            said = greedy(model, question.prompt, prompter.ends)
        assert answer.is_right == (prompter.text_of(said).split("\n")[0].strip() == question.item.answer)
        if not answer.is_right:
            assert tuple(said[: answer.place + 1]) == (*answer.path[: answer.place], answer.other)


class Stop(Exception):  # noqa: N818
    """As if the process were killed here."""


def test_an_interrupted_call_goes_on_behind_the_last_portion(
    copier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTION", 200)
    config = asking(copier, tmp_path / "out")
    ran: list[int] = []
    by_blocks = module.by_blocks

    def counted(decoder):  # type: ignore[no-untyped-def]
        logits_of = by_blocks(decoder)

        def wrapped(portion, places):  # type: ignore[no-untyped-def]
            ran.append(len(portion))
            return logits_of(portion, places)

        return wrapped

    monkeypatch.setattr(module, "by_blocks", counted)

    def stop(event: Event) -> None:
        if len(ran) == 3 and event.kind == "step":
            raise Stop

    with pytest.raises(Stop), opened(config, stop) as job:
        run_alone(job, original_answers(JUDGED))
    with opened(config) as job:
        run_alone(job, original_answers(JUDGED))
        resumed = load_answers(job, JUDGED, None)
    assert sum(ran) == 2 * ITEMS  # the answer behind a space, and at once
    assert not list((tmp_path / "out.run/tasks").glob("*step*"))
    monkeypatch.setattr(module, "PORTION", 8192)
    with opened(asking(copier, tmp_path / "whole")) as job:
        run_alone(job, original_answers(JUDGED))
        assert load_answers(job, JUDGED, None) == resumed


def test_other_tasks_run_that_measure_again_and_nothing_else(copier: Path, faithful: Path) -> None:
    again = convert(asking(copier, faithful, plan__bits=8))
    assert not any(stage.ran for stage in again.stages)
    others = write_items(copier.with_name("others.jsonl"), 12, seed=77)
    report = convert(asking(copier, faithful, plan__bits=8, validation__tasks=others))
    assert [stage.name for stage in report.stages if stage.ran] == ["task answers", "validate accullm on tasks"]
    assert dict(tasks_of(report).counts)["items"] == 12
    without = convert(asking(copier, faithful, plan__bits=8, validation__tasks="none"))
    assert without.measurement("tasks") is None
    assert not any(stage.ran for stage in without.stages)


def test_a_dry_run_knows_of_the_tasks(copier: Path, tmp_path: Path) -> None:
    planned = {stage.name: stage.reason for stage in dry_run(asking(copier, tmp_path / "out")).stages}
    assert planned["task answers"] == planned["validate accullm on tasks"] == "new"


def test_the_same_items_under_another_name_are_others(copier: Path, tmp_path: Path) -> None:
    with opened(asking(copier, tmp_path / "out")) as job:
        run_alone(job, original_answers(JUDGED))
    shutil.copy(copier.with_name("copy.jsonl"), tmp_path / "renamed.jsonl")
    with opened(asking(copier, tmp_path / "out", validation__tasks=tmp_path / "renamed.jsonl")) as job:
        outcome = run_alone(job, original_answers(JUDGED))
    assert outcome.reason == Reason("input changed", "judged items")


def test_what_blocks_are_passed_for_the_lengths_of_one_portion_alone_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Masks and rotary positions of every length of all items would add up."""
    source = make_checkpoint("gemma3", tmp_path / "model")
    rows = [{"prompt": "x" * length + "=", "answer": "y"} for length in range(10, 30)]
    (tmp_path / "copy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(module, "PORTION", 100)
    kept: list[int] = []
    decoders = []
    by_blocks = module.by_blocks

    def seen(decoder):  # type: ignore[no-untyped-def]
        decoders.append(decoder)
        return by_blocks(decoder)

    monkeypatch.setattr(module, "by_blocks", seen)

    def count(event: Event) -> None:
        if event.kind == "step" and decoders:
            kept.append(len(decoders[0]._calls))

    with opened(asking(source, tmp_path / "out"), count) as job:
        run_alone(job, original_answers(JUDGED))
    assert len(kept) >= 10
    assert 1 <= max(kept) <= 5


def test_items_longer_than_the_model_are_refused_before_any_work(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    config = fast_config(source, tmp_path / "out", validation__tasks="retrieval:500")
    line = refusal(lambda: convert(config))
    assert line == (
        "--tasks: task retrieval:500 takes some 500 tokens, and the model has 256 positions; give fewer tokens"
    )
    config = fast_config(source, tmp_path / "out", validation__tasks="words:easy")
    line = refusal(lambda: convert(config))
    assert line.startswith("--tasks: task words:easy, ")
    assert line.endswith(" tokens, and the model has 256 positions; give an easier level, or fewer tokens")
    assert not (tmp_path / "out.run").exists()


def test_logits_that_are_not_finite_are_refused(copier: Path, tmp_path: Path) -> None:
    bad = tmp_path / "model"
    shutil.copytree(copier, bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][3] = 3e38
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    write_items(tmp_path / "copy.jsonl", 3)
    with opened(asking(bad, tmp_path / "out")) as job:
        assert refusal(lambda: run_alone(job, original_answers(JUDGED))) == (
            "tasks: logits hold NaN or Inf; look for damaged weights, or run accullm verify"
        )


@pytest.mark.parametrize(
    ("tasks", "require", "line"),
    [
        ("none", "retention>=99%", "retention needs exact tasks, in 'retention>=99%'; give --tasks"),
        (
            "sql,code",
            "retention.slq>=99%",
            "'slq' is no task of this run, in 'retention.slq>=99%'; the tasks are sql, code",
        ),
        (
            "sql",
            "retention.>=99%",
            "names no part of retention, in 'retention.>=99%'; write retention, or retention.sql",
        ),
    ],
)
def test_conditions_on_what_is_not_measured(tasks: str, require: str, line: str, copier: Path, tmp_path: Path) -> None:
    config = asking(copier, tmp_path / "out", validation__tasks=tasks, validation__require=f"['{require}']")
    assert refusal(lambda: convert(config)) == f"--require: {line}"


def test_a_context_of_sixteen_tokens_too_few_is_named_by_the_item(copier: Path, tmp_path: Path) -> None:
    small = tmp_path / "model"
    shutil.copytree(copier, small)
    edit_config(small, max_position_embeddings=16)
    write_items(tmp_path / "copy.jsonl", 3)
    config = asking(small, tmp_path / "out", calibration__seq_len=16)
    assert refusal(lambda: convert(config)) == (
        "--tasks: task copy, line 1 takes 18 tokens, and the model has 16 positions; give shorter prompts"
    )


def test_what_is_stored_is_read_back(copier: Path, faithful: Path) -> None:
    convert(asking(copier, faithful, plan__bits=8))
    with opened(asking(copier, faithful, plan__bits=8)) as job:
        told = load_answers(job, JUDGED, "accullm")
        measured = found(job, "accullm")
    assert all(isinstance(answer, Answer) for answer in told)
    content = json.loads((faithful.with_name("out.run") / "tasks/answers-accullm.json").read_text())
    assert len(content["items"]) == len(told) == ITEMS
    assert {entry.measure for entry in measured} == {"kl", "tasks"}


def test_an_answer_that_means_the_same_is_right_and_becomes_one_of_the_known(
    copier: Path, faithful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items whose answer is in capitals, of a model that copies small letters, scored by a reader who ignores case."""
    rows = [json.loads(line) for line in copier.with_name("copy.jsonl").read_text().splitlines()[:6]]
    loud = [{"prompt": row["prompt"], "answer": row["answer"].upper()} for row in rows]
    (tmp_path / "loud.jsonl").write_text("\n".join(map(json.dumps, loud)))
    config = asking(copier, tmp_path / "out", validation__tasks=tmp_path / "loud.jsonl")

    def answered(out: str) -> tuple[list[Answer], list[Answer]]:
        with opened(asking(copier, tmp_path / out, validation__tasks=tmp_path / "loud.jsonl")) as job:
            done = run_alone(job, original_answers(JUDGED))
            stage = artifact_answers("accullm", faithful, JUDGED)
            list(walk(job, [stage], finished([done])))
            return load_answers(job, JUDGED, None), load_answers(job, JUDGED, "accullm")

    assert not any(answer.is_right for answers in answered("strict") for answer in answers)
    monkeypatch.setattr(answers, "family_of", lambda item: FAMILIES["sql"])
    monkeypatch.setattr(answers, "is_right", lambda item, text: text.strip().lower() == item.answer.lower())
    original, artifact = answered("lenient")
    assert all(answer.is_right for answer in (*original, *artifact))
    assert [answer.path for answer in original] == [answer.path for answer in artifact]
    monkeypatch.setattr(Compute, "free_memory", lambda compute: 1000)
    with opened(config) as job:
        (sentence,) = run_alone(job, original_answers(JUDGED)).record.records
    assert sentence == (
        "6 wrong answers were not written out by the model, as it takes 413 kB of memory, of which 1 kB are free; "
        "whether other words mean the same, and whether artifacts give the same wrong answers, is not known"
    )


def mixed_items(path: Path, copier: Path) -> Path:
    """Items that the copier gets right, ones that it gets wrong, and ones of which it says more than would be right."""
    rows = [json.loads(line) for line in copier.with_name("copy.jsonl").read_text().splitlines()[:18]]
    for number, row in enumerate(rows):
        row["answer"] = (row["answer"], row["answer"][::-1], row["answer"][1:4])[number % 3]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_whole_answers_agree_where_greedy_decoding_of_both_says_the_same(
    copier: Path, faithful: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    shutil.copytree(faithful, broken)
    swap_heads(broken, "model.layers.1.self_attn.q_proj")
    tasks = mixed_items(tmp_path / "mixed.jsonl", copier)
    original = reference_model(copier)
    outcomes = set()
    for artifact in (faithful, broken):
        model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
        with opened(asking(copier, tmp_path / f"{artifact.name}-out", validation__tasks=tasks)) as job:
            done = run_alone(job, original_answers(JUDGED))
            list(walk(job, [artifact_answers("accullm", artifact, JUDGED)], finished([done])))
            prompter, questions = questions_of(job, JUDGED)
            agreement = load_agreement(job, JUDGED, "accullm")
            right = [answer.is_right for answer in load_answers(job, JUDGED, None)]
        for question, agrees, is_right in zip(questions, agreement, right, strict=True):
            # Where the original is wrong it writes one token more than the right answer has.
            limit = 40 if is_right else max(map(len, question.rows)) + 1
            with torch.no_grad():
                said, others = (greedy(m, question.prompt, prompter.ends, limit) for m in (original, model))
            assert agrees == (said == others)
            outcomes.add((is_right, agrees))
    assert outcomes == {(True, True), (True, False), (False, True), (False, False)}


def test_only_the_first_items_of_each_task_are_compared(
    copier: Path, faithful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "COMPARED", 12)
    tasks = f"{mixed_items(tmp_path / 'mixed.jsonl', copier)},{copier.with_name('copy.jsonl')}"
    config = asking(copier, tmp_path / "out", validation__tasks=tasks, validation__require="[agreement.mixed>=50%]")
    report = validate_artifact(faithful, config)
    figures = {figure.name: figure for figure in tasks_of(report).figures}
    assert figures["agreement"].estimate is not None
    assert figures["agreement"].note.startswith("24 of 24 are the original's; of its ")
    assert report.contract_met
    (agreement,) = (samples for samples in tasks_of(report).samples if samples.figure == "agreement")
    assert agreement.values == (1.0,) * 24


def test_what_the_original_wrote_is_not_written_again(
    copier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asking(copier, tmp_path / "out", validation__tasks=mixed_items(tmp_path / "mixed.jsonl", copier))
    wrote: list[tuple[int, ...]] = []
    written = module._written

    def counted(decoder, question, *arguments):  # type: ignore[no-untyped-def]
        wrote.append(question.prompt)
        return written(decoder, question, *arguments)

    monkeypatch.setattr(module, "_written", counted)

    def stop(event: Event) -> None:
        if len(wrote) == 5 and event.kind == "step":
            raise Stop

    with pytest.raises(Stop), opened(config, stop) as job:
        run_alone(job, original_answers(JUDGED))
    with opened(config) as job:
        run_alone(job, original_answers(JUDGED))
        wrong = sum(not answer.is_right for answer in load_answers(job, JUDGED, None))
    assert len(wrote) == len(set(wrote)) == wrong == 12
    assert [path.name for path in (tmp_path / "out.run/tasks").iterdir()] == ["original.json"]


def test_without_room_to_write_no_agreement_is_told(
    copier: Path, faithful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compute, "free_memory", lambda compute: 1000)
    tasks = mixed_items(tmp_path / "mixed.jsonl", copier)
    config = asking(copier, tmp_path / "out", validation__tasks=tasks, validation__require="[agreement>=1%]")
    report = validate_artifact(faithful, config)
    (figure,) = (figure for figure in tasks_of(report).figures if figure.name == "agreement")
    assert (figure.estimate, figure.note) == (None, "the original could not write its wrong answers")
    assert not report.contract_met
    assert any(sentence.startswith("12 wrong answers were not written out") for sentence in report.records)
