"""Exports of the audit chain: one file that can be verified anywhere, without a database.

Owns: the form of an export, writing it, and verifying it with the checks of this package. Beside the file lies
``verify_audit.py`` (``supervisor.audit.standalone``), an independent implementation that needs nothing but Python.
Deliberately does not know: who asks for an export, and where it is kept.

``audit.jsonl`` holds one JSON object a line, each in canonical form, so that any changed byte shows:

* ``{"type": "manifest", "v", "at_us", "scope": null or machine, "chains": {chain: {"seq", "hash"}}, "key_id"}`` first;
* ``{"type": "record", …}``: the fields of a record's header but ``body_digest``, with ``body`` and ``hash``;
* ``{"type": "checkpoint", …}``: a checkpoint with its signature;
* ``{"type": "journal", "run_id", "lines": […]}``: the collected journal of a run, line by line;
* ``{"type": "end", "lines"}`` last: how many lines stand before it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from supervisor.audit import kinds, standalone
from supervisor.audit.chain import CHANGED, REMOVED, TRUNCATED, Break, Head, Record, verify_sequence
from supervisor.audit.checkpoint import (
    PUBLIC_KEY_FILE,
    Checkpoint,
    Signer,
    make_checkpoint,
    read_checkpoints,
    read_public_key,
)
from supervisor.audit.ledger import Ledger, read_chain, read_chain_names, read_heads
from supervisor.audit.verify import (
    VerifyReport,
    check_checkpoints,
    check_sealed,
    check_told,
    marks_of,
    note_record,
)
from supervisor.errors import BadInput, Conflict
from supervisor.store.engine import reading
from supervisor.store.journals import Journals
from tools.values import JsonObject, canonical

FORMAT = 1
FILE = "audit.jsonl"
SCRIPT = "verify_audit.py"
EXPORT = "export"
# One line holds one record or one journal; a longer one is not ours.
MAX_LINE_BYTES = 268_435_456


@dataclasses.dataclass(frozen=True)
class Exported:
    """``path``: the directory; ``records``, ``checkpoints``, ``journals``: how many it holds."""

    path: Path
    records: int
    checkpoints: int
    journals: int


def export(ledger: Ledger, path: Path, *, machine: str | None = None, signer: Signer | None = None) -> Exported:
    """Write the audit chains (or one machine's) with checkpoints and journals into the new directory ``path``.

    With ``signer`` a checkpoint is made first, so that everything in the export is signed. The directory appears whole
    or not at all. Raises ``Conflict`` if it exists, ``BadInput`` if it cannot be written.
    """
    if path.exists():
        raise Conflict("the export would overwrite something", got=str(path), next_step="name a new directory")
    if signer is not None:
        make_checkpoint(ledger, signer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(mode=0o700)
        try:
            counts = {"record": 0, "checkpoint": 0, "journal": 0}
            with (temporary / FILE).open("wb") as file:
                written = 0
                for line in _lines(ledger, machine, signer):
                    counts[line["type"]] = counts.get(line["type"], 0) + 1
                    file.write(canonical(line) + b"\n")
                    written += 1
                file.write(canonical({"type": "end", "lines": written}) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            shutil.copyfile(standalone.__file__, temporary / SCRIPT)
            if signer is not None:
                (temporary / PUBLIC_KEY_FILE).write_text(signer.public_pem, "ascii")
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise BadInput(f"the export could not be written to {path}: {error.strerror}", got=str(path)) from None
    return Exported(path, counts["record"], counts["checkpoint"], counts["journal"])


def _lines(ledger: Ledger, machine: str | None, signer: Signer | None) -> Iterator[JsonObject]:
    # One reading transaction: everything in an export is of one moment.
    with reading(ledger.engine) as connection:
        heads = read_heads(connection)
        names = read_chain_names(connection) if machine is None else [kinds.machine_chain(machine)]
        yield {
            "type": "manifest",
            "v": FORMAT,
            "at_us": ledger.now_us(),
            "scope": machine,
            "chains": {name: dataclasses.asdict(heads[name]) for name in names if name in heads},
            "key_id": None if signer is None else signer.key_id,
        }
        sealed: list[str] = []
        for name in names:
            for record in read_chain(connection, name):
                if record.kind == kinds.JOURNAL_SEALED and record.run_id is not None:
                    sealed.append(record.run_id)
                yield _record_line(record)
        for checkpoint in read_checkpoints(connection):
            yield {"type": "checkpoint", **checkpoint.to_json()}
    journals = Journals(ledger.engine)
    for run_id in dict.fromkeys(sealed):
        kept = journals.get(run_id)
        if kept is not None:
            yield {"type": "journal", "run_id": run_id, "lines": list(kept.lines)}


def _record_line(record: Record) -> JsonObject:
    line = {"type": "record", **dataclasses.asdict(record)}
    # A body that somebody damaged in the database is exported as the text it is, never mended on the way.
    try:
        body = json.loads(record.body)
        line["body"] = body if canonical(body).decode("ascii") == record.body else record.body
    except ValueError:
        line["body"] = record.body
    return line


def verify_export(
    path: Path, public_keys: Iterable[Ed25519PublicKey] = (), *, trusted: Sequence[Checkpoint] = ()
) -> VerifyReport:
    """Check an export without any database.

    Args:
        path: the directory, or its ``audit.jsonl``.
        public_keys: who may have signed. Without any the key inside the export is used: that shows that the export is
            whole, not that it is yours; keep the public key, or its id, elsewhere.
        trusted: checkpoints kept elsewhere.

    Raises ``BadInput`` if there is no export at ``path``; whatever is wrong inside one is a break in the report.
    """
    file_path = path / FILE if path.is_dir() else path
    keys = list(public_keys) or _own_key(file_path.parent)
    try:
        with file_path.open("rb") as file:
            found = _read(file)
    except OSError as error:
        raise BadInput(
            f"there is no export at {path}: {error.strerror}", expected=f"a directory with {FILE}", got=str(path)
        ) from None
    return found.check(keys, trusted)


@dataclasses.dataclass
class _Found:
    """What stands in a file, in the order it stands there."""

    breaks: list[Break] = dataclasses.field(default_factory=list)
    manifest: bool = False
    scope: str | None = None
    heads: dict[str, Head] = dataclasses.field(default_factory=dict)
    records: dict[str, list[Record]] = dataclasses.field(default_factory=dict)
    checkpoints: list[Checkpoint] = dataclasses.field(default_factory=list)
    journals: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    lines: int = 0
    ended: bool = False

    def report(self, kind: str, line: int, message: str, expected: str = "", got: str = "") -> None:
        self.breaks.append(Break(kind, EXPORT, line, line, message, expected, got[:200]))

    def take(self, number: int, line: JsonObject) -> None:
        kind = line.get("type")
        if kind == "manifest" and number == 1 and line.get("v") == FORMAT:
            self.heads = {chain: _as_head(head) for chain, head in line["chains"].items()}
            self.scope = line["scope"]
            self.manifest = True
        elif kind == "record":
            record = _as_record(line)
            self.records.setdefault(record.chain, []).append(record)
        elif kind == "checkpoint":
            self.checkpoints.append(Checkpoint.from_json(line))
        elif kind == "journal":
            self.journals[str(line["run_id"])] = [str(text) for text in line["lines"]]
        elif kind == "end":
            self.ended = True
            if line.get("lines") != number - 1:
                self.report(REMOVED, number, "lines of the export are missing", str(line.get("lines")), str(number - 1))
        else:
            raise BadInput("this line is none of an export")

    def check(self, keys: list[Ed25519PublicKey], trusted: Sequence[Checkpoint]) -> VerifyReport:
        if not self.manifest:
            self.report(REMOVED, 1, "the manifest is missing")
        if not self.ended:
            self.report(TRUNCATED, self.lines + 1, f"the export ends after line {self.lines}, without its last line")
        known = sorted(self.checkpoints, key=lambda checkpoint: checkpoint.number)
        breaks = [*self.breaks, *check_checkpoints(known, keys, trusted)]
        named = set(self.records) | set(self.heads)
        if self.scope is None:
            named |= {chain for checkpoint in (*known, *trusted) for chain in checkpoint.heads}
        told: dict[int, str] = {}
        sealed: dict[str, JsonObject] = {}
        chains: dict[str, int] = {}
        for chain in sorted(named):
            records = self.records.get(chain, [])
            chains[chain] = len(records)
            marks = marks_of(chain, (*known, *trusted))
            breaks += verify_sequence(chain, records, self.heads.get(chain), marks)
            for record in records:
                note_record(record, told, sealed)
        if self.scope is None:
            breaks += check_told(known, told)
        for run_id, body in sealed.items():
            breaks += check_sealed(run_id, body, self.journals.get(run_id))
        signed = known[-1].heads if known else {}
        unsigned = sum(max(0, count - (signed[name].seq if name in signed else 0)) for name, count in chains.items())
        return VerifyReport(sum(chains.values()), chains, len(known), bool(keys), unsigned, len(sealed), tuple(breaks))


def _read(file: IO[bytes]) -> _Found:
    found = _Found()
    while raw := file.readline(MAX_LINE_BYTES):
        found.lines += 1
        try:
            line = json.loads(raw)
            if not isinstance(line, dict) or canonical(line) + b"\n" != raw:
                raise BadInput("this line is not in canonical form")
            found.take(found.lines, line)
        except (BadInput, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = error.message if isinstance(error, BadInput) else f"line {found.lines} cannot be read: {error}"
            found.report(CHANGED, found.lines, message, "a line as it was exported", repr(raw[:120]))
    return found


def _as_head(document: JsonObject) -> Head:
    if not isinstance(document["seq"], int) or not isinstance(document["hash"], str):
        raise BadInput("the manifest does not have the form it must have")
    return Head(document["seq"], document["hash"])


def _as_record(line: JsonObject) -> Record:
    fields: dict[str, Any] = {field.name: line[field.name] for field in dataclasses.fields(Record)}
    if set(line) != {"type", *fields}:
        raise BadInput("this record has other fields than it was exported with")
    if not isinstance(fields["body"], str):
        fields["body"] = canonical(fields["body"]).decode("ascii")
    # Raises for text that no body can be, so that the line is told instead of the check failing.
    fields["body"].encode("utf-8", "surrogateescape")
    for name, value in fields.items():
        number = name in ("seq", "at_us")
        empty = value is None and name in ("run_id", "key")
        if not empty and type(value) is not (int if number else str):
            raise BadInput(f"the field {name!r} of this record is not of the kind it was exported with")
    return Record(**fields)


def _own_key(directory: Path) -> list[Ed25519PublicKey]:
    path = directory / PUBLIC_KEY_FILE
    try:
        return [read_public_key(path.read_text("ascii"))]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the public key {path} could not be read: {error}") from None
