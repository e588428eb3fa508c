"""What NVRTC makes of the kernels, without a device: every architecture, no spills, the instructions that matter."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.kernels import compile as module
from accullm_cli.kernels.compile import compile_kernels
from tests.kernels.machine_code import TOOLS, KernelCode, find_tool, read_machine_code

ROOT = Path(__file__).resolve().parents[2]


def load_table() -> Any:
    spec = importlib.util.spec_from_file_location("kernel_table", ROOT / "scripts" / "kernel_table.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["kernel_table"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


table = load_table()


def what_is_missing() -> str | None:
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is missing: it brings NVRTC"
    try:
        module._nvrtc()
    except AccullmError as error:
        return error.line()
    missing = [tool for tool in TOOLS if find_tool(tool) is None]
    return f"{', '.join(missing)} missing: NVIDIA's disassemblers" if missing else None


MISSING = what_is_missing()
needs_nvrtc = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

# A block's threads times the registers of one must fit a multiprocessor's 65,536.
REGISTERS = 65536
THREADS = {
    "hybrid_gemv": 512,
    "hybrid_gemm": 128,
    "feedback_round": 256,
    "descend": 256,
    "trellis_round": 256,
    "trellis_descend": 256,
    "trellis_round_fed": 256,
    "trellis_descend_fed": 256,
}
# What the main loop of M <= 8 may take per weight, outlier branch included. An H200 leaves 4.15 at the speed of its
# memory; the branch, which an iteration does not run, is a tenth of the loop.
MOST_PER_WEIGHT = {
    "fp16": 5.0,
    "bf16": 6.0,
    "fp16, levels": 5.2,
    "bf16, levels": 6.3,
    "fp16, trellis": 6.7,
    "bf16, trellis": 8.3,
}
# Where the products of one kind are compiled, whose labels end so, and those of the others not.
ALONE = {80: "16", 86: "trellis", 89: "levels", 100: "levels"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own, so that the compiler runs in every test session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def check_product(name: str, code: KernelCode, label: str, architecture: int) -> None:
    family = name.rpartition("_")[0]
    assert code.registers * THREADS[family] <= REGISTERS
    assert code.count(r"HMMA\.(16816|1688)\.F32(\.BF16)?", code.loop) > 0
    assert code.count(r"LDS(\.U)?\.128", code.loop) > 0
    if architecture >= 80:
        assert code.count(r"LDGSTS\.E.*\.128", code.loop) > 0
        assert code.count(r"HMMA\.16816\.F32\.BF16", code.loop) == (
            code.count(r"HMMA", code.loop) if label.startswith("bf16") else 0
        )
    else:
        assert code.count(r"LDG\.E.*\.128", code.loop) > 0
    if name == "hybrid_gemv_8":
        assert table.instructions_per_weight(name, code, architecture) <= MOST_PER_WEIGHT[label]
    if label.endswith("trellis"):
        # Every half of a word takes three look-ups, and two (bfloat16: four) in place of it.
        assert code.count(r"PRMT", code.loop) >= (56 if label.startswith("bf16") else 40)
    elif label.endswith("levels"):
        # Every word takes four look-ups, and two (bfloat16: four) in place of each half's: 32 weights, 32 (48).
        assert code.count(r"PRMT", code.loop) >= (48 if label.startswith("bf16") else 32)
    else:
        # Every word of codes becomes four registers with one logical instruction each: 32 weights, 16 instructions.
        assert code.count(r"LOP3\.LUT.*0xea", code.loop) >= 16


@needs_nvrtc
@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("source", sorted({build[0] for build in table.BUILDS}))
def test_every_kernel_compiles_without_spills(source: str, architecture: int) -> None:
    builds = [build for build in table.builds(architecture) if build[0] == source]
    assert builds
    if not source.startswith("hybrid"):
        builds = builds[:1] if architecture != 90 else builds  # the second formats differ in little
    elif architecture in ALONE:
        builds = [build for build in builds if build[2].endswith(ALONE[architecture])]
    for _, defines, label in builds:
        kernels = read_machine_code(compile_kernels(source, defines, architecture))
        assert kernels
        for name, code in kernels.items():
            assert (code.stack, code.count(r"STL"), code.count(r"LDL")) == (0, 0, 0), (name, "spills")
            if source.startswith("hybrid"):
                check_product(name, code, label, architecture)
            if name == "dequantize_tiles":
                assert code.count(r"LDG\.E.*\.128") > 0
                assert code.count(r"STG\.E.*\.128") > 0
            if label == "fp32":
                # One thread adds up what a chain costs; nothing else is double.
                sums = r"D(FMA|MUL)" if name.startswith("trellis") else r"D(FMA|ADD|MUL)"
                assert code.count(sums) == 0, "double arithmetic in the float32 kernel"
                assert code.registers * THREADS[name] <= REGISTERS


@needs_nvrtc
def test_bfloat16_before_compute_capability_8_is_refused_by_name() -> None:
    with pytest.raises(AccullmError) as caught:
        compile_kernels("hybrid_gemv.cu", ("COMPUTE_BF16=1",), 75)
    assert "hybrid_gemv.cu: does not compile for sm_75: " in caught.value.line()
    assert "bfloat16 needs compute capability 8.0" in caught.value.line()


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        (70, "no CUDA kernel for compute capability 7.0: it needs 7.5 or newer"),
        (999, "this NVRTC does not know compute capability 99.9; install a newer CUDA toolkit for CuPy"),
    ],
)
def test_an_unknown_architecture_is_refused_by_name(architecture: int, line: str) -> None:
    with pytest.raises(AccullmError) as caught:
        compile_kernels("dequantize.cu", (), architecture)
    assert caught.value.line() == line


@needs_nvrtc
def test_a_compiled_kernel_is_kept_and_a_changed_option_compiles_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compile_kernels("dequantize.cu", ("COMPUTE_BF16=0",), 90)
    (kept,) = (tmp_path / "accullm" / "kernels").iterdir()
    assert kept.name.startswith("dequantize-sm90-")
    kept.write_bytes(b"as it was kept")
    assert compile_kernels("dequantize.cu", ("COMPUTE_BF16=0",), 90) == b"as it was kept"
    assert compile_kernels("dequantize.cu", ("COMPUTE_BF16=1",), 90) not in (first, b"as it was kept")
    assert len(list(kept.parent.iterdir())) == 2


@needs_nvrtc
def test_a_changed_header_compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda")
    monkeypatch.setattr(module, "resource", lambda *parts: tmp_path.joinpath(*parts))
    compile_kernels("dequantize.cu", (), 90)
    with (tmp_path / "cuda" / "layout.cuh").open("a") as file:
        file.write("\n#error changed\n")
    with pytest.raises(AccullmError, match=r"dequantize\.cu: does not compile for sm_90: .*changed"):
        compile_kernels("dequantize.cu", (), 90)


@needs_nvrtc
def test_a_folder_that_cannot_be_written_does_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_kernels("dequantize.cu", (), 90)[:4] == b"\x7fELF"


def test_without_cupy_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module._nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(AccullmError) as caught:
        compile_kernels("dequantize.cu", (), 90)
    wanted = "CuPy is missing; pip install 'accullm[cuda12]' or 'accullm[cuda13]', as the driver's version"
    assert caught.value.line() == wanted


def test_without_nvrtc_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("libnvrtc.so: no such file")

    module._nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nvrtc=SimpleNamespace(getVersion=fail)))
    with pytest.raises(AccullmError, match=r"CuPy finds no NVRTC \(libnvrtc.so: no such file\); pip install"):
        compile_kernels("dequantize.cu", (), 90)
