"""Observers of the network: ``listening_sockets``, ``interfaces``, ``routes``, ``name_resolution``, ``tcp_health``.

Owns: reading ``ss``, ``ip -j``, ``/proc/net``, ``/sys/class/net``, ``resolv.conf`` and ``getent``.
Deliberately does not know: any host outside of the machine; nothing here sends a packet but a name look-up.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Dict, List, Optional, Sequence, Tuple

from tools.observers.fields import document, hexadecimal, integer, objects, percent, string, whole
from tools.observers.observer import Observer, Parameter, Parameters, Probe, Readings, clean, command, file
from tools.values import JsonObject

# Interfaces whose sysfs entries are read; a container host has hundreds of virtual ones.
DETAILED_INTERFACES = 8
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@:-]{0,14}")


def _address(text: str) -> Optional[str]:
    """An IP address in its normal form, else ``None``."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def _scope(address: str) -> str:
    """Who can reach a listening address: ``any``, ``loopback`` or ``address`` (one address of the machine)."""
    if address in ("*", "0.0.0.0", "::"):
        return "any"
    mapped = ipaddress.ip_address(address)
    inner = getattr(mapped, "ipv4_mapped", None) or mapped
    return "loopback" if inner.is_loopback else "address"


# --- listening_sockets ----------------------------------------------------------------------------------------------


def _sockets_first(_parameters: Parameters) -> Sequence[Probe]:
    return [command("ss", "ss", "-H", "-l", "-n", "-t", "-u", "-p", "-e", output_bytes=262144)]


def _sockets_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    if readings.lines("ss") is not None:
        return []
    return [
        file("tcp", "/proc/self/net/tcp", output_bytes=262144),
        file("tcp6", "/proc/self/net/tcp6", optional=True, output_bytes=262144),
        file("udp", "/proc/self/net/udp"),
        file("udp6", "/proc/self/net/udp6", optional=True),
    ]


_USERS = re.compile(r'users:\(\("((?:[^"\\]|\\.){0,64})",pid=([0-9]{1,10}),fd=[0-9]+\)')


def _ss_row(line: str) -> Optional[JsonObject]:
    words = line.split()
    if len(words) < 6 or words[0] not in ("tcp", "udp") or words[1] not in ("LISTEN", "UNCONN"):
        return None
    host, colon, port = words[4].rpartition(":")
    host, _, interface = host.partition("%")
    host = host.strip("[]")
    if interface:
        interface = interface.strip("[]")
    number, queue, limit = integer(port), integer(words[2]), integer(words[3])
    address = "*" if host == "*" else _address(host)
    if not colon or number is None or address is None or queue is None or limit is None:
        return None
    rest = " ".join(words[6:])
    user = _USERS.search(rest)
    uid = re.search(r"(?:^| )uid:([0-9]{1,10})(?: |$)", rest)
    group = re.search(r"(?:^| )cgroup:(/\S*)", rest)
    unit = group.group(1).rpartition("/")[2] if group else ""
    return {
        "protocol": words[0],
        "address": address,
        "port": number,
        "interface": clean(interface, 20) or None,
        "scope": _scope(address),
        "process": clean(user.group(1), 64) if user else None,
        "pid": int(user.group(2)) if user else None,
        "uid": int(uid.group(1)) if uid else 0,
        "unit": clean(unit, 120) if "." in unit else None,
        # For a listener these are connections waiting to be accepted and how many may wait.
        "queue": queue if words[0] == "tcp" else None,
        "queue_limit": limit if words[0] == "tcp" else None,
    }


def _proc_address(text: str) -> Optional[str]:
    """The address of a hexadecimal ``/proc/net`` entry: 32-bit words in the byte order of the machine (little)."""
    if len(text) not in (8, 32) or hexadecimal(text) is None:
        return None
    raw = bytes.fromhex(text)
    turned = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return str(ipaddress.ip_address(turned))


def _proc_row(protocol: str, line: str) -> Optional[JsonObject]:
    words = line.split()
    # 0A is LISTEN for TCP, 07 an unconnected UDP socket; after the state: "tx:rx" in hexadecimal.
    wanted = {"tcp": "0A", "udp": "07"}[protocol]
    if len(words) < 10 or words[3] != wanted or not words[0].endswith(":"):
        return None
    host, _, port = words[1].partition(":")
    address, number, uid = _proc_address(host), hexadecimal(port), integer(words[7])
    if address is None or number is None or number > 65535 or uid is None:
        return None
    waiting = hexadecimal(words[4].partition(":")[2])
    return {
        "protocol": protocol,
        "address": address,
        "port": number,
        "interface": None,
        "scope": _scope(address),
        "process": None,
        "pid": None,
        "uid": uid,
        "unit": None,
        "queue": waiting if protocol == "tcp" else None,
        "queue_limit": None,
    }


def _sockets_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    lines = readings.lines("ss")
    observed = lines is not None
    rows = [row for row in map(_ss_row, lines or ()) if row is not None]
    for name in ("tcp", "tcp6", "udp", "udp6"):
        listed = readings.lines(name)
        observed = observed or (listed is not None and name == "tcp")
        rows += [row for row in (_proc_row(name[:3], line) for line in listed or ()) if row is not None]
    rows.sort(key=lambda row: (row["protocol"], row["port"], row["address"]))
    exposed = sorted({(row["protocol"], row["port"]) for row in rows if row["scope"] != "loopback"})
    full = [
        row for row in rows if row["queue"] is not None and row["queue_limit"] and row["queue"] >= row["queue_limit"]
    ]
    return dict(
        readings.account(["ss"] if readings.lines("tcp") is not None else []),
        sockets=rows if observed else None,
        listening=len(rows) if observed else None,
        exposed=["%s/%d" % pair for pair in exposed] if observed else None,
        queue_full=[dict(row) for row in full] if observed and lines is not None else None,
    )


_SOCKET = {
    "protocol": "tcp or udp",
    "address": "local address, * for all",
    "port": "port",
    "interface": "bound to",
    "scope": "any, address (one of the machine) or loopback",
    "process": "name, where it may be seen",
    "pid": "its id",
    "uid": "owner",
    "unit": "systemd unit or control group",
    "queue": "connections waiting to be accepted",
    "queue_limit": "how many may wait",
}

LISTENING_SOCKETS = Observer(
    name="listening_sockets",
    summary="TCP and UDP sockets that wait for others, who can reach them and, where visible, which unit has them.",
    returns={
        "sockets": [_SOCKET],
        "listening": "how many",
        "exposed": ["protocol/port not only on loopback"],
        "queue_full": [_SOCKET],
    },
    first=_sockets_first,
    further=_sockets_further,
    read=_sockets_read,
)


# --- interfaces -----------------------------------------------------------------------------------------------------


def _interfaces_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        command("ip", "ip", "-j", "-s", "address", "show", output_bytes=524288),
        file("dev", "/proc/self/net/dev"),
        file("bonds", "/sys/class/net/bonding_masters", optional=True),
    ]


def _ip_objects(readings: Readings, name: str) -> List[JsonObject]:
    return objects(document(readings.text(name)))


def _dev_rows(lines: Optional[Sequence[str]]) -> Dict[str, List[int]]:
    """The 16 counters of ``/proc/net/dev`` by interface."""
    rows: Dict[str, List[int]] = {}
    for line in lines or ():
        name, colon, rest = line.partition(":")
        counters = [integer(word) for word in rest.split()]
        if colon and len(counters) == 16 and _INTERFACE.fullmatch(name.strip()):
            rows[name.strip()] = [counter for counter in counters if counter is not None]
    return {name: counters for name, counters in rows.items() if len(counters) == 16}


def _interfaces_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    shown = [string(item.get("ifname")) or "" for item in _ip_objects(readings, "ip")]
    names = [
        name for name in shown or list(_dev_rows(readings.lines("dev"))) if _INTERFACE.fullmatch(name) and name != "lo"
    ]
    # Virtual ends of containers last: what is read in detail should be what has a cable.
    names.sort(key=lambda name: name.startswith(("veth", "cali", "tap", "vnet", "lxc", "cni", "flannel")))
    probes: List[Probe] = []
    for name in names[:DETAILED_INTERFACES]:
        base = "/sys/class/net/%s/" % name
        for field in ("operstate", "carrier_changes", "speed", "duplex", "device/uevent"):
            probes.append(file("%s:%s" % (field, name), base + field, optional=True))
    for bond in (readings.first_line("bonds") or "").split()[:4]:
        if _INTERFACE.fullmatch(bond):
            probes.append(file("bond:" + bond, "/proc/self/net/bonding/" + bond, optional=True))
    return probes


def _counters(item: JsonObject, dev: Optional[List[int]]) -> JsonObject:
    """Traffic counters, from ``ip -s`` or else from ``/proc/net/dev``."""
    stats = item.get("stats64") or item.get("stats")
    values: Dict[str, Optional[int]] = {}
    for side, at in (("rx", 0), ("tx", 8)):
        part = stats.get(side) if isinstance(stats, dict) else None
        for offset, field in enumerate(("bytes", "packets", "errors", "dropped")):
            value = whole(part.get(field)) if isinstance(part, dict) else None
            values["%s_%s" % (side, field)] = value if value is not None else dev[at + offset] if dev else None
    return dict(values)


def _errors_percent(counters: JsonObject) -> Optional[float]:
    """The worse direction's errors in percent of its packets; ``None`` where too little was sent to say."""
    shares: List[float] = []
    for side in ("rx", "tx"):
        errors, packets = counters[side + "_errors"], counters[side + "_packets"]
        if errors is None or packets is None:
            return None
        if errors + packets >= 1000:
            shares.append(round(100.0 * errors / (errors + packets), 3))
    return max(shares, default=0.0)


def _interface_kind(name: str, item: JsonObject, physical: bool) -> str:
    if name == "lo" or item.get("link_type") == "loopback":
        return "loopback"
    return "physical" if physical else "virtual"


def _interfaces_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    dev = _dev_rows(readings.lines("dev"))
    shown = {str(item["ifname"]): item for item in _ip_objects(readings, "ip") if isinstance(item.get("ifname"), str)}
    observed = bool(shown) or readings.lines("dev") is not None
    rows: List[JsonObject] = []
    for name in list(shown) or list(dev):
        item = shown.get(name, {})
        flags = item.get("flags") if isinstance(item.get("flags"), list) else None
        state = string(item.get("operstate")) or readings.first_line("operstate:" + name)
        addresses = [
            "%s/%s" % (address, length)
            for address, length in (
                (string(a.get("local")), whole(a.get("prefixlen"))) for a in objects(item.get("addr_info"))
            )
            if address is not None and _address(address) and length is not None
        ]
        counters = _counters(item, dev.get(name))
        speed = integer(readings.first_line("speed:" + name))
        physical = readings.text("device/uevent:" + name) is not None
        rows.append(
            {
                "name": clean(name, 40),
                "kind": _interface_kind(name, item, physical),
                "state": clean(state.lower(), 20) if state else None,
                "enabled": "UP" in flags if flags is not None else None,
                "carrier": "LOWER_UP" in flags and "NO-CARRIER" not in flags
                if flags is not None
                else (state == "up" if state else None),
                "mtu": whole(item.get("mtu")),
                "mac": clean(string(item.get("address")) or "", 60) or None,
                "addresses": addresses if shown else None,
                "speed_mbit": speed if speed is not None and speed > 0 else None,
                "duplex": clean(readings.first_line("duplex:" + name) or "", 20) or None,
                "carrier_changes": integer(readings.first_line("carrier_changes:" + name)),
                "errors_percent": _errors_percent(counters),
            }
        )
        rows[-1].update(counters)
    down = [
        row["name"]
        for row in rows
        if row["kind"] == "physical" and row["enabled"] and row["carrier"] is False and row["addresses"]
    ]
    # A virtual interface has no speed; the kernel says so with "Invalid argument".
    speechless = [name for name in readings.names() if "Invalid argument" in readings.problem(name)]
    return dict(
        readings.account([*speechless, "ip"] if dev and not shown else speechless),
        interfaces=rows if observed else None,
        up=[row["name"] for row in rows if row["carrier"] and row["kind"] != "loopback"] if observed else None,
        without_carrier=down if observed and shown else None,
        bonds=_bonds(readings) if observed else None,
    )


def _bonds(readings: Readings) -> List[JsonObject]:
    """State of bonds and their members, Documentation/networking/bonding of the kernel."""
    bonds: List[JsonObject] = []
    for name in readings.names("bond:"):
        members: List[JsonObject] = []
        up: Optional[bool] = None
        for line in readings.lines(name) or ():
            key, _, value = line.partition(": ")
            key, value = key.strip(), value.strip()
            if key == "Slave Interface":
                members.append({"name": clean(value, 40), "up": None, "failures": None})
            elif key == "MII Status" and members:
                members[-1]["up"] = value == "up"
            elif key == "MII Status":
                up = value == "up"
            elif key == "Link Failure Count" and members:
                members[-1]["failures"] = integer(value)
        if readings.lines(name) is not None:
            down = [member["name"] for member in members if member["up"] is False]
            bonds.append({"name": clean(name[5:], 40), "up": up, "members": members, "members_down": down})
    return bonds


INTERFACES = Observer(
    name="interfaces",
    summary="Network interfaces: state, addresses, traffic, errors, bonds.",
    returns={
        "interfaces": [
            {
                "name": "name",
                "kind": "physical, virtual or loopback",
                "state": "up, down, unknown, …",
                "enabled": "set up",
                "carrier": "a link is there",
                "mtu": "bytes in a packet",
                "mac": "hardware address",
                "addresses": ["address/prefix"],
                "speed_mbit": "link speed",
                "duplex": "full or half",
                "carrier_changes": "how often the link came or went",
                "errors_percent": "errors of packets, worse direction",
                "rx_bytes": "received",
                "rx_packets": "received",
                "rx_errors": "received broken",
                "rx_dropped": "received and dropped",
                "tx_bytes": "sent",
                "tx_packets": "sent",
                "tx_errors": "not sent",
                "tx_dropped": "dropped before sending",
            }
        ],
        "up": ["name"],
        "without_carrier": ["physical, enabled, with an address and without a link"],
        "bonds": [
            {
                "name": "name",
                "up": "state",
                "members": [{"name": "name", "up": "state", "failures": "link failures"}],
                "members_down": ["name"],
            }
        ],
    },
    first=_interfaces_first,
    further=_interfaces_further,
    read=_interfaces_read,
)


# --- routes ---------------------------------------------------------------------------------------------------------


def _routes_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        command("ip4", "ip", "-j", "route", "show", output_bytes=262144),
        command("ip6", "ip", "-j", "-6", "route", "show", output_bytes=262144),
        command("neighbours", "ip", "-j", "neigh", "show", output_bytes=262144),
    ]


def _routes_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    more: List[Probe] = []
    if document(readings.text("ip4") or "[]" if not readings.problem("ip4") else None) is None:
        more.append(file("route", "/proc/self/net/route", output_bytes=262144))
    if document(readings.text("ip6") or "[]" if not readings.problem("ip6") else None) is None:
        more.append(file("route6", "/proc/self/net/ipv6_route", optional=True, output_bytes=262144))
    return more


def _ip_routes(readings: Readings, name: str, family: str) -> List[JsonObject]:
    rows: List[JsonObject] = []
    for item in _ip_objects(readings, name):
        destination = string(item.get("dst"))
        flags = item.get("flags")
        if destination is None or string(item.get("type")) in ("unreachable", "blackhole", "prohibit"):
            continue
        # Several next hops stand below "nexthops".
        for hop in [item] if "dev" in item or "gateway" in item else objects(item.get("nexthops")):
            hop_flags = hop.get("flags") if isinstance(hop.get("flags"), list) else flags
            via = hop.get("via")
            gateway = string(hop.get("gateway")) or (string(via.get("host")) if isinstance(via, dict) else None)
            rows.append(
                {
                    "family": family,
                    "destination": clean(destination, 60),
                    "gateway": clean(gateway, 60) if gateway else None,
                    "interface": clean(string(hop.get("dev")) or string(item.get("dev")) or "", 40) or None,
                    "metric": whole(item.get("metric")),
                    "source": string(item.get("prefsrc")),
                    "protocol": clean(string(item.get("protocol")) or "", 40) or None,
                    "usable": not (
                        isinstance(hop_flags, list) and {"linkdown", "dead"} & {str(flag) for flag in hop_flags}
                    ),
                }
            )
    return rows


def _proc_routes(lines: Optional[Sequence[str]]) -> List[JsonObject]:
    rows: List[JsonObject] = []
    for line in lines or ():
        words = line.split()
        if len(words) < 8:
            continue
        target, gateway, mask = (_proc_address(words[at]) for at in (1, 2, 7))
        flags, metric = hexadecimal(words[3]), integer(words[6])
        # 0x0001: up, 0x0002: through a gateway, 0x0200: reject.
        if target is None or gateway is None or mask is None or flags is None or not flags & 1 or flags & 0x200:
            continue
        if len(words[1]) != 8 or len(words[7]) != 8:
            continue
        length = bin(int(words[7], 16)).count("1")
        rows.append(
            {
                "family": "ipv4",
                "destination": "default" if not length else "%s/%d" % (target, length),
                "gateway": gateway if flags & 2 else None,
                "interface": clean(words[0], 40),
                "metric": metric,
                "source": None,
                "protocol": None,
                "usable": True,
            }
        )
    return rows


def _proc_routes6(lines: Optional[Sequence[str]]) -> List[JsonObject]:
    rows: List[JsonObject] = []
    for line in lines or ():
        words = line.split()
        if len(words) != 10 or any(len(words[at]) != 32 for at in (0, 4)):
            continue
        raw = [hexadecimal(words[at]) for at in (0, 1, 4, 5, 8)]
        target, length, gateway, metric, flags = raw
        if target is None or length is None or gateway is None or metric is None or flags is None or length > 128:
            continue
        # Local and multicast entries (0x80000000) and rejects (0x0200) are no routes an administrator thinks of.
        if words[9] == "lo" or not flags & 1 or flags & 0x80000200 or target >> 120 == 0xFF:
            continue
        rows.append(
            {
                "family": "ipv6",
                "destination": "default" if not length else "%s/%d" % (ipaddress.IPv6Address(target), length),
                "gateway": str(ipaddress.IPv6Address(gateway)) if flags & 2 else None,
                "interface": clean(words[9], 40),
                "metric": metric,
                "source": None,
                "protocol": None,
                "usable": True,
            }
        )
    return rows


def _routes_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    rows = _ip_routes(readings, "ip4", "ipv4") + _ip_routes(readings, "ip6", "ipv6")
    rows += _proc_routes(readings.lines("route")) + _proc_routes6(readings.lines("route6"))
    asked4 = isinstance(document(readings.text("ip4") or ("" if readings.problem("ip4") else "[]")), list)
    observed = asked4 or readings.lines("route") is not None
    states: Dict[Tuple[str, str], str] = {}
    for item in _ip_objects(readings, "neighbours"):
        state = item.get("state")
        key = (string(item.get("dst")) or "", string(item.get("dev")) or "")
        if isinstance(state, list) and state and isinstance(state[0], str):
            states[key] = clean(state[0].lower(), 20)
    defaults: List[JsonObject] = []
    for row in rows:
        if row["destination"] in ("default", "0.0.0.0/0", "::/0"):
            neighbour = states.get((row["gateway"] or "", row["interface"] or ""))
            defaults.append(dict(row, gateway_state=neighbour))
    defaults.sort(key=lambda row: (row["family"], row["metric"] or 0))
    answered = [name for name, other in (("ip4", "route"), ("ip6", "route6")) if readings.lines(other) is not None]
    if "ip4" in answered and readings.missing("ip4"):
        answered.append("neighbours")
    return dict(
        readings.account(answered),
        routes=rows[:200] if observed else None,
        total=len(rows) if observed else None,
        default_routes=defaults if observed else None,
        defaults=len(defaults) if observed else None,
        gateways=sorted({row["gateway"] for row in defaults if row["gateway"]}) if observed else None,
    )


_ROUTE = {
    "family": "ipv4 or ipv6",
    "destination": "network or default",
    "gateway": "next hop",
    "interface": "through",
    "metric": "smaller is preferred",
    "source": "address used",
    "protocol": "who set it (kernel, dhcp, static, …)",
    "usable": "its link is there",
}

ROUTES = Observer(
    name="routes",
    summary="Routes of the main table, the default gateways and whether they answer on the local network.",
    returns={
        "routes": [_ROUTE],
        "total": "how many",
        "default_routes": [dict(_ROUTE, gateway_state="reachable, stale, delay, failed, …; null where not known")],
        "defaults": "how many",
        "gateways": ["address"],
    },
    first=_routes_first,
    further=_routes_further,
    read=_routes_read,
)


# --- name_resolution ------------------------------------------------------------------------------------------------


def _names_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        file("resolv", "/etc/resolv.conf"),
        file("nsswitch", "/etc/nsswitch.conf", optional=True),
        file("upstream", "/run/systemd/resolve/resolv.conf", optional=True),
        file("hostname", "/proc/sys/kernel/hostname"),
    ]


def _looked_up(readings: Readings, parameters: Parameters) -> Optional[str]:
    """The name to look up: the one given, else the machine's own."""
    if parameters["name"]:
        return str(parameters["name"])
    own = readings.first_line("hostname") or ""
    return own if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}", own) else None


def _names_further(readings: Readings, parameters: Parameters) -> Sequence[Probe]:
    name = _looked_up(readings, parameters)
    # 2: "one or more supplied key could not be found", an answer.
    return [command("lookup", "getent", "ahosts", name, ok_statuses=(0, 2))] if name else []


def _nameservers(lines: Optional[Sequence[str]]) -> Tuple[List[str], List[str], List[str]]:
    """Servers, search domains and options of a resolv.conf."""
    servers: List[str] = []
    search: List[str] = []
    options: List[str] = []
    for line in lines or ():
        words = re.split(r"[#;]", line, maxsplit=1)[0].split()
        if len(words) < 2:
            continue
        if words[0] == "nameserver":
            host, _, zone = words[1].partition("%")
            address = _address(host)
            if address:
                servers.append(address + ("%" + clean(zone, 20) if zone else ""))
        elif words[0] in ("search", "domain"):
            search = [clean(word, 120) for word in words[1:20]]
        elif words[0] == "options":
            options += [clean(word, 60) for word in words[1:20]]
    return servers, search, options


def _names_read(readings: Readings, parameters: Parameters) -> JsonObject:
    servers, search, options = _nameservers(readings.lines("resolv"))
    upstream, _, _ = _nameservers(readings.lines("upstream"))
    stub = any(server.startswith(("127.", "::1")) for server in servers)
    order = None
    for line in readings.lines("nsswitch") or ():
        key, colon, rest = line.partition(":")
        if colon and key.strip() == "hosts":
            order = [clean(word, 40) for word in rest.partition("#")[0].split()[:20]]
    result = readings.result("lookup")
    lines = readings.lines("lookup")
    addresses: List[str] = []
    for line in lines or ():
        address = _address(line.split()[0].partition("%")[0])
        if address and address not in addresses:
            addresses.append(address)
    answered = result is not None and lines is not None
    timed_out = result is not None and result.timed_out
    observed = readings.lines("resolv") is not None
    # Of a look-up that was cut off by the time limit only one thing is known: it did not answer in time.
    found = bool(addresses) if answered else False if timed_out else None
    return dict(
        readings.account(),
        servers=servers if observed else None,
        local_stub=stub if observed else None,
        upstream_servers=upstream if readings.lines("upstream") is not None else None,
        search=search if observed else None,
        options=options if observed else None,
        hosts_order=order,
        name=_looked_up(readings, parameters),
        found=found,
        addresses=addresses[:20] if answered else None,
        lookup_ms=round(result.duration_ms, 1) if result is not None and (answered or timed_out) else None,
    )


NAME_RESOLUTION = Observer(
    name="name_resolution",
    summary="How names are resolved, and whether and how fast one is: the given one, or the machine's own.",
    parameters=(
        Parameter("name", "host", "The name to look up (default: the machine's own, which asks no one else)."),
    ),
    returns={
        "servers": ["address"],
        "local_stub": "a resolver on this machine is asked",
        "upstream_servers": ["address"],
        "search": ["domain"],
        "options": ["option"],
        "hosts_order": ["source of nsswitch.conf"],
        "name": "looked up",
        "found": "whether it has an address",
        "addresses": ["address"],
        "lookup_ms": "how long that took, milliseconds",
    },
    first=_names_first,
    further=_names_further,
    read=_names_read,
)


# --- tcp_health -----------------------------------------------------------------------------------------------------


def _tcp_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        file("snmp", "/proc/self/net/snmp"),
        file("netstat", "/proc/self/net/netstat", optional=True),
        file("sockstat", "/proc/self/net/sockstat", optional=True),
    ]


def _protocol_counters(lines: Optional[Sequence[str]]) -> Dict[str, int]:
    """``Tcp.RetransSegs`` and so on from the pairs of lines of ``/proc/net/snmp`` and ``netstat``."""
    found: Dict[str, int] = {}
    rows = list(lines or ())
    for names, values in zip(rows, rows[1:]):  # noqa: RUF007 - Python 3.9 has no pairwise
        head, _, keys = names.partition(":")
        again, _, figures = values.partition(":")
        words, numbers = keys.split(), figures.split()
        if head != again or len(words) != len(numbers) or not words or integer(words[0]) is not None:
            continue
        for word, figure in zip(words, numbers):
            value = integer(figure)
            if value is not None:
                found["%s.%s" % (head, word)] = value
    return found


def _tcp_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    counters = _protocol_counters(readings.lines("snmp"))
    counters.update(_protocol_counters(readings.lines("netstat")))
    sockets: Dict[str, int] = {}
    for line in readings.lines("sockstat") or ():
        head, _, rest = line.partition(":")
        words = rest.split()
        for name, figure in zip(words[::2], words[1::2]):
            value = integer(figure)
            if value is not None:
                sockets["%s.%s" % (head, name)] = value
    sent, again = counters.get("Tcp.OutSegs"), counters.get("Tcp.RetransSegs")
    return dict(
        readings.account(),
        established=counters.get("Tcp.CurrEstab"),
        time_wait=sockets.get("TCP.tw"),
        orphaned=sockets.get("TCP.orphan"),
        sockets_used=sockets.get("sockets.used"),
        segments_sent=sent,
        retransmitted_percent=percent(again, sent) if sent is not None and sent >= 10000 else None,
        listen_overflows=counters.get("TcpExt.ListenOverflows"),
        listen_drops=counters.get("TcpExt.ListenDrops"),
        udp_receive_buffer_errors=counters.get("Udp.RcvbufErrors"),
    )


TCP_HEALTH = Observer(
    name="tcp_health",
    summary="Counters of TCP and UDP since boot: retransmissions, overflowing listeners, socket states.",
    returns={
        "established": "connections now",
        "time_wait": "closed, waiting",
        "orphaned": "without a process",
        "sockets_used": "sockets",
        "segments_sent": "since boot",
        "retransmitted_percent": "of what was sent; null below 10,000 segments",
        "listen_overflows": "connections lost because a program accepted too slowly",
        "listen_drops": "connections dropped",
        "udp_receive_buffer_errors": "datagrams lost because a program read too slowly",
    },
    first=_tcp_first,
    read=_tcp_read,
)
