"""A source that plain transformers reads otherwise than the blocks of a conversion is refused before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.source import open_source
from accullm_cli.pipeline import convert, run_stage, validate_artifact
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.run import RunDirectory
from accullm_cli.stages import reading
from accullm_cli.stages.job import open_decoder
from accullm_cli.stages.reading import READING
from tests.formats.test_gguf import build, written
from tests.kinds import Kind
from tests.model.test_gguf import Q8_0, write
from tests.streaming import fast_config, opened, run_alone
from tests.tiny import VOCABULARY, make_checkpoint

HINT = "this model cannot be converted truly, so it is not"


def checked(config: Config, progress: Progress = silent) -> list[str]:
    """The records of a reading, which depends on little and leaves no files."""
    with opened(config, progress) as job:
        record = run_alone(job, READING).record
    assert record.inputs.keys() == {"source:sha256", "version:reading", "version:torch", "version:transformers"}
    assert record.outputs == {}
    return record.records


def refusal(config: Config, call: Callable[[Config], object] = checked) -> str:
    with pytest.raises(AccullmError) as caught:
        call(config)
    assert caught.value.exit_code == 2
    return caught.value.line()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "mixtral"])
def test_the_two_readings_of_a_plain_source_agree(name: str, tmp_path: Path) -> None:
    config = fast_config(make_checkpoint(name, tmp_path / "model"), tmp_path / "out")
    assert checked(config) == []


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_a_model_that_is_too_large_is_read_from_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts, which transformers has to convert, are written to disk meanwhile."""
    config = fast_config(make_checkpoint(name, tmp_path / "model"), tmp_path / "out")
    monkeypatch.setattr(reading, "available_memory", lambda: 1000)
    placed = []
    plain_model = reading.plain_model
    monkeypatch.setattr(reading, "plain_model", lambda *given: placed.append(given[1]) or plain_model(*given))
    assert checked(config) == []
    assert placed == [tmp_path / "out.run"]
    assert not list((tmp_path / "out.run").glob(".plain-*"))


def test_where_not_even_the_disk_is_large_enough_a_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fast_config(make_checkpoint("mixtral", tmp_path / "model"), tmp_path / "out")
    monkeypatch.setattr(reading, "available_memory", lambda: 1000)
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 500_000}))
    assert checked(config) == [
        "the reading was not held against plain transformers: it takes 590 kB on disk, where 500 kB are free"
    ]


def test_a_model_that_plain_transformers_cannot_run_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fast_config(make_checkpoint("llama", tmp_path / "model"), tmp_path / "out")

    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("You must specify\n pixel_values")

    with opened(config) as job:
        decoder = open_decoder(job)  # by a forward pass of the same class
        monkeypatch.setattr(reading, "open_decoder", lambda job: decoder)
        monkeypatch.setattr("transformers.LlamaForCausalLM.forward", fail)
        assert run_alone(job, READING).record.records == [
            "the reading was not held against plain transformers, which cannot run it "
            "(ValueError: You must specify pixel_values)"
        ]


def test_it_is_done_once_for_each_source(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    config = fast_config(source, tmp_path / "out")

    def reasons() -> list[tuple[str, str]]:
        events: list[Event] = []
        checked(config, events.append)
        return [(event.kind, str(event.reason)) for event in events if event.stage == "reading" and event.reason]

    assert [reasons(), reasons()] == [[("start", "new")], [("skip", "up to date")]]
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, source / "model.safetensors")
    assert reasons() == [("start", "source changed (sha256)")]


def test_blocks_that_compute_something_else_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By calibrate, too, which is what users run where they run one stage after another."""
    source = make_checkpoint("llama", tmp_path / "model")
    config = fast_config(source, tmp_path / "out")
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, *given: 1.01 * run(self, *given))
    for call in (checked, convert, partial(run_stage, "calibrate")):
        assert re.fullmatch(
            rf"{source}: plain transformers \(LlamaForCausalLM\) reads another model than accullm runs: "
            rf"log-probabilities differ by up to [\d.e-]+ nats for token \d+ at position \d+; {HINT}",
            refusal(config, call),
        )
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.run").glob("**/*.safetensors"))


def test_a_model_that_mixes_the_texts_of_a_batch_is_refused(tmp_path: Path) -> None:
    """No way to measure it would be right: what it says of a text depends on how many are run together."""
    kind = Kind(
        "DogeForCausalLM",
        "doge",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "is_moe": True,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 258,
        },
    )
    source = kind.save(tmp_path / "model")
    assert re.fullmatch(
        rf"{source}: what DogeForCausalLM makes of a text depends on the other texts in its batch: log-probabilities "
        r"differ by up to [\d.e-]+ nats for token \d+ at position \d+; no figure could be measured of this model",
        refusal(fast_config(source, tmp_path / "out"), checked),
    )


def test_a_validation_on_its_own_checks_the_reading_too(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    convert(fast_config(source, tmp_path / "out"))
    validate_artifact(tmp_path / "out", fast_config(source, tmp_path / "out", machine__run=tmp_path / "other"))
    assert list(RunDirectory(tmp_path / "other").stages()) == ["reading", "reference", "validate accullm"]


def test_a_gguf_file_is_held_against_what_transformers_dequantizes(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", Q8_0, scale=0.3)
    config = fast_config(path, tmp_path / "out")
    assert checked(config) == []
    # As if the import had not undone llama.cpp's order of the rows of q.
    imported = open_source(str(path), tmp_path / "out.run").directory
    tensors = load_file(imported / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, imported / "model.safetensors")
    assert "reads another model" in refusal(config)


def test_of_a_gguf_file_that_transformers_does_not_read_the_blocks_alone_are_held_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(build("arcee"), tmp_path).joinpath("Tiny-Model.gguf").rename(tmp_path / "tiny.gguf")
    config = fast_config(path, tmp_path / "out")
    assert checked(config) == [
        "the import of the GGUF file was not held against plain transformers, which cannot read it"
    ]
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, *given: 1.01 * run(self, *given))
    monkeypatch.setattr(reading, "VERSION", 0)  # as if it had not been done
    assert "plain transformers (ArceeForCausalLM) reads another model" in refusal(config)
