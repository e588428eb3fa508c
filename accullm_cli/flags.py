"""Flags, derived: one typer option for each option of the configuration, and the few that are not configuration.

No option is declared here that `accullm_cli.config` declares.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from accullm_cli.config import Config
from accullm_cli.config_file import EFFORTS, load_config, presets, presets_of
from accullm_cli.config_options import Option, options, sections
from accullm_cli.console import Console
from accullm_cli.resources import resource

T = TypeVar("T")

# -- completion --------------------------------------------------------------------------------------------


def _paths(incomplete: str) -> list[str]:
    """What the shell would offer itself: its own file completion is off where a command offers words."""
    paths = sorted(Path().glob(f"{incomplete}*")) if incomplete and not Path(incomplete).is_absolute() else []
    return [f"{path}/" if path.is_dir() else str(path) for path in paths]


def complete_model(incomplete: str) -> list[str]:
    aliases = sorted(path.stem for path in resource("configs", "models").glob("*.yaml"))
    return [alias for alias in aliases if alias.startswith(incomplete)] + _paths(incomplete)


def complete_config(incomplete: str) -> list[str]:
    return [name for name in presets() if name.startswith(incomplete)] + _paths(incomplete)


def complete_set(incomplete: str) -> list[str]:
    return [f"{option.key}=" for option in options() if option.key.startswith(incomplete)]


def _completer_of(option: Option) -> Callable[[str], list[str]] | None:
    if not option.choices:
        return None
    return lambda incomplete: [choice for choice in option.choices if choice.startswith(incomplete)]


# -- annotations -------------------------------------------------------------------------------------------------


def _literally(text: str) -> str:
    """Text for a help page: "[" before a letter or "@" would be rich's markup."""
    return re.sub(r"(\[[a-z#/@])", r"\\\1", text)


MODEL_HELP = _literally(Config.model_fields["model"].description or "")
Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model),
]
ConfigFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file, or the name of a preset; give it again for several, the last one wins.",
        autocompletion=complete_config,
    ),
]
Effort = Annotated[
    str | None,
    typer.Option(
        "--effort",
        metavar="|".join(EFFORTS),
        help="How much time to spend: the preset that everything else given changes. Default: balanced.",
        autocompletion=lambda incomplete: [name for name in EFFORTS if name.startswith(incomplete)],
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key of the YAML file, as plan.bits=4.",
        autocompletion=complete_set,
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Run again what is up to date.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run and why, its size, memory, disk and time; write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no tables; errors still appear.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="A line for every step, and the traceback of a fault.")]
Original = Annotated[
    str | None,
    typer.Option(
        "--original", metavar="MODEL", help="What an artifact is held against. Default: what it was made from."
    ),
]
MaxMeanKl = Annotated[
    float | None,
    typer.Option(
        "--max-mean-kl", metavar="NATS", help="Exit with code 3 where the mean KL between them is above this."
    ),
]
DiagnoseBy = Annotated[
    str,
    typer.Option(
        "--by",
        metavar="block|linear",
        help="What is put back at a time.",
        autocompletion=lambda incomplete: [name for name in ("block", "linear") if name.startswith(incomplete)],
    ),
]
DiagnoseWindows = Annotated[
    int, typer.Option("--windows", metavar="INTEGER", min=2, help="Windows of held-out text that are measured on.")
]
DiagnoseTokens = Annotated[int, typer.Option("--seq-len", metavar="INTEGER", min=16, help="Tokens in a window.")]
ZooOut = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Directory of the page and the artifacts. Default: FILE's name with -out."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS|auto",
        help="Convert on a Ray cluster: its address, or the one that this machine is in. Needs the package ray.",
    ),
]
ZooJunit = Annotated[
    Path | None, typer.Option("--junit", metavar="PATH", help="File of JUnit XML with the conditions of all models.")
]
ZooSummary = Annotated[
    Path | None, typer.Option("--summary", metavar="PATH", help="File of Markdown with the table and all figures.")
]
COMMON: Mapping[str, Any] = {
    "effort": (Effort, None),
    "files": (ConfigFiles, None),
    "sets": (Sets, None),
    "fresh": (Fresh, False),
    "dry_run": (DryRun, False),
    "as_json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
}


def option_help(option: Option) -> str:
    """An option's help with what its declaration implies: the range and the default."""
    parts = [option.help]
    if option.kind in ("integer", "number") and option.default is not None:
        parts.append(f"{option.allowed[:1].upper()}{option.allowed[1:]}.")
    if option.default not in (None, [], False):
        default = ", ".join(option.default) if option.repeatable else option.default
        parts.append(f"Default: {default}.")
    return " ".join(parts)


def _flag_of(option: Option) -> Any:
    """The typer annotation of an option. Values stay text: the config checks them, and says what is wrong."""
    declared = f"{option.flag}/--no-{option.flag.removeprefix('--')}" if option.kind == "boolean" else option.flag
    kind: Any = bool if option.kind == "boolean" else list[str] if option.repeatable else str
    flag = typer.Option(
        declared,
        metavar=None if option.kind == "boolean" else "|".join(option.choices) or option.kind.upper(),
        help=_literally(option_help(option)),
        rich_help_panel=f"{option.section.capitalize()}: {_summary(option.section)}",
        autocompletion=_completer_of(option),
    )
    return Annotated[kind | None, flag]


def _summary(section: str) -> str:
    return (sections()[section].__doc__ or "").splitlines()[0].rstrip(".").lower()


@dataclass(frozen=True)
class Call:
    """One call of a command that takes the configuration's flags."""

    console: Console
    model: str | None
    files: Sequence[str]
    sets: Sequence[str]
    flags: Mapping[str, Any]
    fresh: bool
    dry_run: bool
    as_json: bool
    effort: str | None = None
    original: str | None = None

    def config(self, model: str | None = None) -> Config:
        return load_config(model or self.model, [*presets_of(self.effort), *self.files], self.sets, self.flags)


def configured(body: Callable[[Call], T], extra: Mapping[str, Any] | None = None) -> Callable[..., T]:
    """A typer command with a flag for every option, which gathers what was given and calls `body`."""
    names = {option.key.replace(".", "_"): option.key for option in options()}
    flags = {option.key.replace(".", "_"): (_flag_of(option), None) for option in options()}
    accepted = {"model": (Model, None), **COMMON, **(extra or {}), **flags}

    def command(ctx: typer.Context, **values: Any) -> T:
        console: Console = ctx.obj
        console.quiet, console.verbose = values.pop("quiet"), values.pop("verbose")
        flags = {key: value for name, key in names.items() if (value := values.pop(name)) not in (None, [])}
        files, sets = values.pop("files") or [], values.pop("sets") or []
        return body(Call(console=console, files=files, sets=sets, flags=flags, **values))

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in accepted.items()
    ]
    command.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *parameters)}
    return command
