"""The benchmark of other quantizers: who is left out, what is run once, and how weights are measured."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.errors import AccullmError
from accullm_cli.measure.result import Estimate
from accullm_cli.places import run_path
from tests.scripts.loading import SCRIPTS, load_script
from tests.streaming import opened, reference_model, run_to, short_config
from tests.tiny import make_checkpoint

# Stands in for run_peer.py: quantizes nothing, notes that it ran, and fails where it is told to.
FAKE_RUNNER = """
import json, pathlib, shutil, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
place = pathlib.Path(__file__).parent
(place / "ran.txt").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if (place / "broken").exists():
    sys.exit("out of luck")
shutil.copy(place / "weights.safetensors", out / "weights.safetensors")
(out / "peer.json").write_text(json.dumps({
    "bits_per_weight": 4.5, "seconds": 61.0, "peak_bytes": 10**9, "versions": {"fake": "1.2"}, "settings": {"bits": 4},
}))
"""

script = load_script("bench_peers")


def calibrated(kind: str, directory: Path) -> Path:
    """A directory with a tiny model, and beside it the run that calibrated on it."""
    config = short_config(make_checkpoint(kind, directory / "model"), directory / "out")
    with opened(config) as job:
        run_to(job, "calibrate")
    run_path(config).rename(directory / "run")
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny llama."""
    return calibrated("llama", tmp_path_factory.mktemp("peers"))


@pytest.fixture
def reference(place: Path) -> object:
    return script.Reference.open(place / "model", place / "run")


def linear_weights(model: Path) -> dict[str, torch.Tensor]:
    """Of the blocks, by the linear's name."""
    return {
        name.removesuffix(".weight"): parameter.data
        for name, parameter in reference_model(model).named_parameters()
        if ".layers." in name and parameter.dim() == 2
    }


def damaged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: weight + 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }


# -- measuring -----------------------------------------------------------------------------------------------


def test_the_originals_own_weights_lose_nothing(place: Path, reference: object, tmp_path: Path) -> None:
    save_file(linear_weights(place / "model"), tmp_path / "weights.safetensors")
    fidelity = script.compare(reference, tmp_path / "weights.safetensors")
    assert fidelity.mean_kl.value < 1e-9
    assert fidelity.top1_agreement.value == 1.0
    assert fidelity.perplexity.value == pytest.approx(fidelity.perplexity_original.value, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gemma3"])
def test_the_divergence_is_that_of_transformers_models_in_float64(
    kind: str, place: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """With biases, and with norms within heads, four norms a block, sliding windows and soft caps."""
    if kind != "llama":
        place = calibrated(kind, tmp_path_factory.mktemp(kind))
    reference = script.Reference.open(place / "model", place / "run")
    weights = damaged(linear_weights(place / "model"))
    save_file(weights, tmp_path / "weights.safetensors")
    fidelity = script.compare(reference, tmp_path / "weights.safetensors")

    original, peer = reference_model(place / "model").double(), reference_model(place / "model").double()
    for name, weight in weights.items():
        peer.get_submodule(name).weight.data = weight.double()
    ids = load_file(place / "run" / "reference.safetensors")["ids"]
    p, q = original(ids).logits.log_softmax(-1), peer(ids).logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    nll = -q[:, :-1].gather(2, ids[:, 1:, None]).mean()
    assert fidelity.mean_kl.value == pytest.approx(kl.mean().item(), rel=1e-4)
    assert fidelity.kl_p99.value == pytest.approx(
        torch.quantile(kl.flatten(), 0.99, interpolation="higher").item(), rel=1e-3
    )
    assert fidelity.perplexity.value == pytest.approx(nll.exp().item(), rel=1e-5)
    assert fidelity.top1_agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert (fidelity.windows, fidelity.tokens) == (3, ids.numel())


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_linear_that_was_not_quantized_is_named(place: Path, reference: object, tmp_path: Path, fault: str) -> None:
    weights = linear_weights(place / "model")
    weight = weights.pop("model.layers.1.mlp.up_proj")
    if fault == "shape":
        weights["model.layers.1.mlp.up_proj"] = weight.T.contiguous()
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(AccullmError) as caught:
        script.compare(reference, tmp_path / "weights.safetensors")
    assert caught.value.line() == "model.layers.1.mlp.up_proj: was not quantized, or has another shape"


def test_a_run_without_calibration_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AccullmError) as caught:
        script.Reference.open(place / "model", tmp_path / "run")
    run = tmp_path / "run"
    assert caught.value.line() == (
        f"{run}: calibrate has not run; run accullm calibrate {place / 'model'} --run {run}"
    )  # fmt: skip


# -- running -------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of the benchmark in tmp_path, with one tool, "fake", in place of those that exist."""
    (tmp_path / "run_peer.py").write_text(FAKE_RUNNER)
    save_file(damaged(linear_weights(place / "model")), tmp_path / "weights.safetensors")
    monkeypatch.setattr(script, "RUNNER", tmp_path / "run_peer.py")
    monkeypatch.setattr(
        script,
        "PEERS",
        (
            script.Peer("fake", "a fake", "fake", "json", group_size=32),
            script.Peer("fake-fast", "a fast fake", "fake", "json", ("--fast",), group_size=16),
            script.Peer("fake-64", "nothing for 96 features", "fake", "json"),
            script.Peer("fake-coarse", "nothing for 64 and 96 features", "fake", "json", group_size=script.COARSE),
            script.Peer("absent", "not installed", "fake", "no_such_package"),
            script.Peer("other", "not asked for", "other", "json"),
        ),
    )
    return [
        "--model", str(place / "model"), "--run", str(place / "run"), "--out", str(tmp_path / "peers"),
    ]  # fmt: skip


def ran(tmp_path: Path) -> list[str]:
    return (tmp_path / "ran.txt").read_text().splitlines()


def test_tools_that_are_installed_are_measured_and_others_left_out_in_one_line(
    bench: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*bench, "--peer", f"fake={sys.executable}"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "== a fake, groups of 32",
        "== a fast fake, groups of 16",
        "fake-64 is left out: groups of 64 do not divide the input features of every linear",
        "fake-coarse is left out: groups of more than 32 do not divide the input features of every linear",
        f"absent is left out: {sys.executable} has no package no_such_package",
        "other is left out: no --peer other=PYTHON was given",
    ]
    weights = tmp_path / "peers-weights"
    given = f"fake --model {place / 'model'} --tokens {place / 'run' / 'tokens.safetensors'} --group-size"
    assert ran(tmp_path) == [
        f"{given} 32 --out {weights / 'fake-32'}",
        f"{given} 16 --fast --out {weights / 'fake-fast-16'}",
    ]
    first, second = json.loads((tmp_path / "peers.json").read_text())["results"]
    assert (first["name"], second["name"]) == ("fake", "fake-fast")
    assert (first["label"], first["group_size"]) == ("a fake, groups of 32", 32)
    assert (first["bits_per_weight"], first["seconds"], first["peak_bytes"]) == (4.5, 61.0, 10**9)
    assert (first["versions"], first["settings"]) == ({"fake": "1.2"}, {"bits": 4})
    assert first["mean_kl"] == second["mean_kl"]
    assert 0 < first["mean_kl"]["low"] <= first["mean_kl"]["value"] <= first["mean_kl"]["high"]
    assert (tmp_path / "peers.md").read_text() == out


@pytest.mark.parametrize(
    ("features", "size"),
    [
        ((576, 1536), 192),  # SmolLM2-135M
        ((640, 1024, 2048), 128),  # Gemma 3 270M
        ((896, 4864), 128),  # Qwen2.5-Coder 0.5B
        ((4096, 14336), 128),
        ((4096, 11008), 128),
    ],
)
def test_the_coarse_row_takes_the_largest_groups_that_divide(features: tuple[int, ...], size: int) -> None:
    assert script.coarse_group_size(math.gcd(*features)) == size
    row = next(peer for peer in script.PEERS if peer.name == "auto-round-coarse")
    assert script.unfit(row, size, math.gcd(*features)) is None
    assert row.label_with(size) == f"AutoRound, asymmetric, 200 iterations (default), groups of {size}"


def test_nothing_is_measured_where_no_tool_is_given(
    bench: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*bench, "--rows", "fake"]) == 0
    assert capsys.readouterr() == ("", "fake is left out: no --peer fake=PYTHON was given\n")
    assert script.main([*bench, "--rows", "fake", "--peer", "fake=/no/such/python"]) == 0
    assert capsys.readouterr() == ("", "fake is left out: /no/such/python is no program\n")
    assert not (tmp_path / "peers.json").exists()


def test_a_tool_runs_again_only_where_its_inputs_changed(
    bench: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench += ["--rows", "fake", "--peer", f"fake={sys.executable}"]
    for _ in range(2):
        assert script.main(bench) == 0
        assert len(ran(tmp_path)) == 1
    monkeypatch.setattr(script, "file_sha256", lambda path: "other tokens")
    assert script.main(bench) == 0
    assert len(ran(tmp_path)) == 2
    # Other settings.
    fine = (dataclasses.replace(script.PEERS[0], flags=("--fine",)),)
    monkeypatch.setattr(script, "PEERS", fine)
    assert script.main(bench) == 0
    assert len(ran(tmp_path)) == 3


def test_results_are_taken_along_to_another_place(bench: list[str], place: Path, tmp_path: Path) -> None:
    """Hours of work are not lost to a directory's new name."""
    (tmp_path / "link").symlink_to(place)
    again = [argument.replace(str(place), str(tmp_path / "link")) for argument in bench]
    again[again.index("--out") + 1] = str(tmp_path / "moved")
    rest = ["--rows", "fake", "--peer", f"fake={sys.executable}"]
    assert script.main([*bench, *rest]) == 0
    (tmp_path / "peers-weights").rename(tmp_path / "moved-weights")
    assert script.main([*again, *rest]) == 0
    assert len(ran(tmp_path)) == 1


def test_mlx_lm_gets_the_original_with_the_keys_that_it_reads(
    bench: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 writes rope_parameters alone, and without rope_theta mlx_lm would quantize another model."""
    monkeypatch.setattr(script, "PEERS", (script.Peer("mlx-lm", "mlx", "fake", "mlx_lm", group_size=32),))
    monkeypatch.setattr(script, "missing", lambda peer, pythons: None)
    bench += ["--rows", "mlx-lm", "--peer", f"fake={sys.executable}"]
    for _ in range(2):  # the second time it is there
        assert script.main(bench) == 0
    original = tmp_path / "peers-weights" / "original"
    (line,) = ran(tmp_path)
    assert line.startswith(f"fake --model {original} ")
    config, own = (json.loads((folder / "config.json").read_text()) for folder in (original, place / "model"))
    assert config == own | {"rope_theta": own["rope_parameters"]["rope_theta"]}
    assert "rope_theta" not in own
    for file in (place / "model").iterdir():
        assert (original / file.name).exists()
    assert (original / "model.safetensors").read_bytes() == (place / "model" / "model.safetensors").read_bytes()


def test_a_tool_that_fails_ends_the_benchmark_with_one_line_and_runs_again(
    bench: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").touch()
    bench += ["--rows", "fake", "--peer", f"fake={sys.executable}"]
    log = tmp_path / "peers-weights" / "fake-32" / "log.txt"
    assert script.main(bench) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {sys.executable} {tmp_path / 'run_peer.py'} fake --model ")
    assert last.endswith(f": ended with exit code 1; read {log}")
    assert log.read_text() == "out of luck\n"
    kept = log.with_name("blocks")
    kept.mkdir()
    (tmp_path / "broken").unlink()
    assert script.main(bench) == 0
    assert kept.exists()  # what the tool goes on from


def test_nothing_is_kept_of_a_tool_that_was_told_something_else(bench: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    bench += ["--rows", "fake", "--peer", f"fake={sys.executable}"]
    kept = tmp_path / "peers-weights" / "fake-32" / "blocks"
    assert script.main(bench) == 2
    kept.mkdir()
    kept.with_name("begun-by.txt").write_text("another key")
    assert script.main(bench) == 2
    assert not kept.exists()


def test_a_peer_without_a_tools_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("hqq", "hqp=python"):
        with pytest.raises(SystemExit):
            script.parse(["--peer", value])
        assert f"argument --peer: '{value}' is not TOOL=PYTHON" in capsys.readouterr().err


def test_every_row_is_of_a_tool_that_run_peer_has() -> None:
    runner = (SCRIPTS / "run_peer.py").read_text()
    for peer in script.PEERS:
        assert f'"{peer.tool}": Runner(' in runner
        for flag in peer.flags[::2]:
            assert f'"{flag}"' in runner


def test_the_table_has_intervals_costs_versions_and_commands() -> None:
    def near(value: float) -> Estimate:
        return Estimate(value, value * 0.9, value * 1.1)

    result = script.PeerResult(
        name="hqq",
        label="HQQ",
        group_size=64,
        bits_per_weight=4.5,
        perplexity_original=near(10.0),
        perplexity=near(11.0),
        mean_kl=near(0.05),
        mean_kl_floor=near(0.0004),
        kl_p99=near(0.5),
        top1_agreement=near(0.875),
        windows=3,
        tokens=3000,
        seconds=61.0,
        peak_bytes=1_000_000_000,
        versions={"hqq": "0.2.8", "torch": "2.13.0"},
        settings={},
        command=("python", "run peer.py", "hqq"),
    )
    assert script.render([result]).splitlines() == [
        "Measured on 3,000 tokens in 3 windows of held-out text, 95% confidence intervals in brackets.",
        "The original's perplexity is 10.00 [9.00, 11.00].",
        "",
        "| method | bits/weight | perplexity | mean KL (nats) | p99 KL | top-1 agreement | time | peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| HQQ | 4.500 | 11.00 [9.90, 12.10] | 0.0500 [0.0450, 0.0550] | 0.500 [0.450, 0.550] "
        "| 87.50% [78.75%, 96.25%] | 1 min 01 s | 1 GB |",
        "",
        "The commands:",
        "",
        "    python 'run peer.py' hqq  # hqq 0.2.8, torch 2.13.0",
    ]
