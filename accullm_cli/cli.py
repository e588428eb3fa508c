"""The command line: parse, call, print. No logic; what is heavy is imported inside the command that needs it.

Results go to stdout, everything else to stderr. `main` is the one place where errors become a line and an exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.main import get_command

from accullm_cli import __version__
from accullm_cli.config_file import presets_of
from accullm_cli.console import Console, dry_run_text, json_text, text_table
from accullm_cli.errors import EXIT_FAULT, EXIT_MACHINE, EXIT_NOT_SO, EXIT_OK, EXIT_USAGE, AccullmError
from accullm_cli.failure import failure_of, one_line
from accullm_cli.flags import (
    Call,
    ConfigFiles,
    DryRun,
    Effort,
    Fresh,
    Json,
    Original,
    Quiet,
    Ray,
    Verbose,
    ZooJunit,
    ZooOut,
    ZooSummary,
    configured,
)
from accullm_cli.outcome import Outcome, result_of
from accullm_cli.processors import usable_cores
from accullm_cli.questions import (
    compare_command,
    diagnose_command,
    doctor_command,
    inspect_command,
    models_command,
    schema_command,
    verify_command,
)

if TYPE_CHECKING:
    from accullm_cli.measure.result import ModelResult, Report

# Those that say how many compiled products torch and oneDNN keep.
PROGRAMS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
# The variables by which a user says how OpenMP's threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 our fault, 2 usage, 3 it is not so, 4 the machine could not, 130, 143."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    let_waiting_threads_sleep()
    keep_threads_to_the_quota()
    keep_few_compiled_products()
    code = EXIT_OK if words else EXIT_USAGE
    try:
        with _signals():
            result = get_command(app).main(words or ["--help"], "accullm", standalone_mode=False, obj=console)
        if isinstance(result, Outcome):
            console.close()
            code = result.code
            _write(result.text)
        elif result:
            code = int(result)
    except (Interrupted, KeyboardInterrupt) as error:
        console.close()
        print("interrupted; run the same command again to resume", file=sys.stderr)
        code = getattr(error, "exit_code", 130)
    except typer.TyperException as error:
        console.error(_usage_line(error))
        code = EXIT_USAGE
    except Exception as error:
        line, code = failure_of(error, console.verbose)
        if console.verbose and not isinstance(error, AccullmError):
            console.close()
            traceback.print_exc()
        console.error(line)
    finally:
        console.close()
    sys.exit(code)


def let_waiting_threads_sleep() -> None:
    """Have torch's threads sleep while they wait for each other, unless the user's environment says how they wait.

    By default they spin for milliseconds, and so take the cores from other processes: two conversions side by side on
    two cores took eight times as long as one after the other. An OpenMP runtime (libgomp, libomp, Intel's) reads the
    environment when it is loaded, so this comes before torch; where torch is there already, nothing is changed.
    Spinning for a shorter time, by GOMP_SPINCOUNT, was no better than not at all. The other threads of a conversion are
    those of a Python pool, which sleep: numba compiles loops, but runs none in parallel.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def keep_threads_to_the_quota() -> None:
    """Have OpenMP start no more threads than a container's CPU quota has cores for, unless the user says how many.

    It knows of affinity alone. A conversion sets its number itself; this is for the commands that only ask.
    """
    if "torch" not in sys.modules and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())


def keep_few_compiled_products() -> None:
    """Have oneDNN, and torch before it, keep the programs of the last few shapes of products, unless the user says.

    They compile one for each, and keep 1,024. Exact tasks have hundreds of lengths: a Llama of 64 features took 1.56 GB
    for 12 items of each default task, and 0.64 GB so. Other stages have two or three lengths, with some 20 shapes.
    Read when torch is loaded and at the first product.
    """
    if "torch" not in sys.modules:
        for name in PROGRAMS:
            os.environ.setdefault(name, "32")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted`; a second one ends the process at once, as the run survives even that."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(text: str) -> None:
    """The result on stdout. A reader that has gone away (`| head`) is no error."""
    try:
        if text:
            print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_line(error: typer.TyperException) -> str:
    """typer's finding in our form: where, what, what to do."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "accullm"
    similar = getattr(error, "possibilities", None)
    message = one_line(error.message if similar else error.format_message()).rstrip(".")
    problem, question, guess = message.partition(". Did you mean ")
    if question:
        hint = f"did you mean {guess}"
    elif similar:
        hint = f"did you mean {similar[0]}?"
    else:
        hint = f"see {where} --help"
    problem = problem.replace("No such option: ", "No such option ")
    return AccullmError(problem[:1].lower() + problem[1:], where, hint).line()


# -- the road and its stages -------------------------------------------------------------------------------


def _convert(call: Call) -> Outcome:
    config = call.config()
    from accullm_cli import pipeline

    if call.dry_run:
        return _dry_run(call, pipeline.dry_run(config, call.console.progress, call.fresh))
    reports = pipeline.convert_all(config, progress=call.console.progress, fresh=call.fresh)
    return _reports(call, reports)


def _stage(name: str) -> Callable[[Call], Outcome]:
    def run(call: Call) -> Outcome:
        config = call.config()
        from accullm_cli import pipeline

        if call.dry_run:
            return _dry_run(call, pipeline.dry_run(config, call.console.progress, call.fresh, name))
        result = pipeline.run_stage(name, config, progress=call.console.progress, fresh=call.fresh)
        if result.reports:
            return _reports(call, result.reports)
        if call.as_json:
            return Outcome(json_text(stage=result))
        return Outcome("\n".join(map(str, result.outputs)) if name == "export" else str(result.run))

    return run


def _validate(call: Call) -> Outcome:
    from accullm_cli.formats import artifact_format

    artifact = Path(call.model or "")
    # Other tools' artifacts have no manifest, but a format of ours.
    is_held = artifact.is_dir() or (call.original is not None and artifact.is_file())
    if call.model is None or not is_held or artifact_format(artifact) is None:
        if call.original is not None:
            raise AccullmError(
                "is not an artifact", call.model or "MODEL", "--original goes with an artifact's directory"
            )
        return _stage("validate")(call)

    if call.dry_run:
        raise AccullmError(
            "is an artifact, which a dry run does not measure", artifact, "leave out --dry-run, or give a model"
        )
    config = call.config(model=call.original or str(artifact))
    from accullm_cli import pipeline

    report = pipeline.validate_artifact(artifact, config, progress=call.console.progress, fresh=call.fresh)
    return _reports(call, (report,))


def _reports(call: Call, reports: Sequence[Any]) -> Outcome:
    """The tables on stderr; on stdout the artifacts' paths, or the reports as JSON."""
    code = EXIT_OK
    for report in reports:
        call.console.report(report)
        if not report.contract_met:
            code = EXIT_NOT_SO
            call.console.error(_missed(report))
    text = json_text(reports=tuple(reports)) if call.as_json else "\n".join(str(report.artifact) for report in reports)
    return Outcome(text, code)


def _missed(report: Report) -> str:
    missed = ", ".join(f"{clause.text} (measured {clause.told})" for clause in report.contract if not clause.met)
    return AccullmError(f"the contract is not met: {missed}", report.artifact).line()


def _dry_run(call: Call, planned: Any) -> Outcome:
    return Outcome(json_text(dry_run=planned) if call.as_json else dry_run_text(planned))


def zoo_command(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The zoo file: a configuration file with `models`.")],
    effort: Effort = None,
    files: ConfigFiles = None,
    out: ZooOut = None,
    ray: Ray = None,
    junit: ZooJunit = None,
    summary: ZooSummary = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> Outcome:
    """Convert many models by one file: a contract for each, one table and one page of results."""
    console: Console = ctx.obj
    console.quiet, console.verbose = quiet, verbose
    from accullm_cli.zoo.file import read_zoo

    zoo = read_zoo(file, [*presets_of(effort), *(files or [])], out)
    if fresh and ray is not None:
        raise AccullmError("begins again where a node is lost, too", "--fresh", "remove the run directories instead")
    from accullm_cli.zoo import conversions

    if dry_run:
        return result_of(as_json, "zoo", conversions.plan_zoo(zoo))
    estimates = conversions.check_zoo(zoo)
    convert = conversions.convert_here(fresh)
    if ray is not None:
        from accullm_cli.zoo.cluster import convert_on_ray

        convert = convert_on_ray(ray, estimates)
    results = conversions.convert_zoo(zoo, convert, console.progress, junit, summary)
    return _zoo_results(console, results, as_json)


def _zoo_results(console: Console, results: Sequence[ModelResult], as_json: bool) -> Outcome:
    """The table on stderr, and below it a line for each model that failed; on stdout the artifacts' paths, or JSON."""
    from accullm_cli.report.zoo import COLUMNS, zoo_rows

    console.close()
    console.note("\n" + text_table(zoo_rows(results), [heading for heading, _ in COLUMNS]))
    for result in results:
        if console.verbose and result.traceback:
            console.note(result.traceback)
        if result.error:
            console.error(f"{result.model}: {result.error}")
        for report in result.reports:
            if not report.contract_met:
                console.error(_missed(report))
    codes = {result.exit_code for result in results}
    # What has to be mended first.
    code = next(code for code in (EXIT_FAULT, EXIT_USAGE, EXIT_MACHINE, EXIT_NOT_SO, EXIT_OK) if code in codes)
    paths = "\n".join(str(report.artifact) for result in results for report in result.reports)
    return Outcome(json_text(zoo=tuple(results)) if as_json else paths, code)


# -- the application ---------------------------------------------------------------------------------------


def _print_version(asked: bool) -> None:
    if asked:
        print(f"accullm {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Convert large language models to 4 bits, and measure how faithful the result is."""


HELP: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "convert": (
        "All stages: reading, calibrate, profile, quantize, export, validate. Prints the artifact's path.",
        (
            "accullm convert work/smollm2-135m",
            "accullm convert llama-3.1-8b --group-size 128 --outliers 1% --out llama-int4",
            "accullm convert work/smollm2-135m --config fast --require 'mean_kl<=0.2'",
            "art=$(accullm convert work/smollm2-135m --quiet)",
        ),
    ),
    "calibrate": (
        "Check the reading of the source, and measure the original on the calibration text. Prints the run directory.",
        ("accullm calibrate work/smollm2-135m --samples 64",),
    ),
    "profile": (
        "Find the outlier features and decide the bits of every linear. Prints the run directory.",
        ("accullm profile work/smollm2-135m --outliers 1%",),
    ),
    "quantize": (
        "Round the weights, block by block. Prints the run directory.",
        ("accullm quantize work/smollm2-135m --rounding nearest",),
    ),
    "export": (
        "Write the artifact from the finished blocks. Prints its path.",
        ("accullm export work/smollm2-135m --format compressed-tensors",),
    ),
    "validate": (
        "Measure an artifact against the original. MODEL is a model, whose run then ends with validation, or the "
        "directory of an artifact. Prints the artifact's path.",
        (
            "accullm validate work/smollm2-135m-int4",
            "accullm validate work/smollm2-135m-int4 --speed",
            "accullm validate work/smollm2-135m-int4 --original work/smollm2-135m --require 'top1_agreement>=0.9'",
        ),
    ),
    "zoo": (
        "Convert many models by one file: shared settings, a contract for each. Ends with one table and one page of "
        "results; what one model lacks does not stop the others. Prints the artifacts' paths.",
        ("accullm zoo zoo.yaml --dry-run", "accullm zoo zoo.yaml --out artifacts", "accullm zoo zoo.yaml --ray auto"),
    ),
    "inspect": ("", ("accullm inspect work/smollm2-135m-int4", "accullm inspect work/smollm2-135m --json")),
    "compare": ("", ("accullm compare first-int4 second-int4 --max-mean-kl 0.05",)),
    "diagnose": (
        "",
        (
            "accullm diagnose work/smollm2-135m-int4",
            "accullm diagnose work/smollm2-135m-int4 --by linear --windows 2 --json",
        ),
    ),
    "verify": ("", ("accullm verify work/smollm2-135m-int4",)),
    "doctor": ("", ("accullm doctor", "accullm doctor --json")),
    "models": ("", ("accullm models",)),
    "schema": ("", ("accullm schema > accullm.schema.json",)),
}


def _application() -> typer.Typer:
    application = typer.Typer(name="accullm", rich_markup_mode="rich", pretty_exceptions_enable=False)
    application.callback(epilog=_epilog(("accullm convert work/smollm2-135m --out work/smollm2-135m-int4",)))(_root)
    stages: dict[str, Callable[..., Outcome]] = {
        "convert": configured(_convert),
        **{name: configured(_stage(name)) for name in ("calibrate", "profile", "quantize", "export")},
        "validate": configured(_validate, {"original": (Original, None)}),
    }
    questions: dict[str, Callable[..., Outcome]] = {
        "zoo": zoo_command,
        "inspect": inspect_command,
        "compare": compare_command,
        "diagnose": diagnose_command,
        "verify": verify_command,
        "doctor": doctor_command,
        "models": models_command,
        "schema": schema_command,
    }
    for name, command in {**stages, **questions}.items():
        help_text, examples = HELP[name]
        application.command(name, help=help_text or command.__doc__, epilog=_epilog(examples))(command)
    return application


def _epilog(examples: Sequence[str]) -> str:
    return "\n".join(["Examples:", *(f"  {example}" for example in examples)])


app = _application()
