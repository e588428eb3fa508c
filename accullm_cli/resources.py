"""Where the files that are not Python lie: `configs/` and `cuda/`, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from accullm_cli.errors import AccullmError

PACKAGE = Path(__file__).resolve().parent


def resource(*parts: str) -> Path:
    """The path of a packaged file or folder: `resource("configs", "fast.yaml")`, `resource("cuda")`.

    A wheel carries them in `accullm_cli/_data`; a checkout has them beside the package.

    Raises:
        AccullmError: it is in neither place.
    """
    for root in (PACKAGE / "_data", PACKAGE.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise AccullmError("missing from this installation", "/".join(parts), "install accullm again")
