"""Rows of text from a dataset on the hub. Scripts of datasets, which are Python code, are never run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from accullm_cli.errors import AccullmError


def hub_rows(text: str, characters: int, seed: int) -> list[str]:
    """Rows of a dataset on the hub, enough for `characters`.

    Args:
        text: "hub:NAME[:COLUMN]".

    Raises:
        AccullmError: the package datasets is missing, or the dataset cannot be had, has no such column, or is a script.
    """
    name, _, column = text.removeprefix("hub:").partition(":")
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise AccullmError("needs the package datasets", text, "pip install datasets") from None
    rows: list[str] = []
    length = 0
    try:
        dataset: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            name, split="train", streaming=True, **_no_code(datasets.load_dataset)
        ).shuffle(seed=seed, buffer_size=1_000)
        for row in dataset:
            key = column or next((key for key, value in row.items() if isinstance(value, str)), "text")
            if not isinstance(row.get(key), str):
                columns = ", ".join(row)
                raise AccullmError(f"has no text column {key}", text, f"its columns are {columns}")
            rows.append(row[key])
            length += len(row[key])
            if length >= characters:
                break
    except (OSError, ValueError, RuntimeError) as error:
        if _needs_code(error):
            raise AccullmError(
                "the dataset is a script, Python code that is never run", text, "give one in Parquet or JSON, or a file"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AccullmError(
            f"the dataset cannot be had ({reason})", text, "connect to the network, or give a local file"
        ) from None
    return rows


def _no_code(load_dataset: Callable[..., Any]) -> dict[str, bool]:
    """What tells `load_dataset` to run no code of a dataset. From version 4 on it never does."""
    return {"trust_remote_code": False} if "trust_remote_code" in inspect.signature(load_dataset).parameters else {}


def _needs_code(error: Exception) -> bool:
    """Whether this is how datasets says that a dataset is a script: before version 4, and from then on."""
    return "trust_remote_code" in str(error) or "Dataset scripts are no longer supported" in str(error)
