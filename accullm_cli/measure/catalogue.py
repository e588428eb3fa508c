"""Every figure that a condition can name, known before anything is measured and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """What there is to know of a figure before it is measured.

    interval: whether it comes with a 95% interval, so that .low and .high can be asked for.
    share: whether it lies between 0 and 1, and may be given in percent.
    better: which way an artifact with less loss moves it; "" where it says nothing of loss.
    power: its distance from the best value grows as the loss to this power, where losses are small.
    parts: whether NAME.PART names the same figure of a part of what was measured.
    needs: the flag without which it is not measured.
    worse_end: whether a search for the smallest plan holds the worse end of the interval against a limit: it stops
        right there, and on other text a figure is as likely to be worse as to be better.
    """

    name: str
    interval: bool = False
    share: bool = False
    better: Literal["", "lower", "higher"] = ""
    power: float = 1.0
    parts: bool = False
    needs: str = ""
    worse_end: bool = True


# Next-token distributions on text. The share of tokens that change places grows as the root of the loss.
DIVERGENCE = (
    Kind("mean_kl", interval=True, better="lower"),
    Kind("kl_p99", interval=True, better="lower"),
    Kind("kl_p999", interval=True, better="lower"),
    Kind("top1_agreement", interval=True, share=True, better="higher", power=0.5),
    Kind("perplexity", interval=True, better="lower"),
    Kind("kl_max", better="lower"),
    Kind("perplexity_ratio", better="lower"),
)
# Answers to exact tasks. How many are lost as the loss grows is told by the margins of all, not by a few that flip; on
# the few whose whole answers are compared, an interval's worse end would miss every limit worth giving.
TASKS = (
    Kind("retention", True, True, "higher", 0.5, parts=True, needs="--tasks", worse_end=False),
    Kind("exact_match", True, True, "higher", 0.5, parts=True, needs="--tasks"),
    Kind("agreement", True, True, "higher", 0.5, parts=True, needs="--tasks", worse_end=False),
)
# What needs no forward pass.
SIZE = (Kind("bits_per_weight"), Kind("artifact_bytes"), Kind("fallbacks"))

KINDS = {kind.name: kind for kind in (*DIVERGENCE, *TASKS, *SIZE)}
