"""Progress is a callback that takes events; the console draws them, a library user sees nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from accullm_cli.run import UP_TO_DATE, Reason

# Of records that say the same of many things, as many are shown where all of them would hide the rest.
SHOWN = 4

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


class Pace:
    """How far a stage is, and how long the rest of its steps will take if they take as long as those before.

    A stage may count several things in turn (blocks, then gradients): each is timed for itself, and steps that were
    up to date are no measure. Times are seconds of one clock.
    """

    def __init__(self, now: float) -> None:
        self.started = self._since = self._last = now
        self._done_before = 0
        self.step: Event | None = None

    def advance(self, step: Event, now: float) -> None:
        """Take note of a finished step."""
        if self.step is None or _counted(step) != _counted(self.step) or step.done < self.step.done:
            self._since, self._done_before = self._last, 0
        if step.kind == "skip" or step.reason == UP_TO_DATE:
            self._since, self._done_before = now, step.done
        self.step, self._last = step, now

    def seconds_left(self, now: float) -> float | None:
        """Of the steps that are still to come; None if nothing is known yet, or if what is left is no step."""
        if self.step is None or not self._done_before < self.step.done < self.step.total:
            return None
        each = (self._last - self._since) / (self.step.done - self._done_before)
        coming = self.step.total - self.step.done
        # A step that takes longer than those before leaves at least all that are behind it.
        return max(each * coming - (now - self._last), each * (coming - 1), 0.0)


def _counted(step: Event) -> tuple[str, int]:
    """What a step is one of: "block /", of 30."""
    return re.sub(r"\d+", "", step.label) if step.total else "", step.total


# -- records -----------------------------------------------------------------------------------------------


def alike(record: str) -> str:
    """The same text for all records that differ in names and numbers alone."""
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", re.sub(r"\b[A-Za-z_]\w*(\.\w+)+", "NAME", record))


def grouped(records: Sequence[str]) -> list[list[str]]:
    """The records, those that are alike together, in the order of their first ones."""
    groups: dict[str, list[str]] = {}
    for record in records:
        groups.setdefault(alike(record), []).append(record)
    return list(groups.values())
