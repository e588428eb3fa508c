"""What a conversion leaves for people and programs to read: report.html and report.json, and files for other tools."""

from accullm_cli.report.html import write_report
from accullm_cli.report.junit import write_junit
from accullm_cli.report.markdown import write_summary
from accullm_cli.report.schema import from_json, to_json

__all__ = ["from_json", "to_json", "write_junit", "write_report", "write_summary"]
