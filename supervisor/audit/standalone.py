"""Verify an export of Chargehand's audit chain. Python 3.9 or newer, standard library only.

    python3 verify_audit.py [DIRECTORY_OR_FILE] [--key PUBLIC_KEY.pem] [--json]

Checks every line, every record's hash, every link, every number, the heads of the manifest, every checkpoint and every
sealed journal, and says where something does not hold. Signatures are checked if the package `cryptography` is there
and a public key is given or lies beside the export; otherwise it says that they were not checked.

Exit status: 0 everything holds, 1 something does not, 2 there is no export to check.

This file imports nothing of Chargehand on purpose: it is a second, independent reading of the same rules, short enough
to be read before it is trusted.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sys
from typing import Any, BinaryIO

GENESIS = "0" * 64
HEADER = ("actor", "at_us", "chain", "key", "kind", "prev", "run_id", "seq")
STATEMENT = ("at_us", "heads", "key_id", "number", "prev", "v")
PUBLIC_KEY_FILE = "audit-key.pub.pem"


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_of(record: dict[str, Any]) -> str:
    """The hash a record must carry: of its header, into which the body enters by its digest."""
    body = record["body"]
    text = body.encode("utf-8", "surrogateescape") if isinstance(body, str) else canonical(body)
    header = {name: record[name] for name in HEADER}
    header.update(v=1, body_digest="sha256:" + sha256(text))
    return sha256(canonical(header))


class Check:
    def __init__(self) -> None:
        self.breaks: list[dict[str, Any]] = []
        self.manifest: dict[str, Any] | None = None
        self.chains: dict[str, dict[int, str]] = {}
        self.checkpoints: list[dict[str, Any]] = []
        self.journals: dict[str, list[str]] = {}
        self.told: dict[int, str] = {}
        self.sealed: dict[str, dict[str, Any]] = {}
        self.lines = 0

    def wrong(self, where: str, number: int, message: str) -> None:
        self.breaks.append({"where": where, "number": number, "message": message})

    def read(self, file: BinaryIO) -> None:
        ended = False
        for raw in file:
            self.lines += 1
            try:
                line = json.loads(raw)
                if canonical(line) + b"\n" != raw:
                    raise ValueError("not in canonical form")
                ended = self.take(line) or ended
            except (ValueError, KeyError, TypeError) as error:
                self.wrong("export", self.lines, f"line {self.lines} cannot be read: {error}")
        if not ended:
            self.wrong("export", self.lines + 1, f"the export ends after line {self.lines}, without its last line")
        if self.manifest is None:
            self.wrong("export", 1, "the manifest is missing")

    def take(self, line: dict[str, Any]) -> bool:
        kind = line["type"]
        if kind == "manifest" and self.lines == 1 and line["v"] == 1:
            self.manifest = line
        elif kind == "record":
            self.record(line)
        elif kind == "checkpoint":
            self.checkpoints.append(line)
        elif kind == "journal":
            self.journals[line["run_id"]] = line["lines"]
        elif kind == "end":
            if line["lines"] != self.lines - 1:
                self.wrong("export", self.lines, f"it had {line['lines']} lines, here are {self.lines - 1}")
            return True
        else:
            raise ValueError(f"unknown type {kind!r}")
        return False

    def record(self, record: dict[str, Any]) -> None:
        """Each record must follow the one before it in its chain: next number, that one's hash, its own hash."""
        chain, seq = record["chain"], record["seq"]
        hashes = self.chains.setdefault(chain, {})
        before = max(hashes) if hashes else 0
        if set(record) != {"type", "body", "hash", *HEADER}:
            self.wrong(chain, seq, f"record {seq} has other fields than it was exported with")
        elif hash_of(record) != record["hash"]:
            self.wrong(chain, seq, f"record {seq} was changed after it was written")
        elif seq != before + 1:
            self.wrong(chain, before + 1, f"record {before + 1} is missing or does not stand here: here is {seq}")
        elif record["prev"] != hashes.get(before, GENESIS):
            self.wrong(chain, before, f"record {before} is not the one that record {seq} was written after")
        hashes[seq] = record["hash"]
        if record["kind"] == "audit.checkpoint" and chain == "gateway":
            self.told[record["body"]["number"]] = record["body"]["hash"]
        if record["kind"] == "journal.sealed":
            self.sealed[record["run_id"]] = record["body"]

    def rest(self, pem: bytes | None) -> bool:
        """Everything that needs the whole file. Returns whether signatures were checked."""
        signed = False
        try:
            self.ends()
            signed = self.signatures(pem)
            self.sealed_journals()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.wrong("export", self.lines, f"a line does not have the form it must have: {error!r}")
        return signed

    def ends(self) -> None:
        """What manifest and checkpoints know of a chain must be there."""
        manifest: dict[str, Any] = self.manifest or {"chains": {}, "scope": None}
        known = [(chain, head, "the manifest") for chain, head in manifest["chains"].items()]
        for checkpoint in self.checkpoints:
            name = f"checkpoint {checkpoint['number']}"
            known += [(chain, head, name) for chain, head in checkpoint["heads"].items()]
        for chain, head, name in known:
            hashes = self.chains.get(chain, {})
            if manifest["scope"] is not None and chain not in manifest["chains"]:
                continue
            if head["seq"] not in hashes:
                last = max(hashes) if hashes else 0
                message = f"{name} knows record {head['seq']}; the chain ends with {last}"
                self.wrong(chain, head["seq"], message)
            elif hashes[head["seq"]] != head["hash"]:
                self.wrong(chain, head["seq"], f"record {head['seq']} is not the one that {name} knows")
        for chain, hashes in self.chains.items():
            head = manifest["chains"].get(chain)
            if head is None or max(hashes) > head["seq"]:
                self.wrong(chain, max(hashes), f"the manifest does not know record {max(hashes)}")

    def signatures(self, pem: bytes | None) -> bool:
        """Checkpoints in order, linked, told in the gateway's chain, and signed. Returns whether signatures were checked."""
        public: Any = None
        refusals: tuple[type[Exception], ...] = (ValueError,)
        if pem:
            try:
                from cryptography.exceptions import InvalidSignature
                from cryptography.hazmat.primitives.serialization import load_pem_public_key
            except ImportError:
                pass  # said at the end: signatures were not checked
            else:
                public = load_pem_public_key(pem)
                refusals = (ValueError, InvalidSignature)
        prev = GENESIS
        hashes: dict[int, str] = {}
        for place, checkpoint in enumerate(self.checkpoints, 1):
            number = checkpoint["number"]
            text = canonical({name: checkpoint[name] for name in STATEMENT})
            hashes[number] = sha256(text)
            if number != place or checkpoint["prev"] != prev:
                self.wrong("checkpoints", number, f"checkpoint {number} does not follow the one before it")
            prev = hashes[number]
            if public is None:
                continue
            try:
                public.verify(base64.b64decode(checkpoint["signature"], validate=True), text)
            except refusals:
                self.wrong("checkpoints", number, f"the signature of checkpoint {number} does not hold")
        for number, told in self.told.items():
            if self.manifest and self.manifest["scope"] is None and hashes.get(number) != told:
                self.wrong("checkpoints", number, f"checkpoint {number} is not the one the gateway's chain tells of")
        return public is not None

    def sealed_journals(self) -> None:
        """A sealed journal must be there, be linked line by line, and end where the seal says."""
        for run_id, body in self.sealed.items():
            lines = self.journals.get(run_id)
            where = f"journal:{run_id}"
            if lines is None:
                if body.get("lines"):
                    self.wrong(where, 1, "the sealed journal is missing")
                continue
            prev = GENESIS
            for number, text in enumerate(lines, 1):
                try:
                    entry = json.loads(text)
                    holds = entry["seq"] == number and entry["prev"] == prev and entry["run_id"] == run_id
                except (ValueError, KeyError, TypeError):
                    holds = False
                if not holds:
                    self.wrong(where, number, f"line {number} does not continue the journal")
                    break
                prev = sha256(text.encode("utf-8", "surrogateescape"))
            else:
                if prev != body.get("head"):
                    self.wrong(where, len(lines), "the journal does not end as it was sealed")


def main() -> int:
    parser = argparse.ArgumentParser(description="Verify an export of Chargehand's audit chain.")
    parser.add_argument("path", nargs="?", default=os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--key", help="public key (PEM) that must have signed; keep it apart from the export")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    path = os.path.join(options.path, "audit.jsonl") if os.path.isdir(options.path) else options.path
    beside = os.path.join(os.path.dirname(path), PUBLIC_KEY_FILE)
    key_path = options.key or (beside if os.path.exists(beside) else None)
    check = Check()
    try:
        with open(path, "rb") as file:
            check.read(file)
        pem = None
        if key_path:
            with open(key_path, "rb") as file:
                pem = file.read()
        signed = check.rest(pem)
    except OSError as error:
        sys.stderr.write(f"there is no export to check: {error}\n")
        return 2
    records = sum(len(hashes) for hashes in check.chains.values())
    result = {
        "verified": not check.breaks, "records": records, "chains": len(check.chains),
        "checkpoints": len(check.checkpoints), "signatures_checked": signed, "breaks": check.breaks,
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return 1 if check.breaks else 0
    for found in check.breaks:
        print(f"BROKEN  {found['where']} {found['number']}: {found['message']}")
    print(f"{records} records in {len(check.chains)} chains, {len(check.checkpoints)} checkpoints")
    if not signed:
        print("signatures: NOT CHECKED (give --key, and have the Python package cryptography)")
    elif options.key:
        print(f"signatures: checked with {options.key}")
    else:
        print("signatures: checked with the key inside the export; compare that key with one kept elsewhere")
    print("everything holds" if not check.breaks else f"{len(check.breaks)} things do not hold")
    return 1 if check.breaks else 0


if __name__ == "__main__":
    sys.exit(main())
