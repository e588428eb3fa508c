"""What a user gets wrong: one whole line on stderr, the exit code, and nothing left behind."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.cli import main
from tests.tiny import make_checkpoint, make_tokenizer

SMALL = ["--samples", "2", "--seq-len", "32", "--validation-windows", "2", "--group-size", "32", "--threads", "1"]

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("sharded"), shard_size="60KB")


def refusal(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of `accullm convert ... --quiet`; stdout must be empty."""
    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, arguments), "--quiet"])
    captured = capfd.readouterr()
    assert captured.out == ""
    return int(str(ended.value.code)), captured.err


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_first(name: str, value: float) -> Edit:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


def add_token(directory: Path, token: str) -> None:
    """Give the tokenizer a token that the embedding has no row for."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor[:259] if tensor.shape[0] == 260 else tensor for name, tensor in tensors.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    edit_config(directory, vocab_size=259)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(directory)


def cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def remove_shard(directory: Path) -> None:
    (directory / "model-00002-of-00004.safetensors").unlink()


CASES: dict[str, tuple[Edit, str]] = {
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "{d}: holds no weights (model.safetensors); give a Hugging Face model directory",
    ),
    "truncated": (
        cut_short,
        "{d}/model.safetensors: cut short: its header promises 192,232 bytes, the file has 192,182; "
        "download or copy the file again",
    ),
    "absent shard": (
        remove_shard,
        "{d}/model.safetensors.index.json: names model-00002-of-00004.safetensors, which is absent; "
        "download the missing file",
    ),
    "missing tensor": (
        lambda d: edit_tensors(d, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        "{d}: tensor model.layers.1.mlp.up_proj.weight is missing; download the weights again, or correct config.json",
    ),
    "NaN": (
        set_first("model.layers.1.mlp.up_proj.weight", float("nan")),
        "{d}: tensor model.layers.1.mlp.up_proj.weight holds 1 NaN or Inf value, the first at [0, 3]; "
        "the checkpoint is damaged: download it again, or take another",
    ),
    "Inf": (
        set_first("model.norm.weight", float("inf")),
        "{d}: tensor model.norm.weight holds 1 NaN or Inf value, the first at [3]; "
        "the checkpoint is damaged: download it again, or take another",
    ),
    "shapes": (
        lambda d: edit_config(d, intermediate_size=128),
        "{d}: tensor model.layers.0.mlp.gate_proj.weight has shape [96, 64], but config.json makes it [128, 64] "
        "(and 5 more); config.json and weights belong to different models: take both from one place",
    ),
    "unknown architecture": (
        lambda d: edit_config(d, model_type="fancynet"),
        "{d}/config.json: model type fancynet is unknown to the installed transformers; "
        "a newer transformers may know it",
    ),
    "already quantized": (
        lambda d: edit_config(d, quantization_config={"quant_method": "awq"}),
        "{d}/config.json: the weights are already quantized (quant_method awq); give the original checkpoint",
    ),
    "encoder": (
        lambda d: edit_config(d, model_type="bert", architectures=["BertForMaskedLM"]),
        "{d}/config.json: architecture BertForMaskedLM is not a causal language model; decoder-only causal language "
        "models (LlamaForCausalLM and the like) can be converted",
    ),
    "embedding model": (
        lambda d: edit_config(d, architectures=["LlamaModel"]),
        "{d}/config.json: architecture LlamaModel is not a causal language model; decoder-only causal language "
        "models (LlamaForCausalLM and the like) can be converted",
    ),
    "a token beyond the embedding": (
        lambda d: add_token(d, " "),
        "{d}: the text has token ' ' (id 259), but the model's embedding has 259 rows; tokenizer and weights belong "
        "to different models, or a token was added without resizing the embedding: take both from one place",
    ),
    "padding beyond the embedding": (
        lambda d: edit_config(d, pad_token_id=300),
        "{d}/config.json: transformers cannot build the model (Padding_idx must be within num_embeddings; pad_token_id "
        "is 300); correct the value",
    ),
    "an adapter beside the weights": (
        lambda d: [(d / f"adapter_{part}").write_text("{}") for part in ("config.json", "model.safetensors")],
        "{d}: holds an unmerged adapter (LoRA) beside a model (adapter_config.json); merge it into the model first "
        "(peft: merge_and_unload, then save_pretrained), or take it away to convert the model without it",
    ),
    "no tokenizer": (
        lambda d: [path.unlink() for path in d.glob("tokenizer*")],
        "{d}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json there",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_source_that_cannot_be_converted(
    case: str, whole: Path, sharded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(sharded if case == "absent shard" else whole, model)
    spoil, message = CASES[case]
    spoil(model)
    code, err = refusal(capfd, model, "--out", tmp_path / "out", *SMALL)
    assert (code, err) == (2, f"error: {message.format(d=model)}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case", ["no weights", "shapes", "already quantized", "no tokenizer", "a token beyond the embedding"]
)
def test_a_refusal_before_any_work_leaves_no_run_directory(
    case: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    CASES[case][0](model)
    refusal(capfd, model, "--out", tmp_path / "out", *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("case", ["no tokenizer", "a token beyond the embedding"])
def test_a_dry_run_refuses_what_the_run_would_refuse(
    case: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    spoil, message = CASES[case]
    spoil(model)
    small = [*SMALL, "--other-text", "none", "--dry-run"]
    assert refusal(capfd, model, *small) == (2, f"error: {message.format(d=model)}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"[1, 2]",
            "{f}: is a JSON array, not JSON Lines; give one object a line with messages, text, or prompt and "
            "completion",
        ),
        (b"hello", "{f}: holds 5 tokens, but one window needs 32; give more text or a smaller --seq-len"),
        (b"caf\xe9 " * 100, "{f}: not UTF-8 (byte 0xe9 at offset 3); convert it to UTF-8"),
    ],
)
@pytest.mark.parametrize("flag", ["--calibration", "--validation-text"])
def test_text_that_cannot_be_used(
    flag: str, content: bytes, message: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_bytes(content)
    code, err = refusal(capfd, whole, "--out", tmp_path / "out", *SMALL, flag, text)
    assert (code, err) == (2, f"error: {message.format(f=text)}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--group-size", "0"],
            "--group-size: 0 is not a group size; give -1 (one scale per output row), or 1 or more",
        ),
        (["--bits", "1"], "--bits: 1 is below 2; give 2 to 8"),
        (["--bits", "9"], "--bits: 9 is above 8; give 2 to 8"),
        (
            ["--bits", "4.4", "--gradient-samples", "0"],
            "--bits: a plan needs gradients, which tell how much each linear matters; leave out --gradient-samples, or "
            "give more than 0",
        ),
        (
            ["--bits", "4.4", "--gradient-samples", "1", "--format", "compressed-tensors", "--spend", "outliers"],
            "--format compressed-tensors: compressed-tensors holds outlier features in an adapter only, which --spend "
            "outliers does not ask for; add --outlier-adapter, or leave it out, or export to the format accullm",
        ),
        (
            ["--bits", "3.5", "--gradient-samples", "1", "--group-size", "16"],
            "--bits: an average of 3.5 bits cannot be had in accullm: the smallest plan takes 3.617, scales included; "
            "give more, or larger groups",
        ),
        (["--outliers", "60%"], "--outliers: 60% is above 0.5; give 0 to 0.5"),
        (["--require", "mean_kk<=1"], "--require: unknown metric 'mean_kk' in 'mean_kk<=1'; did you mean mean_kl?"),
        (
            ["--device", "cuda:0"],
            "--device cuda:0: torch sees no GPU; give cpu; accullm doctor says what is missing",
        ),
        (
            ["--format", "compressed-tensors", "--outliers", "0", "--group-size", "64"],
            "--format compressed-tensors: compressed-tensors needs a group size that divides the 96 input features of "
            "model.layers.0.mlp.down_proj, and 64 does not (and 1 more); use --group-size 32 or -1, or export to the "
            "format accullm",
        ),
        (
            ["--format", "awq", "--bits", "5"],
            "--format awq: awq holds 4 bits, and model.layers.0.self_attn.q_proj has 5 (and 13 more); use --bits 4, or "
            "export to the format accullm",
        ),
    ],
)
def test_options_that_make_no_sense(
    flags: list[str], message: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capfd, whole, "--out", tmp_path / "out", *SMALL, *flags) == (2, f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--junit", "--summary"])
def test_results_that_could_not_be_written_in_the_end(
    flag: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    call = ("--out", tmp_path / "out", *SMALL, flag)
    line = f"error: {flag} {tmp_path}: is a directory; give a file\n"
    assert refusal(capfd, whole, *call, tmp_path) == (2, line)
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "deeper" / "results"
    line = f"error: {flag} {path}: cannot be written in {tmp_path / 'file'}; give a file in a directory of yours\n"
    assert refusal(capfd, whole, *call, path) == (2, line)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_outliers_in_a_format_that_has_none(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--format", "compressed-tensors", "--outliers", "5%"]
    code, err = refusal(capfd, whole, "--out", tmp_path / "out", *SMALL, *flags)
    assert code == 2
    assert err.startswith("error: --format compressed-tensors: ")
    assert "--outliers 0" in err
    assert err.count("\n") == 1


def test_a_misspelled_key(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("plan:\n  bits: 4\n  gruop_size: 3\n")
    code, err = refusal(capfd, whole, "--out", tmp_path / "out", "--config", path)
    assert (code, err) == (2, f"error: {path}:3: plan.gruop_size: unknown key; did you mean plan.group_size?\n")


def test_an_output_directory_that_holds_something_else(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    message = f"{out}: holds something else than an artifact; give an empty or new directory with --out"
    assert refusal(capfd, whole, "--out", out, *SMALL) == (2, f"error: {message}\n")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_the_source_as_output(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = f"{whole}: is the model that is being read; give another directory with --out"
    assert refusal(capfd, whole, "--out", whole, *SMALL) == (2, f"error: {message}\n")
    assert not whole.with_name(f"{whole.name}.run").exists()


def test_a_read_only_place(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, err = refusal(capfd, whole, "--out", "/proc/self/out", *SMALL)
    assert code == 4
    assert err.startswith("error: /proc/self/out.run: cannot be written (")
    assert err.count("\n") == 1


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands in for the disk: the first file that is larger cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_in_the_middle(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(whole), "--out", str(tmp_path / "out"), *SMALL]
    with full_disk():
        full = refusal(capfd, *arguments)
    file = tmp_path / "out.run" / "reference.safetensors"
    message = f"error: {file}: cannot be written (File too large); run the same command again to resume\n"
    assert full == (4, message)
    assert not (tmp_path / "out").exists()
    assert not file.exists()
    with pytest.raises(SystemExit) as ended:
        main(["convert", *arguments, "--quiet"])
    assert (ended.value.code, *capfd.readouterr()) == (0, f"{tmp_path / 'out'}\n", "")
