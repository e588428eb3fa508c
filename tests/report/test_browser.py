"""The pages in a real browser: no error, no request, readable in both themes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from accullm_cli.measure.fidelity import divergence_found_elsewhere, speed_found
from accullm_cli.measure.retention import retention_found
from accullm_cli.report.html import render
from accullm_cli.report.outlier_map import draw_outlier_map
from accullm_cli.report.page import DARK, LIGHT
from tests.measure.test_retention import CODE, SQL, text_of
from tests.samples import FIDELITY, SPEED, a_report, inputs, linear, plan_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
THEMES = {"light": LIGHT, "dark": DARK}


@dataclass(frozen=True)
class Visit:
    """What a browser told of a page. requests: its own, by address; picture: [height, width, 3], 0 to 1."""

    console: list[str]
    requests: list[str]
    picture: np.ndarray


def visit(page: Path, theme: str, place: Path) -> Visit:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={place / 'profile'}", "--window-size=1000,5000", "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={int(theme == 'light')}",
        "--enable-logging=stderr", f"--log-net-log={place / 'net.json'}", f"--screenshot={place / 'page.png'}",
        page.as_uri(),
    ]  # fmt: skip
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr
    log = json.loads((place / "net.json").read_text())
    begins = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [event["params"] for event in log["events"] if event["type"] == begins and "url" in event.get("params", {})]
    return Visit(
        console=re.findall(r'INFO:CONSOLE\S* "(.*)", source', told),
        # The browser's own requests have no page behind them.
        requests=[request["url"] for request in begun if request.get("initiator") != "not an origin"],
        picture=imread(place / "page.png")[..., :3],
    )


def write_full_report(path: Path) -> None:
    report = a_report(records=("a record",))
    linears = tuple(
        linear(f"model.layers.{block}.{kind}", bits=16 if (block, kind) == (3, "down") else 4 + block % 2)
        for block in range(6)
        for kind in ("q", "k", "v", "o", "gate", "up", "down", "other")
    )
    held = [replace(entry, agrees=entry.question.prompt[1] != 3) for entry in SQL]
    found = retention_found([*held, *CODE], text_of, 0)
    more = (divergence_found_elsewhere("other text", FIDELITY), found, speed_found(SPEED))
    path.write_text(render(replace(report, linears=linears, measurements=(*report.measurements, *more))), "utf-8")


def write_outlier_map(path: Path) -> None:
    draw_outlier_map(inputs(), plan_of(inputs()), path)


PAGES: dict[str, Callable[[Path], None]] = {"report": write_full_report, "outlier map": write_outlier_map}


@needs_browser
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_complains_of_nothing_and_has_the_themes_colours(
    name: str, theme: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    PAGES[name](page)
    seen = visit(page, theme, tmp_path)
    assert (seen.console, seen.requests) == ([], [])
    paper, ink = (np.array(rgb(THEMES[theme][of])) for of in ("paper", "ink"))
    assert np.abs(seen.picture[0, 0] - paper).max() < 0.01
    # Most of it is paper, whatever lies on it, and some of it is ink.
    assert (np.abs(seen.picture - paper).max(-1) < 0.01).mean() > 0.5
    assert (np.abs(seen.picture - ink).max(-1) < 0.01).sum() > 1000


@needs_browser
def test_what_is_looked_for_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<!DOCTYPE html><img src="http://127.0.0.1:9/a.png"><script>console.error("it says so"); missing()</script>'
    )
    seen = visit(page, "light", tmp_path)
    assert seen.requests == ["http://127.0.0.1:9/a.png"]
    assert seen.console == ["it says so", "Uncaught ReferenceError: missing is not defined"]


@pytest.mark.parametrize("theme", THEMES)
def test_text_stands_out_from_what_is_behind_it(theme: str) -> None:
    """At least 4.5 to 1 for text, 3 to 1 for lines that say something (WCAG 2.2, 1.4.3 and 1.4.11)."""
    colours = THEMES[theme]
    for text in ("ink", "soft", "good", "bad"):
        assert contrast(colours[text], colours["paper"]) >= 4.5
    for behind in ("right", "wrong"):
        assert contrast(colours["ink"], colours[behind]) >= 4.5
    assert contrast(colours["blue"], colours["paper"]) >= 3


def rgb(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted(map(luminance, (first, second)))
    return (lighter + 0.05) / (darker + 0.05)
