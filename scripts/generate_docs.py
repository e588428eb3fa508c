"""Write what is derived from the declarations: cli.md, config.md, formats.md, the JSON Schemas and default.yaml.

python scripts/generate_docs.py            # write them
python scripts/generate_docs.py --check    # exit with 1 where one is not as it would be written
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typer.main import get_command

from accullm_cli.cli import HELP, app
from accullm_cli.config_options import Option, config_schema, options, sections
from accullm_cli.flags import COMMON
from accullm_cli.formats.capabilities import ADAPTERS, CAPABILITIES, WHOLE_ROWS, Capabilities, Storable
from accullm_cli.measure.result import Report

ROOT = Path(__file__).resolve().parent.parent
GENERATED = "<!-- Written by scripts/generate_docs.py from the declarations in the code: change those. -->\n"


def pages() -> dict[Path, str]:
    """Every generated file (relative to the repository) and its text."""
    return {
        Path("docs/cli.md"): cli_page(),
        Path("docs/config.md"): config_page(),
        Path("docs/formats.md"): formats_page(),
        Path("docs/config.schema.json"): json.dumps(config_schema(), indent=1) + "\n",
        Path("docs/report.schema.json"): json.dumps(report_schema(), indent=1) + "\n",
        Path("configs/default.yaml"): default_config(),
    }


# -- the command line --------------------------------------------------------------------------------------


def cli_page() -> str:
    application: Any = get_command(app)
    commands = application.commands
    parts = ["# The command line\n", GENERATED, INTRODUCTION]
    common = [parameter for parameter in commands["convert"].params if parameter.name in COMMON]
    parts.append("## Flags of convert and of every stage\n\n" + "\n".join(_parameter_table(common)))
    for name in HELP:
        parts.append("\n".join(_command_lines(name, commands[name])))
    return "\n".join(parts) + "\n"


def _command_lines(name: str, command: Any) -> Iterator[str]:
    derived = {option.flag for option in options()}
    takes_config = any(derived & set(parameter.opts) for parameter in command.params)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    flags = [p for p in command.params if p.param_type_name == "option" and not derived & set(p.opts)]
    own = [p for p in flags if p.name not in COMMON] if takes_config else flags
    usage = " ".join(p.metavar if p.required else f"[{p.metavar}]" for p in arguments)
    yield f"## accullm {name}\n"
    yield f"    accullm {name} {usage}".rstrip() + (" [OPTIONS]\n" if flags else "\n")
    yield f"{command.help}\n"
    if arguments or own:
        yield from _parameter_table([*arguments, *own])
    yield "\n".join(f"    {example}" for example in HELP[name][1]) + "\n"


def _parameter_table(parameters: Sequence[Any]) -> Iterator[str]:
    yield "| | |\n| --- | --- |"
    for parameter in parameters:
        name = parameter.metavar if parameter.param_type_name == "argument" else " ".join(parameter.opts)
        value = f" {parameter.metavar}" if parameter.param_type_name == "option" and parameter.metavar else ""
        yield f"| `{name}{value}` | {_cell(parameter.help)} |"
    yield ""


def _cell(text: str | None) -> str:
    return (text or "").replace("\\[", "[").replace("|", "\\|")


INTRODUCTION = """\
`MODEL` is a local Hugging Face directory, a GGUF file, a hub id (`owner/name`, if need be with `@revision`), or a
name that `accullm models` lists. Every option of the [configuration](config.md) can be given as a flag, as a key of a
YAML file (`--config FILE`) or as `--set KEY=VALUE`; a flag overrides `--set`, which overrides the file, which overrides
the default. A preset's name (`default`, `fast`, `best`) may take the place of the file, and `--effort fast` (or `best`)
reads that preset before all files. `accullm --install-completion` sets up completion for your shell.

## Streams

Results go to stdout; progress, tables and errors go to stderr. So `art=$(accullm convert MODEL --quiet)` works.
A terminal gets progress bars. A log gets a line when a stage begins or ends and, at least every 30 seconds in between,
one that says how far the stage is and how long its remaining steps will take; `--verbose` adds a line for every step.
`--quiet` leaves only errors, `--json` changes stdout alone. Escape codes go to terminals only, and with `NO_COLOR` set
there are no colours.

| command | on stdout | with `--json` |
| --- | --- | --- |
| `convert`, `validate` | the artifact's path, one line for each format | `reports`: [schema](report.schema.json) |
| `calibrate`, `profile`, `quantize` | the run directory | `stage` |
| `export` | the artifact's path, one line for each format | `stage` |
| any of these with `--dry-run` | what would run, why and on which device, size, memory, disk, time | `dry_run` |
| `zoo` | the artifacts' paths; with `--dry-run` a table of estimates | `zoo` |
| `inspect` | what is in it | `inspection` |
| `compare` | both side by side | `comparison` |
| `diagnose` | the parts of the model by what they cost | `diagnosis_of_loss` |
| `verify` | the files, and what is wrong with them | `verification` |
| `doctor` | the checks | `diagnosis` |
| `models` | the names | `models` |
| `schema` | the JSON Schema of the configuration | (it is JSON always) |

With `--json`, stdout holds one object: `schema_version` (now 1), and the key named above. A figure that could not be
measured is `null`. New keys may come under the same version; what a key means does not change under it.

`--dry-run` says what it knows. With a width such as `--bits 4`, `bits_per_weight` and `artifact_bytes` are exact (the
files' headers and a few kilobytes of JSON come on top). With an average such as `--bits 4.4`, or with `--golden`,
calibration decides the plan: both are then the most that it may come to, the text says "at most", and in JSON
`size_is_exact` is `false`. With several `--format`, `artifacts` has the sizes of each; the two are those of the first.

## Several conversions at once

Each conversion has a run directory of its own, so several may run side by side. Two that name the same run directory
or the same `--out` do not: the second one ends with exit code 2, and says which process on which host is at work there,
and since when. The locks go with the process that holds them, however it ends.

By default a conversion has as many threads as this process may use cores: those of its affinity (`taskset`), and no
more than the CPU quota of its container (`cpu.max`, or `cpu.cfs_quota_us`), rounded up. `--dry-run` and
`accullm doctor` say how many that are. While threads of a conversion wait for
each other they sleep: `accullm` sets `OMP_WAIT_POLICY=PASSIVE` for itself, as threads that spin would take the cores
from the other conversions. That costs one conversion alone some time where it has all cores to itself
(`OMP_WAIT_POLICY=ACTIVE accullm convert ...` gets it back): `OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`, `KMP_BLOCKTIME` and
`KMP_LIBRARY` win where you set one. `--threads` gives each conversion its share of the cores.
`scripts/bench_side_by_side.py --counts 2 4` holds two and four at a time against one alone.

From Python, `from accullm_cli import convert` leaves the environment as it is: set `OMP_WAIT_POLICY=PASSIVE` before the
first `import torch` to get the same.

## Exit codes

| code | meaning |
| --- | --- |
| 0 | done, and the contract (if any) met |
| 1 | a fault of accullm |
| 2 | wrong usage, configuration or input: one line says what, where and what to do |
| 3 | looked, and it is not so: the artifact is written but its contract not met (`convert`, `validate`, \
`zoo`); files differ \
(`verify`); beyond the limit asked for (`compare`); a required check fails (`doctor`) |
| 4 | the machine could not: out of memory or disk; the same command resumes |
| 130, 143 | interrupted by Ctrl-C or by SIGTERM; the same command resumes |
"""


# -- the configuration -------------------------------------------------------------------------------------


CONFIG_INTRODUCTION = """\
Each key is also a flag of `convert` and of every stage's own command. `accullm schema` prints the JSON Schema of the
file ([config.schema.json](config.schema.json)); an editor with a YAML language server checks a file that begins with
`# yaml-language-server: $schema=PATH/TO/config.schema.json`. `model` names what to convert and stands beside the
sections. [configs/default.yaml](../configs/default.yaml) has every default.
"""


def config_page() -> str:
    parts = [
        "# The configuration\n",
        GENERATED,
        CONFIG_INTRODUCTION,
    ]
    for section, declared in sections().items():
        parts.append(f"## {section}\n\n{(declared.__doc__ or '').splitlines()[0]}\n")
        parts.append("| key | flag | values | default | meaning | example |\n| --- | --- | --- | --- | --- | --- |")
        parts += [_config_row(option) for option in options() if option.section == section]
        parts.append("")
    return "\n".join(parts)


def _config_row(option: Option) -> str:
    values = " \\| ".join(option.choices) or option.kind + (f", {option.allowed}" if option.allowed else "")
    if option.repeatable:
        values = f"list of {values}"
    flag = f"{option.flag}` `--no-{option.flag[2:]}" if option.kind == "boolean" else option.flag
    example = option.flag if option.kind == "boolean" else f"{option.flag} '{option.example}'"
    if option.kind != "boolean" and not set(option.example) & set("<>*; "):
        example = example.replace("'", "")
    return f"| {option.key} | `{flag}` | {values} | {_default(option)} | {_cell(option.help)} | `{example}` |"


def _default(option: Option) -> str:
    return "" if option.default in (None, []) else f"`{_yaml(option.default)}`"


def default_config() -> str:
    lines = ["# Every key with its default. Written by scripts/generate_docs.py; docs/config.md says more.\n"]
    for section, declared in sections().items():
        lines.append(f"# {(declared.__doc__ or '').splitlines()[0]}\n{section}:")
        for option in options():
            if option.section == section:
                lines.append(f"  {option.key.split('.')[1]}: {_yaml(option.default)}")
        lines.append("")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    """A default as YAML: names of ours need no quotes."""
    return json.dumps(value).replace('"', "")


# -- the formats -------------------------------------------------------------------------------------------


FORMATS_INTRODUCTION = """\
What each `--format` can hold. A plan is made for the format: what nobody asked for (outliers, tables of scales, a group
size) is what it can hold, an average of bits is spent among its widths and group sizes, and linears that its runtimes
multiply by at once are stored alike. What was asked for and cannot be held is refused in the first second. Several
formats in one call share the calibration; each then gets a plan, rounded weights and an artifact of its own.
[encodings.md](encodings.md) says what the encodings are, [runtimes.md](runtimes.md) which program reads what.
"""


def formats_page() -> str:
    names, formats = list(CAPABILITIES), list(CAPABILITIES.values())
    rows: list[tuple[str, list[str]]] = [
        ("linears", [_storables(format.linears) for format in formats]),
        (
            "embedding and head",
            [_storables(format.embeddings) or "as in the source" for format in CAPABILITIES.values()],
        ),
        (
            "experts in stacked parameters",
            [
                _storables(format.experts) or ("as linears" if "expert" in format.kinds else "none")
                for format in formats
            ],
        ),
        ("kinds of linears", [", ".join(format.kinds) for format in formats]),
        ("outlier features", [_outliers(format) for format in formats]),
        ("scales of 16 bits", [_scale_dtype(format) for format in formats]),
        ("features of a linear", [_multiples(format) for format in formats]),
        ("stored alike", [_fused(format) for format in formats]),
        ("loading", [_loading(format) for format in formats]),
        ("read by", ["; ".join(reader.name for reader in format.readers) or "accullm" for format in formats]),
    ]
    parts = ["# The formats\n", GENERATED, FORMATS_INTRODUCTION]
    parts.append("| |" + "".join(f" `{name}` |" for name in names) + "\n| --- |" + " --- |" * len(names))
    parts += [f"| {what} | " + " | ".join(cells) + " |" for what, cells in rows]
    return "\n".join(parts) + "\n"


def _storables(storables: Sequence[Storable]) -> str:
    return "; ".join(_storable(storable) for storable in storables)


def _storable(storable: Storable) -> str:
    sizes = ", ".join("rows" if size == WHOLE_ROWS else str(size) for size in storable.group_sizes) or "of any size"
    whole = " that divide the inputs" if storable.whole_groups else ""
    tables = [bits for bits in storable.scale_bits if bits < 16]
    symmetric = {(False,): "asymmetric", (True,): "symmetric"}.get(storable.symmetric, "symmetric or not")
    return (
        f"{storable.encoding}: {_numbers(storable.bits)} bits, groups {sizes}{whole}, scales of 16 bits"
        + (f" or {_numbers(tables)} in a table" if tables else "")
        + f", {symmetric}"
        + (", on request" if storable.on_request else "")
    )


def _numbers(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _outliers(format: Capabilities) -> str:
    if not format.adapter:
        return format.outliers
    one_rank = ", of one rank" if ADAPTERS[format.adapter].one_rank else ""
    return f"{format.outliers} ([`--outlier-adapter`](outliers.md), for {format.adapter}{one_rank})"


def _scale_dtype(format: Capabilities) -> str:
    return "of the model's dtype" if format.scale_dtype == "of the model" else format.scale_dtype


def _multiples(format: Capabilities) -> str:
    wanted = {(entry.in_multiple, entry.out_multiple) for entry in format.linears} - {(1, 1)}
    return "; ".join(f"inputs multiples of {ins}, outputs of {outs}" for ins, outs in sorted(wanted)) or "any"


def _fused(format: Capabilities) -> str:
    if format.all_alike:
        return "all linears"
    parts = [", ".join(names) for names in format.fused]
    if format.fused_experts != "none":
        parts.append(f"all experts {format.fused_experts}")
    return ("; ".join(parts) + f" ({format.runtime})") if parts else "nothing"


def _loading(format: Capabilities) -> str:
    if format.module:
        return f"transformers, after `import {format.module}`"
    package = format.package or format.loader
    return f"transformers with `{package}`" if package else "not by transformers"


def report_schema() -> dict[str, Any]:
    schema = TypeAdapter(Report).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "AccuLLM report"}


def main() -> int:
    stale = []
    for path, text in pages().items():
        file = ROOT / path
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale.append(path)
            if "--check" not in sys.argv:
                file.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'not as the code declares it; run make docs' if '--check' in sys.argv else 'written'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
