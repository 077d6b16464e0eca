"""The lab's own network: one bridge on the box, one network namespace and one cable (a veth pair) per machine.

Names are made from the lab's id alone, so what a dead lab left can be found without its memory. Machines reach the
box and each other and nothing else: there is no route out. Knows nothing of what runs in a namespace.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path

from tests.lab import box

SUBNETS = ipaddress.IPv4Network("10.213.0.0/16")
FIRST_HOST = 10
INSIDE = "eth0"

MEND_SECONDS = 10.0
"""The kernel may report a link that comes up as much as a second late."""
BRIDGE_FORWARDING = "3"
"""BR_STATE_FORWARDING of linux/if_bridge.h."""


@dataclass(frozen=True)
class Cable:
    """What joins one machine to the bridge."""

    namespace: str
    outside: str
    """The end on the bridge, on the box."""
    bridge: str
    address: str

    def down(self) -> None:
        """Pull the plug: the machine sees its link go."""
        box.run(["ip", "link", "set", self.outside, "down"])

    def detach(self) -> None:
        """Lose every packet from now on; both ends still see a link."""
        box.run(["ip", "link", "set", self.outside, "nomaster"])

    def mend(self) -> None:
        """Undo `down` and `detach`; returns when packets pass again."""
        box.run(["ip", "link", "set", self.outside, "master", self.bridge, "up"])
        box.wait_until(self._forwards, MEND_SECONDS, f"{self.outside} to forward on {self.bridge}")
        # Each side may remember that it could not find the other, and would refuse to look again for a while.
        box.run(["ip", "neighbour", "flush", "dev", self.bridge, "to", self.address])
        box.run(["ip", "-n", self.namespace, "neighbour", "flush", "dev", INSIDE])

    def _forwards(self) -> bool:
        link = Path("/sys/class/net") / self.outside
        up = (link / "operstate").read_text().strip() == "up"
        return up and (link / "brport/state").read_text().strip() == BRIDGE_FORWARDING

    def remove(self) -> None:
        """Take the namespace away, and with it both ends."""
        box.run(["ip", "link", "del", self.outside], check=False)
        box.run(["ip", "netns", "del", self.namespace], check=False)


def bridge_name(lab_id: str) -> str:
    """A Linux interface name holds 15 characters."""
    return f"chl-{lab_id}"


def free_subnet() -> ipaddress.IPv4Network:
    """The first /24 of `SUBNETS` that no address and no route of the box touches."""
    taken = []
    for link in json.loads(box.run(["ip", "-4", "-json", "address"]).stdout or b"[]"):
        for entry in link.get("addr_info", []):
            taken.append(ipaddress.IPv4Interface(f"{entry['local']}/{entry['prefixlen']}").network)
    for route in json.loads(box.run(["ip", "-4", "-json", "route", "show", "table", "all"]).stdout or b"[]"):
        if route.get("dst", "default") != "default":
            taken.append(ipaddress.IPv4Network(route["dst"], strict=False))
    for subnet in SUBNETS.subnets(new_prefix=24):
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise box.LabError(f"no free /24 is left in {SUBNETS}; end another lab (python -m tests.lab sweep shows dead ones)")


def make_bridge(lab_id: str) -> ipaddress.IPv4Network:
    """Make the lab's bridge on a free subnet. The caller holds the lock that keeps two labs from choosing the same."""
    subnet = free_subnet()
    name = bridge_name(lab_id)
    box.run(["ip", "link", "add", name, "type", "bridge", "forward_delay", "0"])
    box.run(["ip", "address", "add", f"{subnet[1]}/24", "dev", name])
    box.run(["ip", "link", "set", name, "up"])
    return subnet


def make_cable(lab_id: str, number: int, subnet: ipaddress.IPv4Network) -> Cable:
    """Make the namespace of machine `number` (from 0) with an address, joined to the lab's bridge."""
    cable = Cable(
        namespace=f"chl-{lab_id}-{number}",
        outside=f"chl{lab_id}-{number}",
        bridge=bridge_name(lab_id),
        address=str(subnet[FIRST_HOST + number]),
    )
    inside = ["ip", "-n", cable.namespace]
    box.run(["ip", "netns", "add", cable.namespace])
    box.run(["ip", "link", "add", cable.outside, "type", "veth", "peer", "name", INSIDE, "netns", cable.namespace])
    box.run([*inside, "link", "set", "lo", "up"])
    box.run([*inside, "address", "add", f"{cable.address}/24", "dev", INSIDE])
    box.run([*inside, "link", "set", INSIDE, "up"])
    cable.mend()
    return cable


def remove_network(lab_id: str) -> None:
    """Take away every interface and namespace whose name says it is this lab's."""
    for link in Path("/sys/class/net").iterdir():
        if link.name.startswith((f"chl{lab_id}-", bridge_name(lab_id))):
            box.run(["ip", "link", "del", link.name], check=False)
    namespaces = Path("/run/netns")
    for namespace in namespaces.iterdir() if namespaces.is_dir() else ():
        if namespace.name.startswith(f"chl-{lab_id}-"):
            box.run(["ip", "netns", "del", namespace.name], check=False)
