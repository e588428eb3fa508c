"""AccuLLM: convert large language models to 4 bits, and measure how faithful the result is.

from accullm_cli import Config, convert
report = convert(Config(model="work/smollm2-135m"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accullm_cli.config import Config as Config
    from accullm_cli.config_file import load_config as load_config
    from accullm_cli.errors import AccullmError as AccullmError
    from accullm_cli.measure.result import Report as Report
    from accullm_cli.pipeline import convert as convert
    from accullm_cli.progress import Event as Event

__version__ = "0.1.0"

_HOMES = {
    "AccullmError": "accullm_cli.errors",
    "Config": "accullm_cli.config",
    "Event": "accullm_cli.progress",
    "Report": "accullm_cli.measure.result",
    "convert": "accullm_cli.pipeline",
    "load_config": "accullm_cli.config_file",
}
__all__ = ["AccullmError", "Config", "Event", "Report", "convert", "load_config"]


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: `accullm --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
