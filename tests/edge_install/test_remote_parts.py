"""The pure and the file-level parts of the program that runs on the machine, tried on this one."""

from __future__ import annotations

import ast
import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.edge_install.program import PARTS, program_text
from supervisor.edge_install.remote.account import Account, run, write_atomic
from supervisor.edge_install.remote.changes import Changes
from supervisor.edge_install.remote.install import put_back, write_files
from supervisor.edge_install.remote.texts import (
    KEY_MARK,
    SUBORDINATE_IDS,
    Failed,
    edited_keys,
    free_ids,
    has_ids,
    version_in,
)
from supervisor.edge_install.remote.uninstall import remove_files

OURS = f'restrict,command="/usr/bin/python3 -I /h/host.pyz gatekeeper" ssh-ed25519 AAAA {KEY_MARK}'
OTHERS = "# mine\nssh-rsa AAAAB3 me@laptop\nssh-ed25519 AAAAC3 chargehand-gateway-backup\n"

# --- authorized_keys --------------------------------------------------------------------------------------------------


def test_our_key_is_added_once_and_other_lines_stay() -> None:
    once = edited_keys(OTHERS, OURS)
    assert once == OTHERS + OURS + "\n"
    assert edited_keys(once, OURS) == once


def test_a_new_key_replaces_the_old_one() -> None:
    newer = OURS.replace("AAAA", "BBBB")
    assert edited_keys(edited_keys(OTHERS, OURS), newer) == OTHERS + newer + "\n"


def test_removing_our_key_leaves_the_file_as_it_was() -> None:
    assert edited_keys(edited_keys(OTHERS, OURS), None) == OTHERS
    assert edited_keys("", None) == ""


def test_a_last_line_without_newline_is_not_joined_with_ours() -> None:
    assert edited_keys("ssh-rsa AAAA me", OURS) == f"ssh-rsa AAAA me\n{OURS}\n"


def test_a_comment_that_only_mentions_our_mark_stays() -> None:
    text = f"# ssh-ed25519 AAAA {KEY_MARK}\n"
    assert edited_keys(text, None) == text


@given(
    st.lists(
        st.text(alphabet=st.characters(blacklist_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")), max_size=6
    )
)
def test_no_line_of_others_is_ever_lost(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    kept = edited_keys(edited_keys(text, OURS), None)
    theirs = [line for line in lines if not (line.split()[-1:] == [KEY_MARK] and len(line.split()) >= 3)]
    assert [line for line in kept.splitlines() if line in theirs] == [line for line in theirs if line in theirs]


# --- subordinate ids ----------------------------------------------------------------------------------------------------


def test_the_first_free_range_lies_behind_or_between_those_of_others() -> None:
    assert free_ids("", "") == 100000
    assert free_ids("a:100000:65536\n", "a:100000:65536\n") == 165536
    assert free_ids("a:300000:65536\n") == 100000
    assert free_ids("a:120000:65536\n") == 185536
    assert free_ids("broken\na:x:y\n# c\n") == 100000


@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 2**20)), max_size=8))
def test_a_free_range_overlaps_nobodys(ranges: list[tuple[int, int]]) -> None:
    text = "".join(f"u{n}:{first}:{count}\n" for n, (first, count) in enumerate(ranges))
    start = free_ids(text)
    for first, count in ranges:
        assert count == 0 or start + SUBORDINATE_IDS <= first or first + count <= start


def test_no_free_range_is_an_error() -> None:
    with pytest.raises(Failed, match="no free subordinate ids"):
        free_ids(f"a:0:{2**32 - 10}\n")


def test_ids_count_by_name_and_by_number() -> None:
    assert has_ids("edge:100000:65536\n", "edge", 990)
    assert has_ids("990:100000:65536\n", "edge", 990)
    assert not has_ids("edge:100000:1000\n", "edge", 990)
    assert not has_ids("other:100000:65536\n", "edge", 990)


@pytest.mark.parametrize(
    ("text", "version"), [("podman version 5.4.2", "5.4.2"), ("systemd 257 (257.13-1)", "257"), ("none", "")]
)
def test_versions_are_found_in_what_programs_print(text: str, version: str) -> None:
    assert version_in(text) == version


# --- files ------------------------------------------------------------------------------------------------------------


def entry(path: str, data: bytes, mode: int = 0o644) -> dict[str, object]:
    return {"path": path, "mode": mode, "content": base64.b64encode(data).decode()}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_writing_twice_changes_nothing_the_second_time(tmp_path: Path) -> None:
    files = [entry("a/b", b"1", 0o600), entry("c", b"2")]
    assert [change["path"] for change in write_files(str(tmp_path), files, False)["changed"]] == [
        f"{tmp_path}/a/b",
        f"{tmp_path}/c",
    ]
    again = write_files(str(tmp_path), files, False)
    assert (again["changed"], len(again["unchanged"])) == ([], 2)
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o600


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"old")
    done = write_files(str(tmp_path), [entry("a/b", b"1"), entry("c", b"2")], True)
    assert len(done["changed"]) == 2
    assert tree(tmp_path) == {"c": b"old"}


def test_what_was_replaced_can_be_put_back(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"old")
    (tmp_path / "c").chmod(0o640)
    done = write_files(str(tmp_path), [entry("new", b"1"), entry("c", b"2")], False)
    assert (tmp_path / "c").read_bytes() == b"2"
    put_back(done["changed"])
    assert (tmp_path / "c").read_bytes() == b"old"
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o640
    assert not (tmp_path / "new").exists()


def test_when_one_file_cannot_be_written_all_are_as_before(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"old")
    (tmp_path / "blocked").write_bytes(b"a file where a folder should be")
    with pytest.raises(Failed, match="could not be written"):
        write_files(str(tmp_path), [entry("new", b"1"), entry("c", b"2"), entry("blocked/x", b"3")], False)
    assert (tmp_path / "c").read_bytes() == b"old"
    assert not (tmp_path / "new").exists()


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"of somebody else")
    (tmp_path / "c").symlink_to(tmp_path / "secret")
    write_files(str(tmp_path), [entry("c", b"2")], False)
    assert not (tmp_path / "c").is_symlink()
    assert (tmp_path / "secret").read_bytes() == b"of somebody else"


def test_a_failed_write_leaves_no_unfinished_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(str(tmp_path / "d"), b"x", 0o600)
    assert list(tmp_path.iterdir()) == [tmp_path / "d"]


@pytest.mark.parametrize("purge", [False, True])
def test_removing_keeps_journals_unless_told_otherwise(tmp_path: Path, purge: bool) -> None:
    folder = tmp_path / "chargehand"
    for name in ("host.pyz", "journal/run.jsonl", "backup/x/host.pyz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    unit = tmp_path / "unit"
    unit.write_text("x")
    done = remove_files(str(folder), [str(unit), str(folder / "host.pyz")], purge, False)
    assert not unit.exists()
    assert bool(done["kept"]) is not purge
    assert list(tree(tmp_path)) == ([] if purge else ["chargehand/journal/run.jsonl"])


# --- doing and saying ---------------------------------------------------------------------------------------------------


def test_a_dry_run_only_writes_down() -> None:
    done: list[int] = []
    for dry, expected in ((True, []), (False, [1])):
        changes = Changes(dry)
        changes.make("do", "it", lambda: done.append(1))
        assert (done, changes.result()["changes"]) == (expected, [{"what": "do", "path": "it"}])


def test_a_missing_program_and_a_failing_one_are_told_apart() -> None:
    with pytest.raises(Failed, match="is not installed"):
        run(["/nonexistent/program"])
    with pytest.raises(Failed) as caught:
        run(["/bin/sh", "-c", "echo why >&2; exit 3"])
    assert caught.value.document["got"] == "3: why"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_root_acts_as_the_user_and_gets_results_and_errors_back() -> None:
    account = Account("nobody", "/nonexistent")
    assert account.do(lambda: [os.geteuid(), os.getgid()]) == [account.uid, account.gid]

    def fail() -> None:
        raise Failed("no", "this", "that", "then")

    with pytest.raises(Failed) as caught:
        account.do(fail)
    assert caught.value.document == {"message": "no", "expected": "this", "got": "that", "next": "then"}
    with pytest.raises(Failed, match="could not write"):
        account.do(lambda: Path("/etc/chargehand-test").write_text("x"))
    assert account.run(["id", "-u"]).stdout.strip() == str(account.uid)


# --- the program as one text --------------------------------------------------------------------------------------------


def test_the_program_is_self_contained_and_reads_as_python_3_9() -> None:
    text = program_text()
    found = ast.parse(text, feature_version=(3, 9))
    imported = {
        name.split(".")[0]
        for node in ast.walk(found)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported <= set(sys.stdlib_module_names)
    assert len(PARTS) == 7


def test_no_name_is_defined_in_two_parts_of_the_program() -> None:
    names = [
        target.id if isinstance(target, ast.Name) else ""
        for node in ast.parse(program_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    ]
    names += [node.name for node in ast.parse(program_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) == len(set(names))


def test_a_verb_nobody_knows_is_one_json_error() -> None:
    document = b'{"verb": "format-disk"}'
    done = subprocess.run(
        [sys.executable, "-I", "-c", program_text()],
        input=b"%d\n%s" % (len(document), document),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.startswith(b'{"error": {"message": "unknown verb')
