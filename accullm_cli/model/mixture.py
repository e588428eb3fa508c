"""What `--calibration` asks for: one source of text, or several with a share of the windows each."""

from __future__ import annotations

import os
from collections.abc import Mapping

from accullm_cli.errors import AccullmError
from accullm_cli.values import parse_fraction

WHERE = "--calibration"
# Sources that the model itself writes: texts that begin anywhere, and chats through its template.
SAMPLED = ("self", "self-chat")
# Of how it writes them.
SAMPLED_VERSION = 2


def calibration_shares(text: str) -> dict[str, float]:
    """The sources of "SOURCE,SOURCE=25%,...", in order, and their shares, which make 1 together.

    What shares leave is divided equally among the sources that have none. A file may have commas in its name.

    Raises:
        AccullmError: a source comes twice, or the shares do not make a whole.
    """
    if os.path.isfile(text):
        return {text: 1.0}
    given: dict[str, float | None] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, share = part.rpartition("=")
        is_share = bool(equals) and share.endswith("%")  # a path may hold an equals sign, too
        source = name.strip() if is_share else part
        if source in given:
            raise AccullmError(f"{source} is given twice", WHERE, "give it once")
        given[source] = _fraction(part, share) if is_share else None
    if not given:
        raise AccullmError("names no text", WHERE, "give 'default', or leave it out")
    total = sum(share or 0.0 for share in given.values())
    without = [source for source, share in given.items() if share is None]
    left = 1 - total
    if without and left < 1e-9:
        raise AccullmError(f"the other shares leave nothing for {without[0]}", WHERE, "give it a share")
    if not without and abs(left) > 1e-9:
        hint = "make them 100%, or leave one source without a share for the rest"
        raise AccullmError(f"the shares make {total:.4g} of 1", WHERE, hint)
    return {source: left / len(without) if share is None else share for source, share in given.items()}


def _fraction(part: str, share: str) -> float:
    value = parse_fraction(share)
    if not isinstance(value, float) or not 0 < value <= 1:
        raise AccullmError(f"{part} has no share between 0 and 100%", WHERE, "write SOURCE=25%")
    return value


def window_counts(text: str, samples: int) -> dict[str, int]:
    """How many of the windows are of which source.

    Raises:
        AccullmError: as above, or a share is less than a window.
    """
    shares = calibration_shares(text)
    counts = apportion(shares, samples)
    if (empty := next((source for source, count in counts.items() if not count), None)) is not None:
        what = f"{shares[empty]:.4g} of {samples} windows is none, for {empty}"
        raise AccullmError(what, WHERE, "give it a larger share, or more --samples")
    return counts


def apportion(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole numbers in proportion to the shares that add up to `count` (largest remainders)."""
    whole = {kind: int(share * count) for kind, share in shares.items()}
    by_remainder = sorted(shares, key=lambda kind: whole[kind] - shares[kind] * count)
    for kind in by_remainder[: count - sum(whole.values())]:
        whole[kind] += 1
    return whole
