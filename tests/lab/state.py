"""Who owns which lab, on disk, so that a lab whose owner was killed is taken away by the next one.

The record is written before anything is made, and everything a lab makes can be found from its id: there is no moment
at which a killed owner leaves something nobody knows of. Only what carries a dead owner's id is ended.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.lab import box, network

STATE = Path("/run/chargehand-lab")


@dataclass(frozen=True)
class Record:
    """One lab and the process that answers for it."""

    lab_id: str
    owner: int
    owner_started: int
    """Clock ticks since boot: a pid alone may be somebody else's by now."""
    folder: str
    """Where the trees of its machines lie."""

    @property
    def owner_lives(self) -> bool:
        """Whether the very process that made the lab is still there."""
        return box.start_time(self.owner) == self.owner_started


def lock_path() -> Path:
    """The lock under which labs are begun and swept, one at a time."""
    return STATE / "lock"


def begin() -> Record:
    """Write down a new lab, owned by this process."""
    lab_id = secrets.token_hex(3)
    started = box.start_time(os.getpid())
    assert started is not None
    record = Record(lab_id, os.getpid(), started, str(box.cache_directory() / "labs" / lab_id))
    folder = STATE / lab_id
    folder.mkdir(parents=True)
    unfinished = folder / "state.json.new"
    unfinished.write_text(json.dumps(asdict(record)))
    unfinished.rename(folder / "state.json")
    Path(record.folder).mkdir(parents=True, mode=0o711)
    return record


def records() -> list[Record]:
    """Every lab written down on this box, of living and of dead owners."""
    found = []
    for path in sorted(STATE.glob("*/state.json")):
        found.append(Record(**json.loads(path.read_text())))
    return found


def cgroup(lab_id: str) -> Path:
    """The cgroup that holds every process of every machine of the lab, and nothing else."""
    root = box.cgroup_root()
    if root is None:
        raise box.LabError("no unified cgroup hierarchy is mounted; the lab cannot hold its processes together")
    return root / f"chargehand-lab-{lab_id}"


def take_away(record: Record) -> None:
    """Remove all that the lab made: processes, network, mounts, files, and at last its record."""
    box.kill_cgroup(cgroup(record.lab_id))
    network.remove_network(record.lab_id)
    box.unmount_below(Path(record.folder))
    box.remove_tree(Path(record.folder))
    shutil.rmtree(STATE / record.lab_id, ignore_errors=True)


def sweep() -> list[str]:
    """Take away every lab whose owner is dead; the ids of those. The caller holds `lock_path`."""
    swept = []
    for record in records():
        if not record.owner_lives:
            take_away(record)
            swept.append(record.lab_id)
    return swept
