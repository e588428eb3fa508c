"""What the compiler made of a kernel: registers, memory it spilled to, instructions. Needs NVIDIA's disassemblers.

The judge of a kernel where no GPU is at hand: an instruction that is missing, or a loop that is too long, shows here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from accullm_cli.errors import AccullmError

HOW_TO_INSTALL = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
TOOLS = ("cuobjdump", "nvdisasm")

_USAGE = re.compile(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SECTION = re.compile(r"^\.text\.(\w+):$")
_LABEL = re.compile(r"^(\.L_x?_?\w+):$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(.+?)\s*;")
_BRANCH = re.compile(r"BRA.*`\((\.L\w+)\)")


@dataclass(frozen=True)
class KernelCode:
    """One kernel for one architecture.

    stack: bytes per thread of memory that stands in for registers; 0 where nothing was spilled.
    instructions: in order, with their operands: "HMMA.16816.F32 R8, R48, R22, R8".
    loop: those of the innermost loop with the most tensor core instructions, side branches included; empty where there
        are no such instructions.
    """

    registers: int
    stack: int
    static_shared: int
    instructions: tuple[str, ...]
    loop: tuple[str, ...]

    def count(self, pattern: str, where: tuple[str, ...] | None = None) -> int:
        """Instructions that begin with the regular expression, in the whole kernel or in `where`."""
        return sum(bool(re.match(rf"(@!?U?P\w+ )?{pattern}", line)) for line in where or self.instructions)


def find_tool(name: str) -> str | None:
    """NVIDIA's disassembler of that name: on the path, or where its package puts it."""
    found = shutil.which(name)
    if found is not None:
        return found
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return next((str(path) for path in sorted(packages.glob(f"*/bin/{name}"))), None)


def read_machine_code(cubin: bytes) -> dict[str, KernelCode]:
    """Every kernel in a cubin, by name.

    Raises:
        AccullmError: a disassembler is missing or does not understand the file.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    bodies = _bodies(listing)
    kernels = {}
    for name, registers, stack, shared, local in _USAGE.findall(usage):
        instructions, loop = _parse(bodies[name])
        kernels[name] = KernelCode(int(registers), int(stack) + int(local), int(shared), instructions, loop)
    return kernels


def _run(tool: str, *arguments: str) -> str:
    program = find_tool(tool)
    if program is None:
        raise AccullmError(f"{tool} is missing", hint=HOW_TO_INSTALL)
    result = subprocess.run([program, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise AccullmError(f"{tool} failed ({result.stderr.strip()})")
    return result.stdout


def _bodies(listing: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in listing.splitlines():
        section = _SECTION.match(line)
        if section:
            current = bodies.setdefault(section[1], [])
        elif line.lstrip().startswith(".section"):
            current = []  # whatever follows until the next kernel
        else:
            current.append(line)
    return bodies


def _parse(lines: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All instructions, and those of the loop with the most tensor core instructions."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in lines:
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
            branch = _BRANCH.search(line)
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(instructions)))
    best: tuple[str, ...] = ()
    most = 0
    for begin, end in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        inside = tuple(instructions[begin:end])
        count = sum("HMMA" in line for line in inside)
        if count > most:
            best, most = inside, count
    return tuple(instructions), best
