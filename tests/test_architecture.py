"""The rules of the house as checks: who may import whom, what a wheel carries, how large a file may grow."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from accullm_cli.config import FormatName
from accullm_cli.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "accullm_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Imports run from a layer to itself or to a later one.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"__init__", "__main__", "cli", "questions", "outcome", "flags", "console"}),
    frozenset({"pipeline", "search", "zoo", "commands"}),
    frozenset({"stages"}),
    frozenset({"measure", "report", "formats", "kernels", "model", "tasks", "hf", "hybrid", "lazy_weight", "vllm"}),
    frozenset({"quant"}),
    frozenset({"config", "config_options", "config_file", "resources", "places", "run", "lock", "processors"})
    | frozenset({"failure", "json_text", "progress", "units", "values", "errors"}),
)
MAX_LINES = 450
HEAVY = {"torch", "numba", "transformers", "numpy", "safetensors", "matplotlib", "huggingface_hub", "gguf"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in SOURCES}


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Every module that `source` imports, anywhere in it (functions and TYPE_CHECKING included), with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in MODULES else base), node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno


def all_imports() -> list[tuple[Path, str, str, int]]:
    """(file, importing module, imported module, line) over the package."""
    return [
        (path, name_of(path), imported, line)
        for path in SOURCES
        for imported, line in imports_of(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")
    ]


def room_of(module: str) -> str:
    """The part of the package that a module belongs to: "accullm_cli.quant.grid" is in "quant"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer_of(room: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if room in rooms)


# -- imports -----------------------------------------------------------------------------------------------


def test_the_reader_of_imports_sees_every_way_to_import():
    source = (
        "import torch.nn\n"
        "from accullm_cli import errors\n"
        "from . import plan\n"
        "from ..run import Reason\n"
        "def later():\n"
        "    from transformers import AutoConfig\n"
        "    importlib.import_module('accullm_cli.pipeline')\n"
    )
    assert sorted(imports_of(source, "accullm_cli.quant.grid")) == [
        ("accullm_cli.errors", 2),
        ("accullm_cli.pipeline", 7),
        ("accullm_cli.quant.plan", 3),
        ("accullm_cli.run", 4),
        ("torch.nn", 1),
        ("transformers", 6),
    ]


def test_every_module_has_its_room():
    rooms = {room_of(name) for name in MODULES}
    known = frozenset().union(*LAYERS)
    assert rooms <= known, f"no layer for {sorted(rooms - known)}"


def test_imports_run_one_way():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {room_of(module)} imports {imported}"
        for path, module, imported, line in all_imports()
        if imported.split(".")[0] == "accullm_cli"
        and module != "accullm_cli"
        and imported != "accullm_cli"  # for its version
        and layer_of(room_of(imported)) < layer_of(room_of(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_a_layer_do_not_import_each_other_in_a_circle():
    edges: dict[str, set[str]] = {}
    for _, module, imported, _ in all_imports():
        if imported.startswith("accullm_cli.") and module != "accullm_cli" and room_of(module) != room_of(imported):
            edges.setdefault(room_of(module), set()).add(room_of(imported))
    open_rooms = sorted(edges)
    while leaves := [room for room in open_rooms if not edges[room] & set(open_rooms)]:
        open_rooms = [room for room in open_rooms if room not in leaves]
    assert not open_rooms, {room: sorted(edges[room] & set(open_rooms)) for room in open_rooms}


def test_quant_imports_torch_numba_errors_and_itself_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {imported}"
        for path, module, imported, line in all_imports()
        if room_of(module) == "quant"
        and imported.split(".")[0] not in sys.stdlib_module_names | {"torch", "numba", "numpy"}
        and imported != "accullm_cli.errors"
        and not imported.startswith("accullm_cli.quant")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_command_line_and_the_floor_import_nothing_heavy_when_they_are_imported():
    code = (
        "import sys, accullm_cli.cli, accullm_cli.console, accullm_cli.progress, accullm_cli.measure.result\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not HEAVY & set(ast.literal_eval(result.stdout))


def test_names_of_formats_stand_in_their_files_and_declarations_alone():
    """Everybody else asks for capabilities. The native format has the name of the program, which stands everywhere."""
    declared = ("formats/capabilities.py", "config.py", "cli.py")  # the examples of the last two name one
    # A package of that name reads sources of that kind, which stages may speak of.
    sources = {"gguf": ("model/", "places.py", "stages/reading.py", "zoo/file.py")}
    for name in list(FORMATS)[1:]:
        own = (*(f"formats/{name.replace('-', '_')}{end}" for end in (".py", "_")), *declared, *sources.get(name, ()))
        others = [path for path in SOURCES if not str(path.relative_to(PACKAGE)).startswith(own)]
        named = re.compile(rf"\b{name}\b|\b{name.replace('-', '_')}\b")
        assert not [path for path in others if named.search(path.read_text(encoding="utf-8"))]


def test_the_configuration_names_the_formats_that_there_are():
    assert get_args(FormatName) == tuple(FORMATS)


# -- files -------------------------------------------------------------------------------------------------


def test_no_module_is_named_for_leftovers():
    leftovers = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [path for path in SOURCES if path.stem in leftovers or leftovers & set(path.parts[len(ROOT.parts) :])]


@pytest.mark.parametrize("folder", ["accullm_cli", "scripts"])
def test_no_file_outgrows_a_sitting(folder):
    long = {
        str(path.relative_to(ROOT)): count
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (count := len(path.read_text(encoding="utf-8").splitlines())) >= MAX_LINES
    }
    assert not long


def test_cuda_is_no_python_package():
    # CuPy needs the namespace package `cuda` (cuda.pathfinder), which an __init__.py of ours would hide.
    assert not list((ROOT / "cuda").rglob("*.py"))


def test_no_code_from_a_model_is_run_and_no_pickle_is_read():
    forbidden = re.compile(r"trust_remote_code\s*=\s*True|torch\.load\(|pickle\.loads?\(")
    found = [str(path) for path in SOURCES if forbidden.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_no_exception_is_swallowed():
    swallowed = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
    ]
    assert not swallowed


def test_only_the_command_line_ends_the_process_or_prints():
    allowed = {"accullm_cli.cli", "accullm_cli.console"}
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}"
        for path in SOURCES
        if name_of(path) not in allowed
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit", "os._exit")
    ]
    assert not calls, "\n".join(calls)


# -- the wheel ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built by the build backend itself from a copy of the tree, without network."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("accullm_cli", "configs", "cuda"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, copy / file)
    code = "import hatchling.build; print(hatchling.build.build_wheel('dist'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return copy / "dist" / result.stdout.strip().splitlines()[-1]


def test_a_wheel_carries_the_package_the_configs_the_kernels_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in SOURCES}
    for folder in ("configs", "cuda"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                wanted.add(f"accullm_cli/_data/{path.relative_to(ROOT)}")
    assert wanted <= names, sorted(wanted - names)
    others = {name for name in names - wanted if ".dist-info/" not in name}
    assert not others
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_answers_and_finds_its_files(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; from accullm_cli.resources import resource; "
        "print(resource('configs', 'fast.yaml')); "
        "sys.argv = ['accullm', 'convert', 'm', '--config', 'fast', '--bits', '9']; "
        "from accullm_cli.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == f"{tmp_path}/site/accullm_cli/_data/configs/fast.yaml\n"
    assert (result.returncode, result.stderr) == (2, "error: --bits: 9 is above 8; give 2 to 8\n")


def test_the_command_and_its_version_come_from_the_package(wheel):
    import accullm_cli

    assert wheel.name == f"accullm-{accullm_cli.__version__}-py3-none-any.whl"
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "accullm = accullm_cli.cli:main" in archive.read(entry).decode()
