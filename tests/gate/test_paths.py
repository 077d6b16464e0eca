"""Paths: what may be read, and that nothing swapped in time gets read instead."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gate.policies import observe_core
from tools import paths
from tools.paths import PathRefused, PathRules, lexical, open_beneath, open_by_rules, open_parent, open_regular

CORE = observe_core().path_rules()


@given(st.text(alphabet="/.ab", max_size=20))
def test_a_normal_path_is_absolute_and_stays_normal(text: str) -> None:
    try:
        normal = lexical(text)
    except PathRefused:
        assert not text.startswith("/") or ".." in text.split("/")
        return
    assert normal.startswith("/") and lexical(normal) == normal and "//" not in normal
    assert not {"", ".", ".."} & set(normal[1:].split("/")) or normal == "/"
    assert normal == os.path.normpath("/" + text.lstrip("/"))


@pytest.mark.parametrize("path", ["etc/passwd", "", "./x", "/a/../b", "/..", "/a/..", "/x\0y", "/" + "a/" * 3000])
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(PathRefused):
        lexical(path)


@pytest.mark.parametrize(
    "path",
    ["/proc/loadavg", "/proc/meminfo", "/proc/pressure/cpu", "/proc/1/status", "/proc/4711/limits", "/proc/net/dev",
     "/proc/sys/vm/swappiness", "/sys/class/net/eth0/operstate", "/sys/devices/system/edac/mc/mc0/ce_count"],
)  # fmt: skip
def test_kernel_files_that_say_how_the_machine_is_may_be_read(path: str) -> None:
    assert CORE.check_read(path)


@pytest.mark.parametrize(
    "path",
    ["/proc", "/proc/1", "/proc/1/environ", "/proc/1/mem", "/proc/1/maps", "/proc/1/smaps", "/proc/1/stack", "/proc/kcore",
     "/proc/1/root/etc/hosts", "/proc/1/fd/3", "/proc/x/status", "/proc/1x/status", "/proc/kmsg", "/sys", "/sys/kernel/debug/x",
     "/procx", "/proc/1/status/x"],
)  # fmt: skip
def test_other_kernel_files_may_not(path: str) -> None:
    with pytest.raises(PathRefused):
        CORE.check_read(path)


@pytest.mark.parametrize(
    "path",
    ["/etc/shadow", "/etc/shadow-", "/etc/shadow.bak/x", "/etc/ssl/private/a.pem", "/etc/ssh/ssh_host_rsa_key", "/root",
     "/root/x", "/home/u/.ssh/config", "/srv/a/b/.env", "/opt/id_rsa", "/opt/a/site.key", "/run/secrets/x", "/etc/sudoers.d"],
)  # fmt: skip
def test_secrets_and_what_lies_below_them_are_secret(path: str) -> None:
    assert CORE.secret(path)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/ssh/sshd_config",
        "/etc/ssh/ssh_host_rsa_key.pub",
        "/etc/passwd",
        "/rootx",
        "/etc/ssl/certs/a.pem",
        "/home/u/x",
    ],
)
def test_their_neighbours_are_not(path: str) -> None:
    assert not CORE.secret(path)


@given(st.lists(st.sampled_from(["etc", "ssh", "x", "var", "log", "a.key", "private"]), min_size=1, max_size=4))
def test_every_secret_below_a_directory_is_among_the_names_to_leave_out(steps: list[str]) -> None:
    import fnmatch

    path = "/" + "/".join(steps)
    for start in ("/etc", "/var", "/etc/ssh"):
        if path.startswith(start + "/") and CORE.secret(path) and not CORE.secret(start):
            names = CORE.secret_names_below(start)
            below = path[len(start) + 1 :].split("/")
            assert any(fnmatch.fnmatchcase(step, name) for step in below for name in names), (start, path)


# --- opening ---


def opened(path: Path, *roots: Path, secrets: tuple[str, ...] = ()) -> bytes:
    descriptor = open_regular(str(path), os.O_RDONLY, [str(root) for root in roots], secrets)
    try:
        assert not os.get_inheritable(descriptor)
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert opened(tmp_path / "a", tmp_path) == b"x"


def test_links_devices_fifos_sockets_and_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "dirlink").symlink_to("d")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(tmp_path)
        listening.bind("sock")
        for name in ("link", "dirlink/f", "fifo", "sock", "d", "missing", "a/x"):
            with pytest.raises(PathRefused):
                opened(tmp_path / name, tmp_path)
    for device in ("/dev/null", "/dev/zero"):
        with pytest.raises(PathRefused, match="character device"):
            opened(Path(device), Path("/dev"))


def test_what_lies_outside_the_roots_or_is_secret_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"x")
    for path, secrets in (
        (tmp_path / "b", ()),
        (tmp_path / "a" / "f", (f"{tmp_path}/a/f",)),
        (tmp_path / "a" / "f", ("/**/f",)),
    ):
        with pytest.raises(PathRefused):
            opened(path, tmp_path / "a", secrets=secrets)


def test_an_existing_file_is_never_created_or_emptied_by_reading(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(PathRefused):
        open_regular(str(tmp_path / "a"), os.O_RDWR | os.O_TRUNC, [str(tmp_path)], [])
    assert (tmp_path / "a").read_bytes() == b"x"


def test_the_directory_of_a_write_is_opened_without_following_a_link(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "evil").symlink_to("/etc")
    descriptor, name = open_parent(f"{tmp_path}/conf/new", [str(tmp_path)], [])
    assert name == "new" and stat.S_ISDIR(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    for path in (f"{tmp_path}/evil/passwd", str(tmp_path), f"{tmp_path}/conf/../x", "/etc/passwd"):
        with pytest.raises(PathRefused):
            open_parent(path, [str(tmp_path)], [])


def test_a_file_below_proc_can_be_opened_by_the_policys_rules() -> None:
    os.close(open_by_rules(f"/proc/{os.getpid()}/status", CORE))
    with pytest.raises(PathRefused):
        open_by_rules(f"/proc/{os.getpid()}/environ", CORE)


@pytest.mark.parametrize("walk", [False, True], ids=["openat2", "walk"])
def test_a_directory_that_swaps_links_while_it_is_read_never_leads_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk: bool
) -> None:
    if walk:
        monkeypatch.setattr(paths, "has_openat2", lambda: False)
    elif not paths.has_openat2():
        pytest.skip("this kernel has no openat2")
    inside, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (inside / "d", outside / "d"):
        directory.mkdir(parents=True)
    (inside / "d" / "f").write_bytes(b"in")
    (outside / "d" / "f").write_bytes(b"out")
    (outside / "f").write_bytes(b"out")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(inside / "d", inside / "kept")
            os.symlink(outside / "d", inside / "d")
            os.unlink(inside / "d")
            os.rename(inside / "kept", inside / "d")
            os.rename(inside / "d" / "f", inside / "d" / "g")
            os.symlink(outside / "f", inside / "d" / "f")
            os.unlink(inside / "d" / "f")
            os.rename(inside / "d" / "g", inside / "d" / "f")

    hostile = threading.Thread(target=swap)
    hostile.start()
    read: list[bytes] = []
    try:
        for _ in range(3000):
            with contextlib.suppress(PathRefused):
                read.append(opened(inside / "d" / "f", inside))
    finally:
        stop.set()
        hostile.join()
    assert set(read) <= {b"in"}


@pytest.mark.parametrize("walk", [False, True], ids=["openat2", "walk"])
def test_dot_dot_and_absolute_links_do_not_leave_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk: bool
) -> None:
    if walk:
        monkeypatch.setattr(paths, "has_openat2", lambda: False)
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "in" / "abs").symlink_to(tmp_path / "secret")
    root = os.open(tmp_path / "in", os.O_PATH | os.O_DIRECTORY)
    try:
        for relative in ("../secret", "abs", "./../secret"):
            with pytest.raises(OSError):
                open_beneath(root, relative, os.O_RDONLY)
    finally:
        os.close(root)


def test_a_loop_of_links_does_not_resolve(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(PathRefused, match="circle"):
        paths.resolve(str(tmp_path / "a"))


def test_a_glob_is_expanded_in_order_without_hidden_names(tmp_path: Path) -> None:
    for name in ("b", "a", ".c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("x")
    (tmp_path / "l").symlink_to("a")
    assert paths.expand(f"{tmp_path}/*", 10) == [f"{tmp_path}/{n}" for n in ("a", "b", "l")]
    assert paths.expand(f"{tmp_path}/*/f", 10) == [f"{tmp_path}/{n}/f" for n in ("a", "b", "l")]
    assert paths.expand(f"{tmp_path}/.*", 10) == [f"{tmp_path}/.c"]
    assert len(paths.expand(f"{tmp_path}/*", 1)) == 2
    assert paths.expand(f"{tmp_path}/nothing*", 10) == []


def test_rules_must_be_absolute() -> None:
    with pytest.raises(ValueError, match="must begin"):
        PathRules(["etc"], [])
