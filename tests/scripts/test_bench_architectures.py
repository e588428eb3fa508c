"""The sweep over architectures: its verdicts, its page, and one tiny model that goes through all of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.scripts.loading import SCRIPTS, load_script
from tests.tiny import tiny_llama

MODULES = ("bench_streaming", "tiny_configurations", "tiny_architectures", "architectures_page", "bench_architectures")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/bench_architectures.py, which imports its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield load_script("bench_architectures")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(script: ModuleType) -> ModuleType:
    return sys.modules["tiny_architectures"]


@pytest.fixture
def page_script(script: ModuleType) -> ModuleType:
    return sys.modules["architectures_page"]


def checked(script: ModuleType, **changes: Any) -> Any:
    """A model that came out right, but for `changes`."""
    records = ("kept as stored: model.layers.*.mlp.gate (router; 1,024 weights)",)
    right = script.Checked(0.1, 0.1001, 0.2, 1e-6, 1.0, records, ())
    return dataclasses.replace(right, **changes)


# -- what is asked for -----------------------------------------------------------------------------------------


def test_a_dozen_is_tried_unless_others_are_asked_for(script: ModuleType, tiny: ModuleType) -> None:
    assert script.parse([]).names == list(script.DOZEN)
    assert len(script.DOZEN) == 12
    assert script.parse(["falcon:new", "qwen2_vl"]).names == ["falcon:new", "qwen2_vl"]
    every = script.parse(["--all"]).names
    assert every == tiny.architectures()
    assert {"llama", "gemma3", "qwen3_vl", "gemma4_text:moe", "bart"} <= set(every)
    assert "gemma3n" not in every


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lama", "no tiny model of lama: see tiny_architectures.py"),
        ("musicgen", "no tiny model of musicgen: makes sound from text; no language model"),
    ],
)
def test_a_type_without_a_tiny_model_is_refused(
    script: ModuleType, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.parse([name])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_last_result_of_a_type_counts_and_none_of_another_transformers(script: ModuleType, tmp_path: Path) -> None:
    results = [
        script.Result("opt", "failed", "KeyError", 2.0),
        script.Result("gpt2", "right", transformers="4.0"),
        script.Result("opt", "right", kl=0.1, records=("a record",)),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in results))
    assert script.read_results(path) == results[2:]
    assert script.read_results(tmp_path / "none") == []


def test_a_run_is_resumed_where_it_ended(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run_all(names: list[str], work: Path, jobs: int) -> Iterator[Any]:
        asked.append(names)
        yield from (script.Result(name, "failed" if name == "opt" else "right") for name in names)

    monkeypatch.setattr(script, "run_all", run_all)
    monkeypatch.setattr(script, "quieten", lambda: None)
    flags = ["--results", str(tmp_path / "bench" / "results.jsonl"), "--markdown", str(tmp_path / "page.md")]
    assert script.main(["gpt2", "llama", *flags]) == 0
    assert script.main(["gpt2", "opt", "--resume", *flags]) == 3
    assert asked == [["gpt2", "llama"], ["opt"]]
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (\w+) \|", (tmp_path / "page.md").read_text(), re.MULTILINE)
    assert rows == [("gpt2", "right"), ("llama", "right"), ("opt", "failed")]
    assert capsys.readouterr().out.split() == ["gpt2", "right", "llama", "right", "opt", "failed"]


# -- the tiny models -------------------------------------------------------------------------------------------


def test_a_checkpoint_follows_from_its_name_and_nothing_that_counts_is_zero(tiny: ModuleType, tmp_path: Path) -> None:
    for place in ("a", "b"):
        tiny.make_architecture("deepseek_v3", tmp_path / place)
    first, second = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("a", "b"))
    assert first == second
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.shape == (4,)
    assert bias.all()
    assert tensors["model.layers.0.self_attn.q_b_proj.weight"].dtype == torch.bfloat16
    deviation = float(tensors["model.layers.0.mlp.down_proj.weight"].float().std())
    assert deviation == pytest.approx(1.5 / 96**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("falcon:new", "FalconForCausalLM"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("mllama_text_model", "MllamaForCausalLM"),
    ],
)
def test_a_model_is_of_the_class_that_transformers_picks(tiny: ModuleType, name: str, architecture: str) -> None:
    model = tiny._model(name)
    assert type(model).__name__ == architecture
    text = model.config.get_text_config()
    assert (text.hidden_size, text.vocab_size) == (64, 288)
    assert next(model.parameters()).dtype == torch.float32


# -- processes -------------------------------------------------------------------------------------------------


def test_a_step_that_fails_says_why(script: ModuleType) -> None:
    def fail() -> None:
        raise KeyError("I64")

    assert script.in_child(lambda: ("a", 1)) == ("a", 1)
    failure = script.in_child(fail)
    assert re.fullmatch(r"KeyError: 'I64' \(test_bench_architectures\.py:\d+\)", failure.text)
    assert script.in_child(lambda: os.kill(os.getpid(), 9)) == script.Failure("the process ended with SIGKILL")


def test_a_step_that_takes_too_long_is_ended(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SECONDS", 0.2)
    assert script.in_child(script.time.sleep, 60) == script.Failure("took longer than 0.2 s")


def test_the_place_of_a_fault_is_the_last_line_of_the_package(script: ModuleType) -> None:
    traceback = (
        'File "/x/accullm_cli/pipeline.py", line 12, in f',
        'File "/x/accullm_cli/model/blocks.py", line 345, in g',
        'File "/x/transformers/models/zaya.py", line 9, in h',
    )
    assert script._last_place(traceback) == "model/blocks.py:345"
    assert script._last_place(["killed"]) == ""


# -- the verdict -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"true_kl": 0.11}, "the report's mean KL is 0.1, in truth it is 0.11"),
        ({"true_kl": math.nan}, "the artifact computes no numbers (NaN)"),
        ({"difference": 0.02}, "the reference's log-likelihoods are off by 0.02 nats"),
        ({"difference": math.nan}, "the reference's log-likelihoods are off by nan nats"),
        ({"unnamed": ("a.*.w1", "b")}, "left in 16 bits without a word: a.*.w1, b"),
        (
            {"true_kl": math.nan, "error": "AttributeError: weight (modeling.py:3)"},
            "transformers cannot use the artifact: AttributeError: weight (modeling.py:3)",
        ),
    ],
)
def test_what_is_not_as_said_is_wrong(script: ModuleType, changes: dict[str, Any], message: str) -> None:
    result = script.judge("opt", checked(script, **changes))
    assert (result.verdict, result.message) == ("wrong", message)


def test_what_is_as_said_is_right(script: ModuleType) -> None:
    result = script.judge("opt", checked(script))
    assert (result.verdict, result.message, result.kl, result.nearest_kl, result.share) == ("right", "", 0.1, 0.2, 1.0)


def test_divergence_is_the_mean_over_all_positions(script: ModuleType) -> None:
    expected = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    actual = torch.tensor([[[0.75, 0.25], [0.9, 0.1]]]).log()
    assert script.mean_kl(expected, actual) == pytest.approx(0.5 * math.log(4 / 3) / 2, rel=1e-6)


def test_a_matrix_that_nobody_names_is_found(script: ModuleType) -> None:
    model = tiny_llama()
    names = [name.removesuffix(".weight") for name, _, _ in script.matrices(model) if ".layers." in name]
    assert script.unnamed(model, set(names), []) == ()
    assert script.quantized_share(model, set(names)) == 1.0
    left = [name for name in names if not name.endswith("k_proj")]
    assert script.unnamed(model, set(left), []) == ("model.layers.*.self_attn.k_proj",)
    record = "kept as stored: model.layers.*.self_attn.k_proj (router; 4,096 weights)"
    assert script.unnamed(model, set(left), [record]) == ()
    assert script.unnamed(model, set(left), [record.replace("k_proj", "k")]) == ("model.layers.*.self_attn.k_proj",)
    # 64 x (64 + 32 + 32 + 64) + 3 x 64 x 96 weights in a block, of which the keys' have 64 x 32.
    assert script.quantized_share(model, set(left)) == pytest.approx(1 - 2048 / 30720)


def test_experts_are_quantized_one_by_one(script: ModuleType) -> None:
    assert script.is_quantized("a.experts.down_proj", {"a.experts.down_proj.0", "a.experts.down_proj.1"})
    assert script.is_quantized("a.q_proj.weight", {"a.q_proj"})
    assert not script.is_quantized("a.q_proj.weight", {"a.q_proj_2"})


# -- the page --------------------------------------------------------------------------------------------------


def test_the_page_counts_types_and_says_what_stays_in_16_bits(script: ModuleType) -> None:
    results = [
        script.Result("llama", "right", seconds=3.0, kl=0.12345, nearest_kl=0.2, share=1.0),
        script.Result("falcon:new", "right", kl=0.1, nearest_kl=0.2, share=0.0),
        script.Result("dory", "refused", "dory: block a runs 2 times | looped", 0.4),
        script.Result("bart", "refused", "its blocks need more than text", 0.2),
        script.Result(
            "llava",
            "wrong",
            "the report is wrong",
            kl=0.1,
            nearest_kl=0.3,
            share=1.0,
            records=(
                "kept as stored: model.vision_tower (not used for text; 9,000 weights)",
                "kept as stored: model.language_model.layers.*.mlp.gate (router; 64 weights)",
                "kept as stored: model.language_model.layers.*.mlp.other_gate (router; 64 weights)",
                "experts that calibration never reached",
            ),
        ),
    ]
    text = script.page(results)
    assert f"Measured with transformers {transformers.__version__} and torch {torch.__version__}." in text
    lines = text.splitlines()
    assert [line for line in lines if line.startswith(("| 2", "| 1", "| 6"))] == [
        "| 2 types of decoders for text | 1 | 1 | 0 | 0 | 0 |",
        "| 6 models with images or sound | 0 | 0 | 1 | 0 | 5 |",
        "| 1 decoders of encoder-decoders | 0 | 1 | 0 | 0 | 0 |",
    ]
    assert "The slowest took 0.4 s of processor time." in text
    rows = [line for line in lines if line.startswith("| `")]
    assert rows[:4] == [
        r"| `dory` |  | refused |  | dory: block a runs 2 times \| looped |",
        "| `falcon:new` | Falcon 40B | right | 0.1 (0.2) | 0.0% of the linear weights quantized |",
        "| `llama` | Llama 2, 3; SmolLM2; Yi | right | 0.123 (0.2) |  |",
        "| `gemma3n` |  | not built |  | its vision tower needs the package timm (its language part: gemma3n_text) |",
    ]
    assert (
        "| `llava` | LLaVA 1.5 | wrong | 0.1 (0.3) | the report is wrong; not used for text: vision_tower; "
        "router: mlp.gate, mlp.other_gate |"
    ) in rows


def test_examples_are_of_types_that_are_there(script: ModuleType, page_script: ModuleType, tiny: ModuleType) -> None:
    assert set(page_script.EXAMPLES) <= set(tiny.architectures())


# -- all of it -------------------------------------------------------------------------------------------------


def test_a_tiny_model_goes_through_all_of_it(script: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(SCRIPTS / "bench_architectures.py"), "lfm2", "bart"]
    command += ["--work", str(tmp_path / "work"), "--results", str(results)]
    # A process of its own: this one has run threads, and forks of it may hang.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bart, lfm2 = script.read_results(results)
    assert bart.verdict == "refused"
    assert bart.message.startswith("BartForCausalLM: its blocks need more than text: ")
    assert (lfm2.verdict, lfm2.message, lfm2.share) == ("right", "", 1.0)
    assert 0 < lfm2.kl < 0.7 * lfm2.nearest_kl
    assert lfm2.records == ("kept as stored: model.layers.*.conv.conv (convolution; 384 weights)",)
    assert not list((tmp_path / "work").iterdir())
