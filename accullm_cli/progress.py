"""Progress is a callback that takes events; the console draws them, a library user sees nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from accullm_cli.run import Reason

Kind = Literal["start", "step", "skip", "end", "record"]


@dataclass(frozen=True)
class Event:
    """One thing that happened in a stage.

    kind: "start" (the stage begins; `total` steps follow), "step" (step `done` of `total` is finished),
    "skip" (the stage or the step named in `label` is up to date), "end" (the stage is finished),
    "record" (something was treated differently from the plan; `label` is the sentence).
    """

    stage: str
    kind: Kind
    label: str = ""
    reason: Reason | None = None
    done: int = 0
    total: int = 0


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The progress callback of a caller who asked for none."""
