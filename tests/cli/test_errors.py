"""Each error is one line and an exit code, whoever made it."""

from __future__ import annotations

import errno

import pytest

from accullm_cli.errors import AccullmError, MachineError


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["convrt", "m"], "accullm: no such command 'convrt'; did you mean 'convert'?"),
        (["qqq"], "accullm: no such command 'qqq'; see accullm --help"),
        (["convert", "m", "--bist", "4"], "accullm convert: no such option --bist; did you mean --bits?"),
        (["convert", "m", "--qqq"], "accullm convert: no such option --qqq; see accullm convert --help"),
        (["convert", "m", "n"], "accullm convert: got unexpected extra argument(s) (n); see accullm convert --help"),
        (["convert", "m", "--bits"], "accullm: option '--bits' requires an argument; see accullm --help"),
        (["inspect"], "accullm inspect: missing argument 'PATH'; see accullm inspect --help"),
        (["convert", "m", "--bits", "9"], "--bits: 9 is above 8; give 2 to 8"),
        (["convert", "m", "--set", "bits=4"], "--set bits: unknown key; did you mean plan.bits?"),
        (["convert", "m", "--config", "fsat"], "--config: fsat is neither a file nor a preset; did you mean fast?"),
        (
            ["convert"],
            "MODEL: not given; name a directory, a GGUF file, a hub id or an alias, "
            "or set `model` in the --config file",
        ),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(accullm, arguments, line):
    assert accullm(*arguments) == (2, "", f"error: {line}\n")


def test_no_command_at_all_shows_the_help_and_exits_with_2(accullm):
    code, out, err = accullm()
    assert (code, err) == (2, "")
    assert "Usage: accullm" in out


# -- errors ------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


MEMORY = (
    "out of memory; give fewer --samples or a shorter --seq-len, or free memory, "
    "and run the same command again to resume"
)


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (AccullmError("holds NaN", "norm.weight", "download it again"), 2, "norm.weight: holds NaN; download it again"),
        (AccullmError("two\nlines"), 2, "two lines"),
        (MachineError("full", "/x", "free some"), 4, "/x: full; free some"),
        (MemoryError(), 4, MEMORY),
        (OutOfMemoryError("CUDA out of memory."), 4, MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 4, MEMORY),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", 300 * "a"),
            2,
            f"{80 * 'a'}…: no file can have a name that long; check its spelling",
        ),
        (
            KeyError("x"),
            1,
            "KeyError: 'x'; this is a fault of accullm; run with --verbose for the traceback",
        ),
        (
            RuntimeError("a\nb"),
            1,
            "RuntimeError: a b; this is a fault of accullm; run with --verbose for the traceback",
        ),
    ],
)
def test_a_failure_is_one_line_with_its_exit_code(accullm, pipeline, failure, code, line):
    pipeline.failure = failure
    assert accullm("convert", "m", "--quiet") == (code, "", f"error: {line}\n")


def test_a_full_disk_is_the_machines_limit_whoever_noticed_it(accullm, pipeline, tmp_path):
    pipeline.failure = OSError(28, "No space left on device", str(tmp_path))
    code, _, err = accullm("convert", "m", "--quiet")
    assert code == 4
    assert err.startswith(f"error: {tmp_path}: no space left on the disk (")


def test_verbose_shows_the_traceback_of_a_fault(accullm, pipeline):
    pipeline.failure = KeyError("x")
    code, out, err = accullm("convert", "m", "--verbose")
    assert (code, out) == (1, "")
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: KeyError: 'x'; this is a fault of accullm; please report it with the traceback above\n")
