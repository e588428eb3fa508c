"""The kernels' benchmark: a real run on the CPU, and the arithmetic of its columns."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from accullm_cli.progress import Event
from tests.scripts.loading import load_script

ROOT = Path(__file__).resolve().parents[2]


script = load_script("bench_kernels")
check = load_script("gpu_check")
blocks = load_script("time_blocks")
clock = load_script("time_rounding")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROTATED_BYTES", 100_000)
    monkeypatch.setattr(script, "measure_limits", lambda *_: script.Limits(1e9, 1e12))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("encoding", ["integer", "levels", "trellis"])
def test_every_engine_of_the_cpu_is_timed(encoding: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--shape", "64x256", "--tokens", "1", "3", "--repeats", "1", "--json"]
    arguments += ["--encoding", encoding]
    assert script.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    rows = found["rows"]
    assert {(row["out_features"], row["in_features"]) for row in rows} == {(64, 256)}
    assert {row["tokens"] for row in rows} == {1, 3}
    names = [(row["engine"], row["outliers"]) for row in rows if row["tokens"] == 3]
    hybrid = [
        f"{engine}, {dtype}"
        for dtype in ("float32", "bfloat16")
        for engine in ("CPU: packed 4-bit", "torch: dequantize, then multiply")
    ]
    wanted = [
        ("torch bfloat16", 0),
        *((name, 1) for name in hybrid),
        ("torch float32", 0),
    ]
    assert names[: len(wanted)] == wanted
    assert encoding == "integer" or len(names) == len(wanted)  # torch has a 4-bit product for steps alone
    assert all(row["microseconds"] > 0 for row in rows)
    assert [row["over_dense"] for row in rows if row["engine"] == "torch bfloat16"] == [1.0, 1.0]


def test_a_row_compares_with_the_nearer_limit() -> None:
    limits = script.Limits(bytes_per_second=1e9, operations_per_second=1e12)
    # 1,000,000 bytes of weight and 2 * 1 * 3000 of activations at 1 GB/s: 1.006 ms; took 2.012.
    row = script.make_row(limits, (1000, 2000, 1), 4.024e-3, "engine", 2.012e-3, 1_000_000, 7)
    assert row.of_limit == pytest.approx(0.5)
    assert row.over_dense == pytest.approx(2.0)
    assert (row.microseconds, row.outliers) == (pytest.approx(2012), 7)
    # With 1000 tokens 4e9 operations take 4 ms, and 7,000,000 bytes 7 ms, unless they are fast.
    many = script.make_row(limits, (1000, 2000, 1000), 1.0, "engine", 14e-3, 1_000_000)
    assert many.of_limit == pytest.approx(7e-3 / 14e-3)
    fast = script.make_row(script.Limits(1e12, 1e12), (1000, 2000, 1000), 1.0, "engine", 8e-3, 1_000_000)
    assert fast.of_limit == pytest.approx(4e-3 / 8e-3)


def test_torch_int4_is_given_the_same_weight() -> None:
    """Where this torch has that product for the CPU, it multiplies by (code - 8) * scale."""
    linear = script.random_linear(32, 256, 0, torch.bfloat16, torch.device("cpu"))
    x = torch.eye(8, 256, dtype=torch.bfloat16)
    try:
        (call,) = script.torch_int4_calls([linear], x)
    except RuntimeError as error:
        pytest.skip(f"no 4-bit product on this CPU: {error}")
    scale = torch.tensor(0.01, dtype=torch.float16).to(torch.bfloat16).double()
    wanted = (linear.codes[:, :8].double() - 8).T * scale
    torch.testing.assert_close(call().double(), wanted, rtol=2.0**-8, atol=1e-6)


def test_a_slow_pass_ends_before_all_copies_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = [0.0], [0]
    monkeypatch.setattr(script, "cpu_clock", lambda: lambda: now[0])

    def call() -> None:
        now[0] += 0.04
        ran[0] += 1

    assert script.seconds_per_call([call] * 9, torch.device("cpu"), 2) == pytest.approx(0.04)
    assert ran[0] == 1 + 2 * 3  # 0.12 s is beyond a pass


def test_on_a_cpu_engines_stand_beside_each_other() -> None:
    rows = [
        script.Row("torch float32", 64, 32, 1, 0, 12.345, 0.5, 1.0),
        script.Row("torch int4", 64, 32, 1, 0, 99.9, 0.5, 1.0),
        script.Row("torch float32", 64, 32, 8, 0, 7.0, 0.5, 1.0),
    ]
    assert script.table_by_engine(rows).splitlines() == [
        "| N x K | tokens | torch float32 | torch int4 |",
        "| --- | ---: | ---: | ---: |",
        "| 64 x 32 | 1 | 12 | 100 |",
        "| 64 x 32 | 8 | 7 |  |",
    ]


def test_the_table_has_a_line_for_each_row() -> None:
    row = script.Row("CUDA: hybrid_gemv", 4096, 2048, 1, 10, 12.345, 0.875, 3.5)
    assert script.table([row]).splitlines()[2] == ("| 4096 x 2048 | 1 | CUDA: hybrid_gemv | 10 | 12.3 | 88% | 3.50 |")


# -- scripts/gpu_check.py ----------------------------------------------------------------------------------


def test_everything_is_run_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ran: list[tuple[str, ...]] = []
    told = {"blocks": "32 blocks: 9.0 min", "demo": "mean KL 0.04"}

    class Finished:
        returncode = 0

    def run(command: tuple[str, ...], stdout: Any, timeout: float, **kwargs: Any) -> Finished:
        ran.append(command)
        if command[1].endswith("kernel_table.py"):
            raise subprocess.TimeoutExpired(command, timeout)
        assert 0 < timeout <= check.LIMIT < 8 * 60
        stdout.write(told.get(Path(stdout.name).stem, ""))
        result = Finished()
        result.returncode = 3 if command[-1] == "doctor" else 0
        return result

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(check.shutil, "which", lambda name: "/opt/compute-sanitizer")
    monkeypatch.setattr(check.subprocess, "run", run)
    monkeypatch.setattr(check, "DEMO", Path("tests"))
    assert check.main([str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"Some GPU, torch {torch.__version__}; output in {tmp_path / 'out'}",
        "demo: tests is missing (make demo prepares it), left out",
    ]
    assert [line.split(":")[0] for line in lines[2:]] == [
        "doctor", "conversions", "blocks", "tests", "blocks_with_gradients", "machine_code", "rounding",
        "rounding_fed", "bench", "bench_bfloat16", "bench_levels", "bench_trellis", "memcheck", "racecheck", "blocks",
    ]  # fmt: skip
    assert lines[2].startswith("doctor: FAILED with 3 in ")
    assert lines[7].startswith("machine_code: NOT FINISHED in ")
    assert lines[-1] == "blocks: 32 blocks: 9.0 min"
    assert ran[5][-1] == "90"
    assert ran[12][:3] == ("/opt/compute-sanitizer", "--tool", "memcheck")
    for command in ran:
        for part in command:
            assert not part.startswith("scripts/") or (ROOT / part).is_file()


def test_the_demo_is_converted_where_it_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(check, "DEMO", tmp_path)
    (step,) = (step for step in check.steps(90, None, tmp_path) if step.name == "demo")
    assert step.command[2:5] == ("accullm_cli", "convert", str(tmp_path))
    (tmp_path / "demo.txt").write_text("  mean KL 0.0405 nats\n")
    assert check.figures(tmp_path) == ["demo: mean KL 0.0405 nats"]


def test_what_there_is_no_time_for_is_said(tmp_path: Path, capsys: Any) -> None:
    assert not check.run(check.Step("late", ("false",)), tmp_path, 0.0)
    assert capsys.readouterr().out == "late: left out, as there is no time left\n"
    assert not check.run(check.Step("slow", ("sleep", "9"), 0.01), tmp_path, 5.0)
    assert capsys.readouterr().out.startswith("slow: NOT FINISHED in 0 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: Any) -> None:
    assert check.main([]) == 1
    assert capsys.readouterr().err == "error: torch sees no GPU; accullm doctor says why\n"


# -- scripts/time_blocks.py --------------------------------------------------------------------------------


def test_blocks_are_counted_by_their_shapes() -> None:
    shape = blocks.Shape(hidden=4, intermediate=6, tokens=100, measured=10, with_gradient=0, held_out=5)
    assert shape.weights == 4 * 16 + 3 * 24
    # Forward passes, the Gram matrices of three inputs of 4 features and one of 6, each with its drift.
    operations, moved = shape.work("quantize", "block")
    assert operations == 2 * 136 * 250 + 4 * (3 * 16 + 36) * 100
    assert moved == 2 * 136 + 8 * 4 * 4 * 100


def test_a_stage_is_told_by_its_last_block(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = iter((0.0, 5.0, 7.0, 7.5, 10.0, 14.0))
    monkeypatch.setattr(blocks.time, "perf_counter", lambda: next(now))
    clock = blocks.Clock(blocks.Shape(4, 6, 100, 10, 0, 5), layers=2)
    for kind, label in (("start", ""), ("step", "block 1/2"), ("step", "block 2/2"), ("end", "")):
        clock.progress(Event("quantize", kind, label))
    lines = [line.split(" | ")[1:3] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["block", "2.000 s"], ["beside its blocks", "0.500 s"]]
    assert clock.minutes == pytest.approx((32 * 2 + 0.5) / 60)
    for kind in ("start", "end"):
        clock.progress(Event("reading", kind))
    assert clock.minutes == pytest.approx((32 * 2 + 0.5 + 32 / 2 * 4) / 60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_blocks_are_not_timed_where_there_is_no_gpu(tmp_path: Path, capsys: Any) -> None:
    assert blocks.main(["--work", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "error: --device cuda: torch sees no GPU; give cpu; accullm doctor says what is missing\n"
    )
    assert not list(tmp_path.iterdir())


# -- scripts/time_rounding.py ------------------------------------------------------------------------------


def test_the_time_of_a_block_is_held_against_the_target(capsys: Any) -> None:
    assert clock.main(["--device", "cpu", "--shrink", "128", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in lines] == ["q, k, v", "o", "gate, up", "down", "block"]
    assert "32x32 + 32x32 + 32x32" in lines[0]
    assert "32x86" in lines[3]
    assert lines[4].endswith(" s, within the target of 2 s")
    seconds = [float(line.split(" s")[0].split()[-1]) for line in lines]
    assert seconds[4] == pytest.approx(sum(seconds[:4]), abs=0.003)


def test_a_block_whose_rows_feed_each_other_is_timed_without_a_target(capsys: Any) -> None:
    fed = ("--encoding", "trellis", "--fisher")
    assert clock.main(["--device", "cpu", "--shrink", "128", "--repeats", "1", *fed]) == 0
    (block,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("block"))
    assert block.split(maxsplit=1)[1].startswith("feedback, trellis, rows feed each other")
    assert block.endswith(" s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_rounding_is_not_timed_where_there_is_no_gpu(capsys: Any) -> None:
    assert clock.main([]) == 2
    assert capsys.readouterr().err == "error: cuda:0: torch sees no GPU; accullm doctor says why\n"
