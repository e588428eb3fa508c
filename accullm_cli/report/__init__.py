"""What a conversion leaves for people and programs to read: report.html and report.json."""

from accullm_cli.report.html import write_report
from accullm_cli.report.schema import from_json, to_json

__all__ = ["from_json", "to_json", "write_report"]
