"""The short forms of a report: the list of its checks, Markdown for people, JUnit for CI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from ..settings import format_size

Check = tuple[str, bool, str]  # name, whether it holds, what was found


def checks(report: Mapping[str, Any]) -> list[Check]:
    """Every check that a bundle must pass, in one list for verdict, Markdown and JUnit."""
    tokenizer = report["tokenizer"]
    equal = report["errors"]["file"]["codes_equal"]
    found = [
        (
            "file holds the codes",
            equal,
            "read back bit for bit" if equal else "the file's codes differ from the checkpoint's",
        ),
    ]
    words = f"{tokenizer['checked']} texts compared with the source tokenizer"
    found.append(("tokenizer conforms", tokenizer["conforms"], words))
    found += [(f"budget {one['metric']}", one["ok"], one["message"]) for one in report["budgets"]]
    refused = [one["message"] for one in report["findings"] if one["level"] == "refused"]
    return found + [("platform accepts it", False, words) for words in refused]


def markdown(report: Mapping[str, Any]) -> str:
    """A summary for a pull request or a job page."""
    model = report["model"]
    verdict = "passed" if report["passed"] else "FAILED"
    lines = [
        f"## {_cell(model['name'])} for {report['target']}: {verdict}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _figures(report)),
        "",
        "| check | | found |",
        "|---|---|---|",
        *(
            f"| {name} | {'ok' if ok else '**failed**'} | {_cell(words)} |"
            for name, ok, words in checks(report)
        ),
        "",
        *(f"- Executed: {words}" for words in report["executed"]),
        *(f"- Not executed: {words}" for words in report["not_executed"]),
        *(f"- {finding['message']} ({finding['source']})" for finding in report["findings"]),
        *(f"- {note}" for note in report.get("notes", [])),
        *(
            f"- {reason}: {len(names)} of the weights"
            for reason, names in report["fallbacks"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    footprint = report["footprint"]
    figures = [
        ("model file", format_size(footprint["model_bytes"])),
        ("on the device", format_size(footprint["device_bytes"])),
        ("download", format_size(footprint["download_bytes"])),
        ("bits per weight", f"{footprint['bits_per_weight']:.2f}"),
        ("memory, predicted", format_size(footprint["memory_bytes"])),
    ]
    for text, found in report.get("preference", {}).items():
        name = text.replace("_", " ")
        figures += [
            (f"pairs in the same order, {name}", f"{found['pair_agreement']:.2%}"),
            (f"score difference, {name}", f"{found['score_rmse']:.4g} (root mean square)"),
            (
                f"chosen answer ahead, {name}",
                f"{found['accuracy_reference']:.2%} > {found['accuracy']:.2%}",
            ),
        ]
    for text, found in report["accuracy"].items():
        name = text.replace("_", " ")
        figures += [
            (f"mean KL, {name}", f"{found['kl_mean']:.4g} nats"),
            (f"top-1 agreement, {name}", f"{found['top1']:.2%}"),
            (f"perplexity, {name}", f"{found['ppl_reference']:.4g} > {found['ppl']:.4g}"),
        ]
    return figures


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")


def junit(report: Mapping[str, Any]) -> str:
    """JUnit XML with one testcase per check; no times, so that two exports are the same bytes."""
    found = checks(report)
    failures = sum(not ok for _, ok, _ in found)
    suite = ET.Element(
        "testsuite",
        name=f"slimport {report['target']}",
        tests=str(len(found)),
        failures=str(failures),
        errors="0",
        skipped="0",
    )
    for name, ok, words in found:
        case = ET.SubElement(suite, "testcase", classname=suite.attrib["name"], name=name)
        if not ok:
            ET.SubElement(case, "failure", message=words)
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    text: bytes = ET.tostring(suites, encoding="utf-8", xml_declaration=True)
    return text.decode() + "\n"
