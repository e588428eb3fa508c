"""Reports as JUnit XML, which test dashboards read: each condition is a test, and each part that a measure names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from accullm_cli.measure.measurement import Group
from accullm_cli.measure.result import Clause, Report
from accullm_cli.run import write_text

# What XML 1.0 cannot hold, not even escaped (https://www.w3.org/TR/xml/#charsets).
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(reports: Sequence[Report], path: Path) -> None:
    """Raises MachineError where it cannot be written."""
    write_text(path, junit(reports))


def junit(reports: Sequence[Report], models: Sequence[Group] = ()) -> str:
    """One document; a suite for each contract, and one for each measure that names parts.

    Args:
        models: those of which there are no reports.
    """
    suites = ElementTree.Element("testsuites", name="accullm")
    if models:
        _suite(suites, "zoo", "models", models)
    for report in reports:
        if report.contract:
            _suite(suites, report.artifact, "contract", [_of_clause(clause) for clause in report.contract])
        for found in report.measurements:
            if found.groups:
                _suite(suites, report.artifact, found.measure, found.groups)
    ElementTree.indent(suites)
    return f"<?xml version='1.0' encoding='utf-8'?>\n{ElementTree.tostring(suites, encoding='unicode')}\n"


def _of_clause(clause: Clause) -> Group:
    said = f"measured {clause.told}"
    return Group(clause.text, failure="" if clause.met else said, output=(said,))


def _suite(suites: ElementTree.Element, place: str, name: str, tests: Sequence[Group]) -> None:
    counts = {
        "tests": len(tests),
        "failures": sum(bool(test.failure) for test in tests),
        "skipped": sum(bool(test.skipped) for test in tests),
    }
    suite = ElementTree.SubElement(suites, "testsuite", name=_clean(f"{place}: {name}"))
    suite.attrib.update({key: str(count) for key, count in counts.items()})
    for test in tests:
        case = ElementTree.SubElement(suite, "testcase", classname=f"accullm.{name}", name=_clean(test.name))
        if test.failure:
            ElementTree.SubElement(case, "failure", message=_clean(test.failure)).text = _clean("\n".join(test.output))
        elif test.skipped:
            ElementTree.SubElement(case, "skipped", message=_clean(test.skipped))
        if test.output:
            ElementTree.SubElement(case, "system-out").text = _clean("\n".join(test.output))


def _clean(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
