"""Following a run in the terminal, and printing what came of it.

Owns: which events are shown while a run goes on, and the report at its end.
Deliberately does not know: how a run is made; it reads stored events, so it follows a run of another process as well.
"""

from __future__ import annotations

import asyncio
from typing import Any

from rich.text import Text

from supervisor.audit.kinds import machine_chain
from supervisor.audit.verify import verify
from supervisor.cli.output import SEVERITY_STYLE, STATE_STYLE, err, out, plain, seconds, styled
from supervisor.runs.result import call_row, result_document
from supervisor.runs.services import Services
from supervisor.runs.verdict import Executed, calls_of
from supervisor.store.events import RunEvent
from supervisor.store.runs import Run
from tools.values import SEVERITIES, Event, JsonObject

# How often the stored events are looked at, seconds: fast enough to feel live.
LOOK_S = 0.05
MARKS = {"ok": "✓", "info": "i", "warning": "!", "critical": "✗"}
DECISIONS = {"allow": "green", "ask": "yellow", "deny": "red"}


class Progress:
    """Prints events of one run to stderr as they come; ``quiet`` prints nothing."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._seen: list[RunEvent] = []
        self._stages: dict[str, float] = {}
        self._text = ""

    async def follow(self, services: Services, run_id: str) -> Run:
        """Show events until the run is sealed; returns the run."""
        after = 0
        while True:
            fresh = await asyncio.to_thread(services.store.events.events, run_id, after)
            for event in fresh:
                after = event.seq
                self.tell(event)
            if any(event.kind == "sealed" for event in fresh):
                return await asyncio.to_thread(services.store.runs.get, run_id)
            await asyncio.sleep(LOOK_S)

    def tell(self, event: RunEvent) -> None:
        """Show one event."""
        self._seen.append(event)
        if not self._quiet:
            self._show(event)

    def _line(self, mark: str, text: Text | str, style: str = "") -> None:
        shown = text if isinstance(text, Text) else styled(text, style)
        err.print(Text(f"  {mark} ", "dim") + shown)

    def _show(self, event: RunEvent) -> None:
        body = event.body
        if event.kind == "stage.started":
            self._stages[str(body.get("stage"))] = event.at
        elif event.kind == "stage.ended":
            self._flush_text()
            self._line("·", f"{body.get('stage')}  {seconds(body.get('seconds'))}", "dim")
        elif event.kind == "plan":
            runbook = f", runbook {body['runbook']}" if body.get("runbook") else ""
            self._line("·", f"model {body.get('model')}{runbook} ({body.get('why')})", "dim")
        elif event.kind == "state":
            style = STATE_STYLE.get(str(body.get("state")), "bold")
            self._line("▸", str(body.get("state")), style)
        elif event.kind == "text":
            self._text += str(body.get("text", ""))
            if "\n" in self._text:
                self._flush_text()
        elif event.kind == "call.finished":
            self._flush_text()
            self._show_call(str(body.get("call_id")))
        elif event.kind == "inference.finished":
            self._flush_text()
            usage = body.get("usage") or {}
            tokens = f"{usage.get('input_tokens', 0)}+{usage.get('output_tokens', 0)} tokens"
            error = (body.get("error") or {}).get("message")
            text = f"{body.get('inference_id')} inference  {tokens}  {seconds((body.get('duration_ms') or 0) / 1000)}"
            self._line("∙", text + (f"  {error}" if error else ""), "red" if error else "dim")
        elif event.kind == "note":
            self._line("∙", str(body.get("text")), "yellow")

    def _flush_text(self) -> None:
        if self._text.strip():
            self._line("“", self._text.strip(), "italic")
        self._text = ""

    def _show_call(self, call_id: str) -> None:
        worker = [Event(int(e.key or 0), e.kind, e.body) for e in self._seen if e.source == "worker"]
        call = calls_of(worker).get(call_id)
        if call is not None:
            self._line("•", call_line(call))


def call_line(call: Executed) -> Text:
    """One tool call on one line: id, decision, what ran, how long, how it ended."""
    row = call_row(call)
    words = " ".join(row["argv"]) or " ".join(f"{k}={v}" for k, v in call.arguments.items())
    more = len(row["steps"]) - 1
    line = Text(f"{call.call_id:<4}") + Text(
        f"{row['decision'] or '?':<6}", DECISIONS.get(row["decision"] or "", "red")
    )
    line += styled(f"{call.tool:<18} ") + styled(words[:80] + (f" (+{more} more)" if more > 0 else ""), "dim")
    if call.executed:
        line += styled(f"  {seconds((row['duration_ms'] or 0) / 1000)}", "dim")
    else:
        line += styled(f"  {row['reason'] or 'not executed'}", "yellow")
    return line


def print_report(document: JsonObject) -> None:
    """The result for people: verdict, summary, findings with evidence, what it took, the proof that nothing runs."""
    state = str(document["state"])
    out.print()
    head = Text(state, STATE_STYLE.get(state, "bold")) + styled(f"  {document['machine']}  {document['run_id']}", "dim")
    out.print(head)
    if document.get("error"):
        error = document["error"]
        out.print(styled(f"  {error.get('message')}", "red"))
        if error.get("next"):
            out.print(styled(f"  next: {error['next']}", "dim"))
    elif state != "succeeded" and document.get("reason"):
        out.print(styled(f"  {document['reason']}"))
    if document.get("summary"):
        out.print()
        out.print(styled(document["summary"]))
    findings = sorted(document["findings"], key=lambda finding: -SEVERITIES.index(finding["severity"]))
    if findings:
        out.print()
    for finding in findings:
        _print_finding(finding)
    for refused in document["refused_findings"]:
        out.print(styled(f"  refused: {refused['title']} ({refused['why']})", "yellow"))
    for note in document["notes"]:
        out.print(styled(f"  note: {note}", "dim"))
    _print_facts(document)


def _print_finding(finding: JsonObject) -> None:
    severity = str(finding["severity"])
    style = SEVERITY_STYLE[severity]
    line = Text(f"  {MARKS[severity]} ", style) + Text(f"{severity:<9}", style) + styled(finding["title"], "bold")
    out.print(line + styled(f"  [{', '.join(finding['evidence'])}]", "dim"))
    for name, text_style in (("detail", ""), ("suggestion", "cyan")):
        if finding.get(name):
            prefix = "→ " if name == "suggestion" else ""
            out.print(styled(f"      {prefix}{finding[name]}", text_style))


def _print_facts(document: JsonObject) -> None:
    took = document["seconds"]
    parts = [f"{stage} {seconds(took[stage])}" for stage in took if took[stage] is not None]
    out.print()
    out.print(styled("  time    " + "  ".join(parts), "dim"))
    tokens = document["tokens"]
    if document["model"] not in (None, "runbook"):
        cost = "unknown" if document["cost_usd"] is None else f"{document['cost_usd']:.4f} USD"
        out.print(
            styled(f"  model   {document['model']}  {tokens['input']}+{tokens['output']} tokens  cost {cost}", "dim")
        )
    if document["unit_after"] is not None:
        proven = document["unit_after"] in ("inactive", "not-started") and document["processes_after"] == 0
        text = f"  unit    {document['unit_after']}, {document['processes_after']} processes"
        out.print(styled(text, "green" if proven else "red"))
    audit = document["audit"]
    gaps = audit["gaps"]
    said = f"  audit   chain {'verified' if audit['verified'] else 'BROKEN'}, {audit['records']} records"
    said += ", journal equals stream" if not gaps else f", {len(gaps)} gaps between journal and stream"
    out.print(styled(said, "green" if audit["verified"] and not gaps else "red"))
    for gap in gaps[:10]:
        out.print(styled(f"          {gap.get('kind')}: {gap.get('message')}", "red"))
    trace = document["trace"]
    spans = "not in MLflow yet" if trace["spans"] is None else f"{trace['spans']} spans in MLflow"
    out.print(styled(f"  trace   {trace['trace_id']}  {spans}  {trace['mlflow_url'] or ''}".rstrip(), "dim"))


async def result_of(services: Services, run: Run, spans: int | None, mlflow_url: str | None) -> JsonObject:
    """The run's result document, with the machine's audit chain verified now."""
    events = await asyncio.to_thread(services.store.events.streamed, run.id)

    def audited() -> tuple[bool, int]:
        report = verify(services.ledger, machine=run.machine)
        records = len(services.ledger.records(chain=machine_chain(run.machine), run_id=run.id))
        return report.verified, records

    verified, records = await asyncio.to_thread(audited)
    return result_document(run, events, verified=verified, records=records, spans=spans, mlflow_url=mlflow_url)


def one_line(text: Any, width: int = 60) -> str:
    """The first line of ``text``, cut."""
    first = plain(text).split("\n", 1)[0]
    return first if len(first) <= width else first[: width - 1] + "…"
