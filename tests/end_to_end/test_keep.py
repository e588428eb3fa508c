"""--keep from the configuration to the model that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import accullm_cli.hf  # noqa: F401  teaches transformers the format
from accullm_cli.commands.verify import verify
from accullm_cli.config import Config
from accullm_cli.pipeline import convert, dry_run
from tests.pipeline.observe import refusal
from tests.streaming import fast_config, random_ids, short_config
from tests.tiny import make_checkpoint

FEEDBACK = {"rounding__method": "feedback"}


def stored_weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def mean_kl(artifact: Path, source: Path) -> float:
    """Of what transformers loads from the artifact, to what it loads from the source."""
    log_likely = []
    for directory in (source, artifact):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
        with torch.no_grad():
            log_likely.append(model.eval()(random_ids(2, 48)).logits.log_softmax(-1))
    original, rounded = log_likely
    return float((original.exp() * (original - rounded)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "patterns", "settings"),
    [
        ("llama", ["model.layers.0.*", "*.down_proj"], {"validation__require": "[fallbacks<=0]"}),
        (
            "llama",
            ["*.o_proj"],
            {"plan__bits": "7.5", "calibration__gradient_samples": 2, "rounding__method": "feedback"},
        ),
        ("gpt2", ["*.c_fc"], {"rounding__method": "feedback"}),
        ("mixtral", ["*.experts.*.2"], {"rounding__method": "feedback"}),
        ("mixtral", ["*.experts.*"], {}),
        (
            "llama",
            ["*.self_attn.[qkv]_proj"],
            {"export__format": "[compressed-tensors]", "plan__outliers": 0},
        ),
    ],
)
def test_kept_linears_are_those_of_the_source_bit_for_bit(
    name: str, patterns: list[str], settings: dict[str, object], tmp_path: Path
) -> None:
    source, out = make_checkpoint(name, tmp_path / "model"), tmp_path / "out"
    config = fast_config(source, out, plan__keep=f"{patterns}", calibration__samples=2, **settings)
    planned = dry_run(config)
    report = convert(config)
    kept = [linear for linear in report.linears if any(fnmatchcase(linear.name, pattern) for pattern in patterns)]
    assert kept
    assert report.contract_met  # what was asked for is no fallback
    assert {linear.name for linear in report.linears if linear.bits == 16} == {linear.name for linear in kept}
    assert all(linear.bits_per_weight == 16 for linear in kept)
    weights = [linear.out_features * linear.in_features for linear in report.linears]
    bits = sum(count * linear.bits_per_weight for count, linear in zip(weights, report.linears, strict=True))
    assert report.bits_per_weight == pytest.approx(bits / sum(weights), rel=1e-12)
    assert (report.bits_per_weight <= planned.bits_per_weight) if "plan__bits" in settings else planned.size_is_exact
    if planned.size_is_exact:
        assert report.bits_per_weight == pytest.approx(planned.bits_per_weight, rel=1e-12)
    assert [record.partition(":")[0] for record in report.records if "--keep" in record] == [
        f"{sum(fnmatchcase(linear.name, pattern) for linear in kept)} linears stay in 16 bits (--keep {pattern!r})"
        for pattern in patterns
    ]
    assert verify(out).problems == ()
    before, after = stored_weights(source), stored_weights(out)
    for linear in kept:
        stack, _, expert = linear.name.rpartition(".")
        stored = after[stack][int(expert)] if stack in after else after[f"{linear.name}.weight"]
        wanted = before[f"{linear.name}.weight"] if name != "mixtral" else unstacked(before, linear.name)
        assert torch.equal(stored, wanted)
    assert 0 < mean_kl(out, source) < 0.5


def unstacked(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """An expert's weight as Mixtral's checkpoints have it: w1 and w3 are gate and up, w2 is down."""
    block, _, rest = name.partition(".mlp.experts.")
    kind, _, expert = rest.rpartition(".")
    parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[kind]
    return torch.cat([tensors[f"{block}.block_sparse_moe.experts.{expert}.{part}.weight"] for part in parts])


@pytest.mark.parametrize(("kept", "quantized"), [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")])
def test_embedding_and_head_are_kept_one_by_one(kept: str, quantized: str, tmp_path: Path) -> None:
    source, out = make_checkpoint("llama", tmp_path / "model"), tmp_path / "out"
    config = short_config(source, out, plan__keep=f"[{kept}]", plan__embedding_bits=8, calibration__samples=1)
    report = convert(config)
    assert report.records == (f"1 linear stays in 16 bits (--keep '{kept}'): {kept}",)
    before, after = stored_weights(source), stored_weights(out)
    assert torch.equal(after[f"{kept}.weight"], before[f"{kept}.weight"])
    assert f"{quantized}.qweight" in after
    assert 0 < mean_kl(out, source) < 0.5


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_either_name_of_a_tied_matrix_keeps_it(name: str, tmp_path: Path) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    convert(fast_config(source, tmp_path / "out", plan__keep=f"[{name}]", plan__embedding_bits=8))
    assert "model.embed_tokens.weight" in stored_weights(tmp_path / "out")


def test_a_golden_search_keeps_what_was_asked_for(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    settings = {"search__golden": True, "search__max_plans": 1, "search__max_bits_per_weight": 8}
    settings |= {"validation__require": "[mean_kl<=1]", "validation__windows": 4, "calibration__samples": 2}
    report = convert(fast_config(source, tmp_path / "out", plan__keep="['*.o_proj']", **settings))
    assert [linear.name for linear in report.linears if linear.bits == 16] == [
        f"model.layers.{block}.self_attn.o_proj" for block in (0, 1)
    ]
    assert len(report.search) == 1


@pytest.mark.parametrize(
    ("patterns", "settings", "line"),
    [
        ("['*.downproj']", {}, "--keep: no linear is called '*.downproj'; did you mean '*.down_proj'?"),
        ("['*']", {}, "--keep: keeps every linear, so that nothing is left to round; keep fewer"),
        (
            "['*.down_proj']",
            {"plan__bits": "4.4"},
            "--bits: an average of 4.4 bits cannot be had in accullm: the smallest plan takes 6.000, scales included; "
            "give more, or larger groups, or keep fewer",
        ),
        (
            "['*.q_proj']",
            {"export__format": "[compressed-tensors]", "plan__outliers": 0},
            "--format compressed-tensors: vLLM, which reads compressed-tensors, multiplies by q_proj, k_proj, v_proj "
            "at once, and of these model.layers.0.self_attn.q_proj stays in 16 bits and another does not; keep all of "
            "them (--keep '*.q_proj' --keep '*.k_proj' --keep '*.v_proj') or none, or export to the format accullm",
        ),
        ("['*.q_proj', '*.q_proj']", {}, "--set plan.keep: *.q_proj is given twice; give it once"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_any_work(
    patterns: str, settings: dict[str, object], line: str, tmp_path: Path
) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    for call in (dry_run, convert):

        def refused(call: Callable[[Config], object] = call) -> object:
            return call(fast_config(source, tmp_path / "out", plan__keep=patterns, **settings))

        assert refusal(refused) == line
    assert not (tmp_path / "out.run").exists()
