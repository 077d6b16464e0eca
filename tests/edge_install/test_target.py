"""What an installation is asked to do: every bad choice is refused before a machine is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.edge_install.target import Choices, Target, parse, read_file
from supervisor.errors import BadInput


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("root@web-01", Target("root", "web-01", 22)),
        ("web-01:2222", Target("", "web-01", 2222)),
        ("admin@192.0.2.7:22", Target("admin", "192.0.2.7", 22)),
        ("root@[2001:db8::7]:2222", Target("root", "2001:db8::7", 2222)),
        ("root@2001:db8::7", Target("root", "2001:db8::7", 22)),
    ],
)
def test_a_target_is_who_where_and_which_port(text: str, expected: Target) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["", "@host", "a b@host", "root@", "root@host:", "root@host:0", "root@-x", "root@ho st",
                                  "root@host:22:23x", "x@y@z", "root@[::1", "root@host:٣"])  # fmt: skip
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse(text)


@given(st.text(max_size=40))
def test_any_text_is_a_target_or_a_clear_error(text: str) -> None:
    try:
        found = parse(text)
    except BadInput:
        return
    assert not found.host.startswith("-")
    assert not found.admin.startswith("-")
    assert 1 <= found.port <= 65535


@pytest.mark.parametrize(
    "wrong",
    [
        {"machine": "Web_01"},
        {"account": "-root"},
        {"image": "agent:latest"},
        {"image": f"quay.example/a/b@sha256:{'0' * 64}", "image_archive": Path("x")},
        {"accept_host_key": "MD5:aa"},
        {"network": "bridge"},
        {"max_run_s": 1},
        {"max_lease_s": 1},
        {"labels": {"Bad Key": "x"}},
        {"role": "two\nlines"},
        {"broker_memory_mib": 1},
    ],
)
def test_a_choice_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        Choices(**{"machine": "web-01", **wrong})  # type: ignore[arg-type]


def test_a_file_gives_choices_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(
        'target = "root@web-01"\nmachine = "web-01"\nimage-archive = "dist/agent.tar"\ngrant-logs = false\n'
        'max_run_s = 60\nignore = ["disk"]\n[labels]\nrole = "web"\n'
    )
    assert read_file(file) == {
        "target": "root@web-01", "machine": "web-01", "image_archive": tmp_path / "dist/agent.tar", "grant_logs": False,
        "max_run_s": 60, "ignore": ("disk",), "labels": {"role": "web"},
    }  # fmt: skip


@pytest.mark.parametrize("text", ["machin = 'x'", "machine = 1", "grant_logs = 'yes'", "max_run_s = true", "= broken",
                                  "labels = ['a']", "ignore = 'disk'"])  # fmt: skip
def test_a_file_with_something_wrong_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"edge\.toml"):
        read_file(file)
