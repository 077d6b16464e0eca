"""The ``report`` tool: how every model, language model or not, hands in its result.

Owns: the tool's schema, the judgement of a report (a finding that cites no executed call is refused), what is kept of a
report that stays wrong, and how a final text without the tool becomes a report.
Deliberately does not know: the conversation, how often a model may try again (the loop), whether a finding is true.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from inference.protocol import ToolSpec
from tools.values import SEVERITIES, Finding, JsonObject, Malformed, Report, want, want_strings

REPORT = "report"

REPORT_TOOL = ToolSpec(
    REPORT,
    "Hand in the result and end the task. Call it alone, after you have read the results your findings rest on. Every "
    "finding names in `evidence` the call ids (c1, c2, …) of executed calls that show it; a finding without one is "
    "refused.",
    {
        "type": "object",
        "properties": {
            "summary": {"type": "string", "description": "One to five sentences: the answer to what was asked."},
            "findings": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "string", "description": "Short and stable, for example disk-full-var."},
                        "severity": {"type": "string", "enum": list(SEVERITIES)},
                        "title": {"type": "string"},
                        "detail": {"type": "string", "description": "What the evidence shows, with its numbers."},
                        "evidence": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                        "suggestion": {"type": "string", "description": "The next step for a person. Empty if none."},
                    },
                    "required": ["id", "severity", "title", "detail", "evidence"],
                },
            },
            "notes": {
                "type": "array",
                "items": {"type": "string"},
                "description": "What could not be looked at, and why.",
            },
        },
        "required": ["summary", "findings"],
    },
)


def judged(
    arguments: JsonObject, citable: AbstractSet[str], not_executed: Mapping[str, str]
) -> tuple[Report | None, list[str]]:
    """A report as a model handed it in.

    ``citable``: ids of calls that were executed and whose results the model has been shown; ``not_executed``: why each
    other call that was asked for gave no evidence. Returns ``(report, [])`` or ``(None, problems)``, each problem a
    sentence for the model.
    """
    problems: list[str] = []
    try:
        summary = want(arguments, "summary", str)
        findings = want(arguments, "findings", list, [])
        notes = want_strings(arguments, "notes", ())
    except Malformed as error:
        return None, [str(error)]
    if not summary.strip():
        problems.append("field 'summary' is empty: say in a sentence what was found")
    kept: list[Finding] = []
    for position, document in enumerate(findings):
        finding, problem = _finding(document, position, citable, not_executed)
        if finding is not None:
            kept.append(finding)
        problems.extend(problem)
    if problems:
        return None, problems
    return Report(summary, tuple(kept), "", notes), []


def _finding(
    document: Any, position: int, citable: AbstractSet[str], not_executed: Mapping[str, str]
) -> tuple[Finding | None, list[str]]:
    if not isinstance(document, dict):
        return None, [f"findings[{position}] must be an object, got {type(document).__name__} {document!r:.80}"]
    try:
        finding = Finding.from_json(document)
    except Malformed as error:
        return None, [f"findings[{position}]: {error}"]
    name = f"finding {finding.id!r}"
    if not finding.title.strip():
        return None, [f"{name} has no title"]
    allowed = ", ".join(sorted(citable, key=_order)) or "none yet"
    if not finding.evidence:
        return None, [f"{name} cites no call; name the executed calls that show it (executed calls: {allowed})"]
    problems = []
    for call_id in finding.evidence:
        if call_id in not_executed:
            problems.append(
                f"{name} cites {call_id!r}, which gave no evidence: {not_executed[call_id]} (executed calls: {allowed})"
            )
        elif call_id not in citable:
            problems.append(
                f"{name} cites {call_id!r}, which is not an executed call you have read (executed calls: {allowed})"
            )
    return (None, problems) if problems else (finding, [])


def _order(call_id: str) -> tuple[int, str]:
    return (int(call_id[1:]) if call_id[1:].isdecimal() else 0, call_id)


def salvaged(arguments: JsonObject, citable: AbstractSet[str], not_executed: Mapping[str, str]) -> Report:
    """What can be kept of a report that stays wrong: findings that stand, and a note for each that was refused."""
    summary = arguments.get("summary")
    findings = arguments.get("findings")
    notes = arguments.get("notes")
    kept: list[Finding] = []
    said: list[str] = [text for text in notes if isinstance(text, str)] if isinstance(notes, list) else []
    for position, document in enumerate(findings if isinstance(findings, list) else []):
        finding, problems = _finding(document, position, citable, not_executed)
        if finding is not None:
            kept.append(finding)
        else:
            said.append(f"refused: {'; '.join(problems)}")
    if not isinstance(summary, str) or not summary.strip():
        summary = "The model handed in a report without a summary."
    return Report(summary, tuple(kept), "", tuple(said))


def from_text(text: str) -> Report:
    """The report of a model that answered in prose: no findings, since none of it cites a call."""
    return Report(
        text.strip(),
        notes=(
            "the model answered in text without calling `report`: its answer is the summary, nothing of it is a finding",
        ),
    )
