"""What a dry run promises about size, against artifacts on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from accullm_cli.config import Config
from accullm_cli.pipeline import convert, dry_run
from accullm_cli.stages import estimate as stage
from accullm_cli.stages import streams
from accullm_cli.stages.compute import Compute
from accullm_cli.stages.estimate import Estimated, estimate
from accullm_cli.stages.job import open_decoder
from accullm_cli.stages.profile import make_plan
from tests.llama_cpp import byte_tokenizer
from tests.streaming import opened, run_to, short_config
from tests.tiny import edit_config, make_checkpoint, make_tokenizer


def estimated(model: Path, out: Path, **settings: object) -> Estimated:
    with opened(short_config(model, out, **settings)) as job:
        decoder = open_decoder(job)
        return estimate(job, decoder, make_plan(job, decoder))


def tensor_bytes(directory: Path) -> int:
    """All tensors of an artifact."""
    return sum(tensor.nbytes for path in directory.glob("*.safetensors") for tensor in load_file(path).values())


def tokenizer_bytes(directory: Path) -> int:
    return sum(
        path.stat().st_size for path in directory.iterdir() if path.name not in ("config.json", "model.safetensors")
    )


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("llama", torch.bfloat16, {}),
        ("llama-tied", torch.bfloat16, {"plan__group_size": -1, "plan__symmetric": True}),
        ("llama", torch.float32, {"plan__bits": 3}),
        ("gpt2", torch.float16, {"plan__outliers": 0}),
        ("mixtral", torch.bfloat16, {}),
        ("llama", torch.bfloat16, {"plan__embedding_bits": 8}),
        ("llama-tied", torch.bfloat16, {"plan__embedding_bits": 4, "plan__group_size": 48}),
        ("gpt2", torch.float32, {"plan__embedding_bits": 8, "plan__symmetric": True}),
    ],
)
def test_the_size_is_that_of_the_artifacts_tensors_and_tokenizer(
    name: str, dtype: torch.dtype, settings: dict[str, object], tmp_path: Path
) -> None:
    source = make_checkpoint(name, tmp_path / "model", dtype)
    expected = estimated(source, tmp_path / "dry", **settings)
    with opened(short_config(source, tmp_path / "out", rounding__method="nearest", **settings)) as job:
        run_to(job, "export")
    assert expected.artifact_bytes == tensor_bytes(tmp_path / "out") + tokenizer_bytes(source)


def wide_model(directory: Path, layers: int = 1) -> Path:
    """Large enough that JSON and headers are small beside its tensors."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 260}
    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def test_the_size_is_within_two_percent_of_all_files(tmp_path: Path) -> None:
    source = wide_model(tmp_path / "model")
    expected = estimated(source, tmp_path / "dry")
    fast = {"rounding__method": "nearest", "rounding__grid": "minmax"}
    with opened(short_config(source, tmp_path / "out", **fast)) as job:
        run_to(job, "export")
    found = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert expected.artifact_bytes == pytest.approx(found, rel=0.02)


def files_of(directory: Path) -> int:
    """Bytes of all files below a directory; links to one file count once."""
    found = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum({status.st_ino: status.st_size for status in found}.values())


@pytest.fixture
def most_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, Path], int]:
    """Converts, and gives the bytes of all files below a directory when there were most of them."""

    def convert_and_look(config: Config, place: Path) -> int:
        most = 0

        def look(captures: streams.Captures, *error: object) -> None:
            nonlocal most
            most = max(most, files_of(place) + captures._end)  # its file has no name
            close(captures, *error)

        def look_again(store: streams.StreamStore, key: str, tensors: dict[str, torch.Tensor]) -> None:
            nonlocal most
            there = store.path.stat().st_size if store.path.exists() else 0
            put(store, key, tensors)
            most = max(most, files_of(place) + there)  # the new one was written beside the old one

        close, put = streams.Captures.__exit__, streams.StreamStore.store_if_due
        with monkeypatch.context() as patched:
            patched.setattr(streams.Captures, "__exit__", look)
            patched.setattr(streams.StreamStore, "store_if_due", look_again)
            patched.setattr(streams, "SECONDS_BETWEEN_STORES", 0.0)
            convert(config)
        return max(most, files_of(place))

    return convert_and_look


@pytest.mark.parametrize(
    "settings",
    [
        {"calibration__samples": 40},
        {"calibration__samples": 40, "calibration__gradient_samples": 40},
        {"export__format": "[compressed-tensors]", "plan__outliers": 0},
    ],
)
def test_the_disk_is_what_all_files_take_when_there_are_most(
    settings: dict[str, object], tmp_path: Path, most_files: Callable[[Config, Path], int]
) -> None:
    source = wide_model(tmp_path / "model", layers=3)
    expected = estimated(source, tmp_path / "dry", **settings)
    most = most_files(short_config(source, tmp_path / "place" / "out", **settings), tmp_path / "place")
    assert 0.95 * most < expected.disk_bytes < 1.6 * most


NEAREST = {"rounding__method": "nearest", "rounding__grid": "minmax", "calibration__gradient_samples": 0}
TASKS = {"validation__tasks": "arithmetic:easy", "validation__task_items": 20}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", NEAREST),
        ("llama", {"calibration__samples": 8, "calibration__gradient_samples": 8, "plan__bits": 4.5}),
        ("mixtral", NEAREST),
        ("gpt2", {**NEAREST, "validation__other_text": "none"}),
        ("llama-tied", {**NEAREST, **TASKS, "export__format": "[mlx]", "plan__outliers": 0}),
    ],
)
def test_the_disk_is_what_a_tiny_conversion_takes(
    kind: str, settings: dict[str, object], tmp_path: Path, most_files: Callable[[Config, Path], int]
) -> None:
    """Where pages, plans and headers weigh more than weights."""
    source = make_checkpoint(kind, tmp_path / "model")
    if "validation__tasks" in settings:  # which are longer than the tiny model reads
        edit_config(source, max_position_embeddings=512)
    expected = dry_run(short_config(source, tmp_path / "dry", **settings)).disk_bytes
    most = most_files(short_config(source, tmp_path / "place" / "out", **settings), tmp_path / "place")
    assert 0.95 * most < expected < 1.4 * most


def test_of_a_gguf_file_the_disk_holds_the_checkpoint_that_it_becomes(
    tmp_path: Path, most_files: Callable[[Config, Path], int]
) -> None:
    model = wide_model(tmp_path / "model", layers=3)
    byte_tokenizer().save_pretrained(model)
    gguf = {"export__format": "[gguf]", "plan__outliers": 0, "plan__group_size": 32}
    convert(short_config(model, tmp_path / "first", **NEAREST, **gguf))
    (file,) = (tmp_path / "first").glob("*.gguf")
    expected = dry_run(short_config(file, tmp_path / "dry", **NEAREST)).disk_bytes
    most = most_files(short_config(file, tmp_path / "place" / "out", **NEAREST), tmp_path / "place")
    assert 0.95 * most < expected < 1.3 * most


FIXED = {"rounding__damping": 0.3}


def test_more_text_takes_more_time_and_memory(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    little, chosen, much = (
        estimated(source, tmp_path / "out", validation__windows=2, calibration__samples=samples, **damping)
        for samples, damping in ((100, FIXED), (100, {}), (10_000, FIXED))
    )
    assert much.seconds > 10 * little.seconds
    # Both streams, in float32.
    assert much.peak_bytes - little.peak_bytes == 9_900 * 48 * 64 * 4 * 2
    assert much.artifact_bytes == little.artifact_bytes
    # Of an eighth of the windows the widest input is kept, to choose damping by.
    assert chosen.peak_bytes - little.peak_bytes <= 12 * 48 * 96 * 4
    assert chosen.seconds >= little.seconds


def test_references_are_held_beside_the_text_that_is_measured(tmp_path: Path) -> None:
    """In calibrate: little of its own text, and twice the windows of each other."""
    source = make_checkpoint("llama", tmp_path / "model")
    two, five = (
        estimated(source, tmp_path / "out", calibration__samples=1, validation__windows=windows).peak_bytes
        for windows in (2, 5)
    )
    assert five - two == 3 * 48 * 64 * 4 * 2


def test_gradients_take_more_time_and_a_blocks_fisher_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_operations_per_second", lambda job: 1e9)
    source = wide_model(tmp_path / "model")
    settings = {"calibration__samples": 10_000, "validation__windows": 2}
    without = estimated(source, tmp_path / "out", **settings)
    with_all = estimated(source, tmp_path / "out", **settings, calibration__gradient_samples=10_000)
    # q, k, v, o and down have 512 outputs, gate and up 1024.
    assert with_all.peak_bytes - without.peak_bytes == pytest.approx(4 * (5 * 512**2 + 2 * 1024**2), abs=1)
    # One pass through the original and 1.5 through the rounded model, and four more.
    assert 2.2 < with_all.seconds / without.seconds < 2.7


def test_nearest_rounding_runs_no_block_in_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a conversion on much text is the passes of error feedback."""
    monkeypatch.setattr(stage, "_operations_per_second", lambda job: 1e9)
    source = make_checkpoint("llama", tmp_path / "model")
    much = {"calibration__samples": 10_000, "validation__windows": 2}
    nearest = estimated(source, tmp_path / "out", rounding__method="nearest", **much).seconds
    original = estimated(source, tmp_path / "out", rounding__target="original", **much).seconds
    corrected = estimated(source, tmp_path / "out", **much).seconds
    assert 2 * nearest < original < corrected < 1.9 * original


def test_tasks_take_their_tokens_twice_and_what_the_original_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_operations_per_second", lambda job: 1e9)
    source = wide_model(tmp_path / "model")
    items = tmp_path / "mine.jsonl"
    items.write_text("\n".join(json.dumps({"prompt": f"{number:0100}", "answer": "b" * 9}) for number in range(30)))
    memory: list[int | None] = [None]
    monkeypatch.setattr(Compute, "free_memory", lambda compute: memory[0])
    without = estimated(source, tmp_path / "out")
    with_tasks = estimated(source, tmp_path / "out", validation__tasks=items)
    memory[0] = 1000
    unwritten = estimated(source, tmp_path / "out", validation__tasks=items)
    # A byte is a token here; a space stands in front of the answer.
    row, blocks, head = 100 + 1 + 9, 4 * 512**2 + 3 * 512 * 1024, 512 * 260
    asked = 2 * 30 * (2 * blocks * row + 2 * 512 * row**2 + 2 * head * 11)
    assert unwritten.seconds - without.seconds == pytest.approx(asked / 0.5e9, abs=0.11)
    # Of 20 of them half, 11 tokens each.
    written = 20 / 2 * 11 * 20 * (blocks + head)
    assert with_tasks.seconds - unwritten.seconds == pytest.approx(written / 0.5e9, abs=0.11)
    # 8,192 tokens on their way instead of the calibration text, and to write the whole model at once.
    assert unwritten.peak_bytes > without.peak_bytes
    assert with_tasks.peak_bytes >= unwritten.peak_bytes


def test_a_long_document_takes_memory_for_all_of_its_tokens(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    edit_config(source, max_position_embeddings=100_000)
    short, long = (
        estimated(source, tmp_path / "out", validation__tasks=f"retrieval:{tokens}", validation__task_items=3)
        for tokens in (400, 8000)
    )
    assert long.peak_bytes > short.peak_bytes
    assert long.seconds > short.seconds


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of a part of a process here")
def test_a_large_vocabulary_takes_the_memory_of_a_few_positions_logits(tmp_path: Path) -> None:
    """Those of a window would be 410 MB, three times over; beside them the model is nothing."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 200_000}
    config = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"calibration__seq_len": 512, "calibration__samples": 1, "validation__windows": 2}
    # In a process of its own: one that has freed memory before takes less of the system's.
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.streaming import fast_config, opened, run_to\n"
        "place = Path(sys.argv[1])\n"
        f"with opened(fast_config(place / 'model', place / 'out', **{settings})) as job:\n"
        "    print(run_to(job, 'validate')['validate accullm'].record.peak_bytes)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    found = int(ended.stdout.splitlines()[-1])
    assert found < 1_300_000_000
    assert estimated(tmp_path / "model", tmp_path / "dry", **settings).peak_bytes == pytest.approx(found, rel=0.3)
