"""Where machine code is kept."""

from __future__ import annotations

import pytest

from accullm_cli.quant import compiled


def test_without_a_place_for_machine_code_it_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba refuses to decorate where neither the package's directory nor the user's can be written to."""
    made: list[dict[str, object]] = []

    def njit(**options: object):  # type: ignore[no-untyped-def]
        made.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'double': no locator available")
        return lambda function: function

    monkeypatch.setattr(compiled.numba, "njit", njit)
    assert compiled.compiled(lambda value: 2 * value)(21) == 42
    assert [bool(options.get("cache")) for options in made] == [True, False]
