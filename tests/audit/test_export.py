"""Exports: verified offline by the package and by the script beside them, which must agree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.audit import chain as chains
from supervisor.audit import kinds, standalone
from supervisor.audit.checkpoint import PUBLIC_KEY_FILE, Signer, checkpoints, make_checkpoint, read_public_key
from supervisor.audit.export import FILE, SCRIPT, export, verify_export
from supervisor.audit.ledger import Entry, Ledger, open_ledger
from supervisor.audit.verify import VerifyReport
from supervisor.errors import BadInput, Conflict
from supervisor.machines import Machine
from supervisor.store.store import open_store
from tests.audit.test_journal import RUN, journal
from tools.values import canonical

WEB = "machine:web-01"


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer(Ed25519PrivateKey.generate())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, signer: Signer) -> Path:
    """An export of two machines, two checkpoints and a sealed journal; made once, only ever copied."""
    directory = tmp_path_factory.mktemp("export")
    url = f"sqlite:///{directory / 'a.db'}"
    with open_store(url) as store, open_ledger(url) as ledger:
        store.machines.add(Machine("web-01", "192.0.2.1"))
        store.runs.create(machine="web-01", requested_by="a", text="x", not_after=1.0, run_id=RUN)
        lines, head = journal()
        store.journals.save(RUN, lines, head, complete=True)
        fill(ledger, "web-01", 4)
        make_checkpoint(ledger, signer)
        fill(ledger, "db-01", 2)
        sealed = {"lines": len(lines), "head": head, "lease_digest": "sha256:lease"}
        ledger.record(kinds.JOURNAL_SEALED, sealed, machine="web-01", run_id=RUN)
        exported = export(ledger, directory / "whole", signer=signer)
        assert (exported.records, exported.checkpoints, exported.journals) == (9, 2, 1)
        export(ledger, directory / "one", machine="db-01", signer=signer)
    return directory


def fill(ledger: Ledger, machine: str, count: int) -> None:
    ledger.append([Entry(kinds.DECISION, {"n": number, "text": "ü"}, machine=machine) for number in range(count)])


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "whole", tmp_path / "copy")
    return tmp_path / "copy"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / FILE).read_text().splitlines()]


def rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    (path / FILE).write_bytes(b"".join(canonical(line) + b"\n" for line in lines))


def by_script(path: Path, *arguments: str) -> dict[str, Any]:
    """What the standalone script says, run without our code on its path and with warnings as errors."""
    command = [sys.executable, "-W", "error", "-I", str(path / SCRIPT), "--json", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert ran.returncode in (0, 1), ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    assert result["verified"] == (ran.returncode == 0)
    return result


def place(path: Path, kind: str, chain: str | None = None, seq: int | None = None) -> int:
    return next(
        at for at, line in enumerate(lines_of(path))
        if line["type"] == kind and chain in (None, line.get("chain")) and seq in (None, line.get("seq"))
    )  # fmt: skip


def test_a_whole_export_verifies_both_ways(original: Path) -> None:
    report = verify_export(original / "whole")
    assert report.breaks == ()
    assert (report.records, report.checkpoints, report.journals, report.signatures_checked) == (9, 2, 1, True)
    # Everything is signed but the record that tells of the last checkpoint.
    assert report.unsigned == 1
    told = by_script(original / "whole")
    assert (told["verified"], told["records"], told["signatures_checked"]) == (True, 9, True)
    assert verify_export(original / "whole" / FILE).verified


def test_an_export_of_one_machine_holds_that_machine_only(original: Path) -> None:
    report = verify_export(original / "one")
    assert (report.breaks, report.chains) == ((), {"machine:db-01": 2})
    assert by_script(original / "one")["verified"]


def test_the_script_needs_no_package_and_says_that_signatures_were_not_checked(copy: Path) -> None:
    (copy / PUBLIC_KEY_FILE).unlink()
    assert by_script(copy)["signatures_checked"] is False
    assert not verify_export(copy).signatures_checked
    ran = subprocess.run([sys.executable, "-I", copy / SCRIPT], capture_output=True, text=True, check=True)
    assert "NOT CHECKED" in ran.stdout
    without = "import sys; sys.modules['cryptography'] = None; sys.argv = [sys.argv[1]]; exec(open(sys.argv[0]).read())"
    ran = subprocess.run(
        [sys.executable, "-I", "-c", f"__file__ = {str(copy / SCRIPT)!r}; {without}", copy / SCRIPT],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "NOT CHECKED" in ran.stdout


def test_the_script_is_standard_library_only_and_runs_on_python_3_9(original: Path) -> None:
    source = (original / "whole" / SCRIPT).read_text()
    compile(source, SCRIPT, "exec")
    assert "supervisor" not in source
    assert "match " not in source.replace("_match", "")


def change(path: Path, kind: str, chain: str | None, seq: int | None, **fields: Any) -> None:
    lines = lines_of(path)
    lines[place(path, kind, chain, seq)].update(fields)
    rewrite(path, lines)


def remove(path: Path, kind: str, chain: str | None = None, seq: int | None = None, *, mend_count: bool = True) -> None:
    lines = lines_of(path)
    del lines[place(path, kind, chain, seq)]
    if mend_count and lines[-1]["type"] == "end":
        lines[-1]["lines"] -= 1
    rewrite(path, lines)


def exchange(path: Path) -> None:
    lines = lines_of(path)
    first, second = place(path, "record", WEB, 2), place(path, "record", WEB, 3)
    lines[first], lines[second] = lines[second], lines[first]
    rewrite(path, lines)


def cut(path: Path) -> None:
    rewrite(path, lines_of(path)[:-1])


def change_journal(path: Path) -> None:
    lines = lines_of(path)
    entry = lines[place(path, "journal")]
    entry["lines"][3] = entry["lines"][3].replace("nginx", "apache")
    rewrite(path, lines)


def spoil_bytes(path: Path) -> None:
    raw = (path / FILE).read_bytes()
    (path / FILE).write_bytes(raw.replace(b'"n":2', b'"n": 2', 1))


MANIPULATIONS: dict[str, tuple[Callable[[Path], object], tuple[str, str, int]]] = {
    "a changed body": (lambda p: change(p, "record", WEB, 2, body={"n": 7}), (chains.CHANGED, WEB, 2)),
    "a changed actor": (lambda p: change(p, "record", WEB, 5, actor="x"), (chains.CHANGED, WEB, 5)),
    "a changed hash": (lambda p: change(p, "record", WEB, 1, hash="0" * 64), (chains.CHANGED, WEB, 1)),
    "a removed record": (lambda p: remove(p, "record", WEB, 3), (chains.REMOVED, WEB, 3)),
    "the last record removed": (lambda p: remove(p, "record", WEB, 5), (chains.TRUNCATED, WEB, 5)),
    "a line removed": (lambda p: remove(p, "record", WEB, 3, mend_count=False), (chains.REMOVED, WEB, 3)),
    "exchanged lines": (exchange, (chains.REORDERED, WEB, 3)),
    "a cut file": (cut, (chains.TRUNCATED, "export", 14)),
    "a space": (spoil_bytes, (chains.CHANGED, "export", 8)),
    "a changed checkpoint": (lambda p: change(p, "checkpoint", None, None, at_us=1), (chains.FORGED, "checkpoints", 1)),
    "a removed checkpoint": (lambda p: remove(p, "checkpoint"), (chains.REMOVED, "checkpoints", 1)),
    "a changed journal": (change_journal, (chains.CHANGED, f"journal:{RUN}", 4)),
    "a removed journal": (lambda p: remove(p, "journal"), (chains.REMOVED, f"journal:{RUN}", 1)),
    "a removed manifest": (lambda p: remove(p, "manifest"), (chains.REMOVED, "export", 1)),
    "an unknown line": (lambda p: change(p, "journal", None, None, type="x"), (chains.CHANGED, "export", 13)),
    "an unknown field": (lambda p: change(p, "record", WEB, 2, extra=1), (chains.CHANGED, "export", 7)),
}


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_each_manipulation_is_found_by_the_package_and_by_the_script(copy: Path, name: str) -> None:
    manipulate, wanted = MANIPULATIONS[name]
    manipulate(copy)
    report = verify_export(copy)
    assert wanted in [(item.kind, item.chain, item.seq) for item in report.breaks], report.breaks
    told = by_script(copy)
    assert not told["verified"]
    # The script knows less words, and names the record where the package names the line.
    assert told["breaks"][0]["where"] in {item.chain for item in report.breaks}, told["breaks"]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.text(max_size=3) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["seq", "hash", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_that_stands_in_an_export_can_stop_its_verification(original: Path, data: st.DataObject) -> None:
    lines = lines_of(original / "whole")
    line = lines[data.draw(st.integers(0, len(lines) - 1))]
    name = data.draw(st.sampled_from(sorted(line)))
    before = line[name]
    line[name] = data.draw(values)
    spoilt = original / "spoilt"
    spoilt.mkdir(exist_ok=True)
    rewrite(spoilt, lines)
    check = standalone.Check()
    with (spoilt / FILE).open("rb") as file:
        check.read(file)
    check.rest(None)
    # What a manifest says about itself is told, not proven; everything else is.
    if canonical(line[name]) != canonical(before) and (line["type"], name) != ("manifest", "at_us"):
        key = [read_public_key((original / "whole" / PUBLIC_KEY_FILE).read_text())]
        told = verify_export(spoilt, key)
        if line["type"] != "manifest" and (line["type"], name) != ("checkpoint", "signature"):
            assert not told.verified
            assert check.breaks


def rebuilt(original: Path, signer: Signer) -> Path:
    """A forger's export: everything in it fits together, and only a key or a checkpoint kept elsewhere tells."""
    with open_ledger(f"sqlite:///{original.parent / 'forged.db'}") as ledger:
        fill(ledger, "web-01", 5)
        return export(ledger, original.parent / "forged", signer=signer).path


def test_an_export_signed_by_somebody_else_is_found_with_a_key_kept_elsewhere(tmp_path: Path, signer: Signer) -> None:
    forged = rebuilt(tmp_path / "x", Signer(Ed25519PrivateKey.generate()))
    assert verify_export(forged).verified
    assert {item.kind for item in verify_export(forged, [signer.public_key]).breaks} == {chains.FORGED}
    (tmp_path / "mine.pem").write_text(signer.public_pem)
    assert not by_script(forged, "--key", str(tmp_path / "mine.pem"))["verified"]


def test_checkpoints_kept_elsewhere_are_held_against_an_export(original: Path, tmp_path: Path, signer: Signer) -> None:
    with open_ledger(f"sqlite:///{original / 'a.db'}") as ledger:
        kept = checkpoints(ledger)
    assert verify_export(original / "whole", trusted=kept[:2]).verified
    report: VerifyReport = verify_export(rebuilt(tmp_path / "x", signer), [signer.public_key], trusted=kept[:2])
    assert (chains.FORGED, 1) in [(item.kind, item.seq) for item in report.breaks]


def test_an_export_never_overwrites_and_appears_whole_or_not_at_all(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_ledger(f"sqlite:///{original / 'a.db'}") as ledger:
        with pytest.raises(Conflict):
            export(ledger, original / "whole")
        (tmp_path / "file").touch()
        with pytest.raises(BadInput, match="could not be written"):
            export(ledger, tmp_path / "file" / "x")
        monkeypatch.setattr("supervisor.audit.export.SCRIPT", "no/such/directory")
        with pytest.raises(BadInput):
            export(ledger, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_export_is_refused(tmp_path: Path, original: Path) -> None:
    with pytest.raises(BadInput, match="no export"):
        verify_export(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-I", original / "whole" / SCRIPT, tmp_path], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "no export" in ran.stderr
