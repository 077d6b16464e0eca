"""Observers of storage: ``disk_space``, ``mounts``, ``block_devices``.

Owns: reading ``df``, the mount table, ``/etc/fstab`` and ``lsblk``, and telling file systems that fill up from those
that are full or read-only by design (images, overlays of containers, memory).
Deliberately does not know: thresholds; what is too full is said by a runbook.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

from tools.observers.fields import integer, pairs, percent, unoctal
from tools.observers.observer import Observer, Parameter, Parameters, Probe, Readings, clean, command, file
from tools.values import JsonObject

# Images: read-only and 100 % full by design.
IMAGES = frozenset(["squashfs", "iso9660", "udf", "erofs", "cramfs", "romfs", "fuse.snapfuse", "fuse.squashfuse"])
MEMORY = frozenset(["tmpfs", "ramfs", "devtmpfs", "hugetlbfs"])
REMOTE = frozenset(
    [
        "nfs",
        "nfs3",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "ceph",
        "9p",
        "virtiofs",
        "glusterfs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "fuse.s3fs",
        "fuse.rclone",
        "lustre",
        "beegfs",
        "gpfs",
        "afs",
        "ncpfs",
        "fuse.ceph",
        "ocfs2",
        "gfs2",
    ]
)
DISKS = frozenset(
    [
        "ext2",
        "ext3",
        "ext4",
        "xfs",
        "btrfs",
        "zfs",
        "f2fs",
        "jfs",
        "reiserfs",
        "bcachefs",
        "vfat",
        "exfat",
        "ntfs",
        "ntfs3",
        "fuseblk",
        "nilfs2",
        "minix",
        "hfsplus",
        "vboxsf",
        "fuse.mergerfs",
    ]
)


def file_system_class(kind: str, mount: str) -> str:
    """``disk``, ``memory``, ``image``, ``remote``, ``overlay`` or ``kernel``: what kind of thing a file system is.

    An overlay at ``/`` is the root of a container and counts as a disk; elsewhere it repeats one that is listed anyway.
    """
    if kind in DISKS:
        return "disk"
    if kind in IMAGES:
        return "image"
    if kind in MEMORY:
        return "memory"
    if kind in REMOTE:
        return "remote"
    if kind in ("overlay", "aufs", "fuse.fuse-overlayfs"):
        return "disk" if mount == "/" else "overlay"
    return "kernel"


# --- disk_space -----------------------------------------------------------------------------------------------------


def _space_first(parameters: Parameters) -> Sequence[Probe]:
    # -l: a dead file server must not hang the observation of everything else.
    local = () if parameters["remote"] else ("-l",)
    return [
        command("blocks", "df", *local, "-P", "-T", "-k", partial=True, output_bytes=262144),
        command("inodes", "df", *local, "-P", "-T", "-i", partial=True, output_bytes=262144),
    ]


def _space_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    # busybox has no -l, and counts inodes only where it was built to.
    more: List[Probe] = []
    if not _df_rows(readings.lines("blocks")):
        more.append(command("blocks-plain", "df", "-P", "-T", "-k", partial=True, output_bytes=262144))
    if not _df_rows(readings.lines("inodes")):
        more.append(command("inodes-plain", "df", "-P", "-T", "-i", partial=True, optional=True, output_bytes=262144))
    return more


_Row = Tuple[str, str, Optional[int], Optional[int], Optional[int], str]


def _df_rows(lines: Optional[Sequence[str]]) -> List[_Row]:
    """``(source, kind, total, used, available, mount)`` of each complete row of ``df -P -T``."""
    rows: List[_Row] = []
    for line in lines or ():
        words = line.split(" ")
        words = [word for word in words if word]
        # A source may hold blanks: the row is anchored where three counts and a percentage stand in a row.
        for at in range(2, len(words) - 4):
            share = words[at + 3]
            if (share == "-" or (share.endswith("%") and share[:-1].isdigit())) and all(
                word == "-" or integer(word) is not None for word in words[at : at + 3]
            ):
                total, used, free = (integer(word) for word in words[at : at + 3])
                mount = line.rpartition(" %s " % share)[2].strip() if line.count(" %s " % share) == 1 else ""
                mount = mount or " ".join(words[at + 4 :])
                if mount.startswith("/"):
                    rows.append((" ".join(words[: at - 1]), words[at - 1], total, used, free, mount))
                break
    return rows


def _space_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    found = _df_rows(readings.lines("blocks")) or _df_rows(readings.lines("blocks-plain"))
    counted = _df_rows(readings.lines("inodes")) or _df_rows(readings.lines("inodes-plain"))
    inodes: Dict[str, _Row] = {row[5]: row for row in counted}
    rows: List[JsonObject] = []
    for source, kind, total, used, free, mount in found:
        if not total or used is None or free is None:
            continue
        # btrfs, vfat and others have no fixed number of inodes and say 0.
        nodes = inodes.get(mount)
        has_nodes = nodes is not None and nodes[2]
        rows.append(
            {
                "mount": clean(mount),
                "source": clean(source),
                "kind": clean(kind, 40),
                "class": file_system_class(kind, mount),
                "size_bytes": total * 1024,
                "used_bytes": used * 1024,
                "available_bytes": max(free, 0) * 1024,
                "used_percent": percent(used, used + max(free, 0)),
                "inodes_total": nodes[2] if nodes and has_nodes else None,
                "inodes_used": nodes[3] if nodes and has_nodes else None,
                "inodes_used_percent": percent(nodes[3], nodes[2]) if nodes and has_nodes else None,
            }
        )
    _mark_views(rows)
    disks = [row for row in rows if row["class"] == "disk" and row["used_percent"] is not None]
    fullest = max(disks, key=lambda row: float(row["used_percent"]), default=None)
    answered = [
        name for name in ("blocks", "inodes") if readings.lines(name + "-plain") and not _df_rows(readings.lines(name))
    ]
    return dict(
        readings.account(answered),
        filesystems=rows if found else None,
        disks=len(disks) if found else None,
        fullest=dict(fullest) if fullest else None,
    )


def _mark_views(rows: Sequence[JsonObject]) -> None:
    """Give class ``view`` to what shows a file system that an earlier row has: subvolumes, and the files a container
    engine mounts from the disk below its overlay."""
    for at, row in enumerate(rows):
        for earlier in rows[:at]:
            same = all(earlier[name] == row[name] for name in ("size_bytes", "used_bytes", "available_bytes"))
            shared = earlier["source"] == row["source"] or earlier["kind"] == "overlay"
            if same and shared and row["class"] == earlier["class"] == "disk":
                row["class"] = "view"
                break


_FILESYSTEM = {
    "mount": "where it is mounted",
    "source": "device or server path",
    "kind": "file system type",
    "class": "disk, memory, image, remote, overlay, kernel, or view (repeats an earlier one)",
    "size_bytes": "size",
    "used_bytes": "used",
    "available_bytes": "available to ordinary users",
    "used_percent": "used of what ordinary users may use",
    "inodes_total": "inodes, null where there is no fixed number",
    "inodes_used": "inodes in use",
    "inodes_used_percent": "inodes in use",
}

DISK_SPACE = Observer(
    name="disk_space",
    summary="Space and inodes of mounted file systems.",
    parameters=(
        Parameter(
            "remote", "boolean", "Also ask remote file systems (a dead server delays the answer).", default=False
        ),
    ),
    returns={"filesystems": [_FILESYSTEM], "disks": "how many are of class disk", "fullest": _FILESYSTEM},
    first=_space_first,
    further=_space_further,
    read=_space_read,
)


# --- mounts ---------------------------------------------------------------------------------------------------------


def _mounts_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        file("table", "/proc/self/mountinfo", output_bytes=262144),
        file("fstab", "/etc/fstab", optional=True),
    ]


def _mounts_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    if readings.lines("table"):
        return []
    return [
        command("findmnt", "findmnt", "-P", "-o", "TARGET,SOURCE,FSTYPE,VFS-OPTIONS,FS-OPTIONS", output_bytes=262144)
    ]


_Mount = Tuple[str, str, str, List[str], List[str]]


def _mountinfo_rows(lines: Optional[Sequence[str]]) -> List[_Mount]:
    """``(mount, source, kind, options of the mount, options of the super block)``, proc(5)."""
    rows: List[_Mount] = []
    for line in lines or ():
        left, dash, right = line.partition(" - ")
        head, tail = left.split(" "), right.split(" ")
        if not dash or len(head) < 6 or len(tail) < 3 or not head[4].startswith("/") or not head[0].isdigit():
            continue
        rows.append((unoctal(head[4]), unoctal(tail[1]), tail[0], head[5].split(","), tail[2].split(",")))
    return rows


def _findmnt_rows(lines: Optional[Sequence[str]]) -> List[_Mount]:
    rows: List[_Mount] = []
    for line in lines or ():
        row = pairs(line)
        if row.get("TARGET", "").startswith("/") and "FSTYPE" in row and "FS-OPTIONS" in row:
            rows.append(
                (
                    row["TARGET"],
                    row.get("SOURCE", ""),
                    row["FSTYPE"],
                    row.get("VFS-OPTIONS", "").split(","),
                    row["FS-OPTIONS"].split(","),
                )
            )
    return rows


def _fstab_rows(lines: Optional[Sequence[str]]) -> List[_Mount]:
    rows: List[_Mount] = []
    for line in lines or ():
        words = line.split()
        if len(words) >= 4 and not words[0].startswith("#") and words[1].startswith("/"):
            mount = unoctal(words[1]).rstrip("/") or "/"
            rows.append((mount, unoctal(words[0]), words[2], words[3].split(","), []))
    return rows


def _mounts_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    found = _mountinfo_rows(readings.lines("table")) or _findmnt_rows(readings.lines("findmnt"))
    declared = _fstab_rows(readings.lines("fstab"))
    wanted = {row[0]: row for row in declared}
    rows: Dict[str, JsonObject] = {}
    for mount, source, kind, options, super_options in found:
        group = file_system_class(kind, mount)
        if group in ("kernel", "overlay"):
            continue
        frozen = "ro" in super_options or "emergency_ro" in super_options
        entry = wanted.get(mount)
        why = ""
        if group == "disk" and frozen:
            # A super block read-only below a read-write mount is what errors=remount-ro leaves behind. The options of
            # the mount alone say nothing: sandboxes put read-only views over everything.
            if "emergency_ro" in super_options:
                why = "the kernel stopped writes after an error"
            elif "rw" in options and "ro" not in options:
                why = "the file system became read-only below a read-write mount"
            elif entry is not None and "ro" not in entry[3]:
                why = "/etc/fstab asks for read-write"
        # The last mount on a directory is the visible one.
        rows[mount] = {
            "mount": clean(mount),
            "source": clean(source),
            "kind": clean(kind, 40),
            "class": group,
            "read_only": frozen or "ro" in options,
            "unexpected_read_only": bool(why),
            "why": why,
            "options": clean(",".join(options), 200),
        }
    present = {row[0] for row in found}
    missing = [
        {"mount": clean(mount), "source": clean(source), "kind": clean(kind, 40), "nofail": "nofail" in options}
        for mount, source, kind, options, _ in declared
        if mount not in present
        and kind not in ("swap", "none", "auto_mount")
        and not {"noauto", "x-systemd.automount"} & set(options)
    ]
    listed = [rows[mount] for mount in sorted(rows)]
    complete = bool(found) and not readings.was_cut("table")
    return dict(
        readings.account(["table"] if readings.lines("findmnt") else []),
        mounts=listed if found else None,
        disks=len({row["source"] for row in listed if row["class"] == "disk"}) if found else None,
        unexpected_read_only=[row["mount"] for row in listed if row["unexpected_read_only"]] if found else None,
        missing=missing if complete and readings.lines("fstab") is not None else None,
    )


MOUNTS = Observer(
    name="mounts",
    summary="Mounted file systems, those that became read-only, and entries of /etc/fstab that are not mounted.",
    returns={
        "mounts": [
            {
                "mount": "where",
                "source": "device or server path",
                "kind": "file system type",
                "class": "disk, memory, image or remote",
                "read_only": "whether writing is refused",
                "unexpected_read_only": "read-only although it should not be",
                "why": "why it should not be",
                "options": "mount options",
            }
        ],
        "disks": "how many different sources of class disk",
        "unexpected_read_only": ["mount"],
        "missing": [{"mount": "where", "source": "what", "kind": "type", "nofail": "marked nofail"}],
    },
    first=_mounts_first,
    further=_mounts_further,
    read=_mounts_read,
)


# --- block_devices --------------------------------------------------------------------------------------------------

_LSBLK = "NAME,KNAME,PKNAME,TYPE,SIZE,RO,RM,ROTA,MODEL,FSTYPE,MOUNTPOINT,STATE"


def _devices_first(_parameters: Parameters) -> Sequence[Probe]:
    # -P, not -J: one line a device, so a cut listing still gives whole rows.
    return [command("lsblk", "lsblk", "-P", "-b", "-o", _LSBLK, output_bytes=262144)]


def _devices_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    return [] if readings.lines("lsblk") else [file("partitions", "/proc/partitions")]


def _devices_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    rows: Dict[str, JsonObject] = {}
    for line in readings.lines("lsblk") or ():
        row = pairs(line)
        size = integer(row.get("SIZE"))
        if (
            not row.get("NAME")
            or size is None
            or row.get("TYPE") == "loop"
            or (size == 0 and row.get("TYPE") == "disk")
        ):
            continue
        key = row.get("KNAME") or row["NAME"]
        if key in rows:
            # A mirror stands once below each of its disks.
            rows[key]["parents"].append(clean(row.get("PKNAME", ""), 60))
            continue
        rows[key] = {
            "name": clean(row["NAME"], 100),
            "kind": clean(row.get("TYPE", ""), 40),
            "size_bytes": size,
            "parents": [clean(row["PKNAME"], 60)] if row.get("PKNAME") else [],
            "read_only": row.get("RO") == "1",
            "removable": row.get("RM") == "1",
            "rotational": row.get("ROTA") == "1",
            "model": clean(row.get("MODEL", ""), 80) or None,
            "filesystem": clean(row.get("FSTYPE", ""), 40) or None,
            "mount": clean(row.get("MOUNTPOINT", "")) or None,
            "state": clean(row.get("STATE", ""), 40) or None,
        }
    for line in readings.lines("partitions") or ():
        words = line.split()
        blocks = integer(words[2]) if len(words) == 4 else None
        if blocks and not words[3].startswith(("loop", "ram")):
            rows[words[3]] = {
                "name": clean(words[3], 100),
                "kind": "unknown",
                "size_bytes": blocks * 1024,
                "parents": [],
                "read_only": None,
                "removable": None,
                "rotational": None,
                "model": None,
                "filesystem": None,
                "mount": None,
                "state": None,
            }
    observed = readings.lines("lsblk") is not None or readings.lines("partitions") is not None
    answered = ["lsblk"] if readings.lines("partitions") else []
    listed = list(rows.values())
    return dict(
        readings.account(answered),
        devices=listed if observed else None,
        disks=sum(row["kind"] == "disk" for row in listed) if readings.lines("lsblk") is not None else None,
    )


BLOCK_DEVICES = Observer(
    name="block_devices",
    summary="Disks, partitions, volumes and arrays (without loop devices).",
    returns={
        "devices": [
            {
                "name": "device name",
                "kind": "disk, part, lvm, crypt, raid1, rom, …",
                "size_bytes": "size",
                "parents": ["kernel name of the device it lies on"],
                "read_only": "write-protected",
                "removable": "removable",
                "rotational": "a spinning disk, or a virtual one that says so",
                "model": "model",
                "filesystem": "what is on it",
                "mount": "where it is mounted",
                "state": "state of the device (running, live, …)",
            }
        ],
        "disks": "how many whole disks",
    },
    first=_devices_first,
    further=_devices_further,
    read=_devices_read,
)
