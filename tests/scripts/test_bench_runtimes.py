"""The benchmark of clients: the stock transformers, measured; who is left out; what the table says."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from accullm_cli.errors import AccullmError
from accullm_cli.measure.result import Estimate
from accullm_cli.pipeline import convert
from tests.scripts.loading import SCRIPTS, load_script
from tests.streaming import fast_config, reference_model
from tests.tiny import make_checkpoint

script = load_script("bench_runtimes")
client_script = load_script("run_client")


def test_the_divergence_is_that_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 5, 96, generator=generator) * 4 for _ in range(2))
    windows = np.array([[0] * 5, [1] * 5])
    kl, agrees = client_script.divergence(
        lambda ids: first[ids[0]].numpy(), lambda ids: second[ids[0]].numpy(), windows
    )
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    np.testing.assert_allclose(kl, (p.exp() * (p - q)).sum(-1).numpy(), rtol=1e-9)
    assert np.array_equal(agrees, (first.argmax(-1) == second.argmax(-1)).numpy())


# -- a stock client ------------------------------------------------------------------------------------------

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an artifact of it, and windows."""
    directory = tmp_path_factory.mktemp("runtimes")
    source = make_checkpoint("llama", directory / "model")
    convert(fast_config(source, directory / "artifact", export__format="[compressed-tensors]", plan__outliers=0))
    ids = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))
    np.savez(directory / "windows.npz", ids=ids.numpy())
    return directory


def measured(place: Path) -> object:
    client = next(client for client in script.CLIENTS if client.name == "transformers")
    return script.in_client(
        client, sys.executable, place / "model", place / "artifact", place / "windows.npz", None, "rival", ()
    )


def test_an_artifact_is_measured_by_the_client_itself(place: Path) -> None:
    row = measured(place)
    original = reference_model(place / "model")
    artifact = reference_model(place / "model")
    opened = script.open_artifact(place / "artifact")
    for name in opened.plan.linears:
        artifact.get_submodule(name).weight.data = opened.weight(name)
    ids = torch.from_numpy(np.load(place / "windows.npz")["ids"])
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (original, artifact))
    assert row.mean_kl.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert row.top1_agreement.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert row.agrees
    assert 0 <= row.difference < 1e-3
    assert row.tokens_per_second > 0
    assert row.bits_per_weight == opened.bits_per_weight
    assert row.embedding_bits == 16
    assert set(row.versions) == {"transformers", "torch"}


def test_a_client_that_reads_another_model_shows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = script.open_artifact_decoder
    wrong = make_checkpoint("llama-tied", place / "other")
    convert(fast_config(wrong, place / "other-artifact", export__format="[compressed-tensors]", plan__outliers=0))
    monkeypatch.setattr(script, "open_artifact_decoder", lambda path: other(place / "other-artifact"))
    row = measured(place)
    assert not row.agrees
    assert script._cells(row)[-1].endswith(", more than float32 sums differ")


def test_a_client_that_fails_is_one_line(place: Path) -> None:
    client = next(client for client in script.CLIENTS if client.name == "mlx_lm")
    client = dataclasses.replace(client, name="transformers")
    with pytest.raises(AccullmError, match=r"ended with exit code 1; read .*transformers-nothing\.log"):
        script.in_client(
            client, sys.executable, place / "model", place / "nothing", place / "windows.npz", None, "", ()
        )


# -- the benchmark -------------------------------------------------------------------------------------------


def test_clients_that_are_not_installed_are_left_out_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--model", "no-model", "--client", f"mlx_lm={sys.executable}x"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"mlx_lm is left out: {sys.executable}x is no program",
        "transformers is left out: no --client transformers=PYTHON was given",
    ]


def test_a_client_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(["--client", "mlx=python"])
    assert "argument --client: 'mlx=python' is not CLIENT=PYTHON" in capsys.readouterr().err


def test_every_client_and_every_row_of_it_exists() -> None:
    assert {client.name for client in script.CLIENTS} == set(client_script.CLIENTS)
    rows = {peer.name for peer in script.PEERS}
    for client in script.CLIENTS:
        assert set(client.with_own) <= set(client.peers) <= rows
    assert (SCRIPTS / "run_client.py").exists()


def row(name: str, kl: float, rival: str = "") -> object:
    return script.Row(
        client="mlx_lm",
        name=name,
        label=f"the {name}",
        rival=rival,
        bits_per_weight=4.5,
        embedding_bits=4.5,
        mean_kl=Estimate(kl, kl * 0.9, kl * 1.1),
        top1_agreement=Estimate(0.9, 0.88, 0.92),
        difference=2e-5,
        agrees=True,
        tokens_per_second=1.25,
        versions={"mlx": "0.32.4"},
        commands=((f"make {name}", "--x"),),
    )


@pytest.mark.parametrize(("kl", "share", "word"), [(0.04, "0.40", "met"), (0.06, "0.60", "NOT MET")])
def test_the_table_has_bits_divergence_and_the_verdict(kl: float, share: str, word: str) -> None:
    options = script.parse(["--model", "work/tiny", "--samples", "32", "--windows", "8"])
    found = script.render(options, [row("peer", 0.1), row("accullm", kl, "peer")]).splitlines()
    assert found[0].startswith("tiny, 32 calibration windows for every tool, measured on 8 windows of held-out text")
    assert "mlx_lm (mlx 0.32.4):" in found
    assert (
        f"| the accullm | 4.500 | 4.500 | {kl:.4f} [{kl * 0.9:.4f}, {kl * 1.1:.4f}] | 90.00% [88.00%, 92.00%] | 1.2 "
        "| 2.0e-05 |" in found
    )
    assert f"{share} times the mean KL of the peer; target at most 0.5: {word}." in found
    assert found[-2:] == ["    'make peer' --x", "    'make accullm' --x"]


def test_tools_of_equal_bits_are_held_against_one_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = script.parse(["--model", "work/tiny", "--windows", "2", "--out", str(tmp_path / "runtimes")])
    options.client = options.peer = dict.fromkeys(("mlx_lm", *(peer.tool for peer in script.PEERS)), "python")
    monkeypatch.setattr(script, "shared_features", lambda source: 64)
    monkeypatch.setattr(script, "missing", lambda peer, pythons: "it is not wanted" if "gptq" in peer.name else None)
    monkeypatch.setattr(
        script.bench_peers, "quantized", lambda peer, *rest: (tmp_path / peer.name, ("make", peer.name))
    )
    bits = {"mlx-lm": 4.5, "mlx-lm-dwq": 4.5, "mlx-lm-dynamic": 5.25}
    kl = {"mlx-lm": 0.2, "mlx-lm-dwq": 0.1, "mlx-lm-dynamic": 0.05}

    def in_client(client: object, python: str, original: Path, artifact: Path, windows: Path, peer, rival, commands):
        assert artifact == tmp_path / peer.name / "artifact"
        assert commands == (("make", peer.name),)
        return dataclasses.replace(row(peer.name, kl[peer.name]), bits_per_weight=bits[peer.name])

    def ours(client: object, options: object, windows: Path, peer, theirs):
        assert np.array_equal(np.load(windows)["ids"], [[1, 2], [3, 4]])
        made.append(peer.name)
        return dataclasses.replace(row("accullm", 0.04, peer.name), bits_per_weight=theirs.bits_per_weight)

    monkeypatch.setattr(script, "in_client", in_client)
    monkeypatch.setattr(script, "ours", ours)
    made: list[str] = []
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    reference = script.Reference(None, tmp_path, "", ids, ids, ids)
    rows = list(script.measured(script.CLIENTS[0], options, reference))
    assert made == ["mlx-lm", "mlx-lm-dynamic"]
    assert [(each.name, each.rival, each.bits_per_weight) for each in rows] == [
        ("mlx-lm", "", 4.5),
        ("accullm", "mlx-lm", 4.5),
        ("mlx-lm-dwq", "", 4.5),
        ("accullm", "mlx-lm-dwq", 4.5),
        ("mlx-lm-dynamic", "", 5.25),
        ("accullm", "mlx-lm-dynamic", 5.25),
    ]
    found = script.render(options, rows).splitlines()
    assert sum(line.startswith("| the accullm | 4.500 |") for line in found) == 1
    assert [line for line in found if "times the mean KL" in line] == [
        "0.20 times the mean KL of the mlx-lm; target at most 0.5: met.",
        "0.40 times the mean KL of the mlx-lm-dwq; target at most 0.5: met.",
        "0.80 times the mean KL of the mlx-lm-dynamic; target at most 0.5: NOT MET.",
    ]
