"""The observer ``certificates``: X.509 certificates in PEM files under given roots and when they expire.

Owns: which files are looked at, in three phases: list, leave out those that hold a private key, read.
Deliberately does not know: the formats' insides (``tools.observers.der``), trust stores (they are left out: a list of
hundreds of authorities is the distribution's business), and private keys. A file with a key in it is never read, so
that no key gets into evidence: ``grep -L`` names the files without one; of the others ``openssl x509`` prints the dates.
"""

from __future__ import annotations

import re
from typing import List, Optional, Sequence

from tools.observers.der import Certificate, pem_certificates
from tools.observers.fields import integer, keyed, seconds_of_utc, utc
from tools.observers.observer import Observer, Parameter, Parameters, Probe, Readings, clean, command, file
from tools.values import JsonObject

ROOTS = (
    "/etc/ssl",
    "/etc/pki/tls",
    "/etc/letsencrypt/live",
    "/etc/nginx",
    "/etc/apache2",
    "/etc/httpd",
    "/etc/haproxy",
    "/etc/kubernetes/pki",
    "/etc/postfix",
    "/etc/dovecot",
    "/etc/cockpit/ws-certs.d",
    "/etc/docker",
    "/etc/gitlab/ssl",
)
# Of 64 probes three list, filter and tell the time.
MAX_FILES = 48
# A file with more certificates is a trust store, not somebody's certificate chain.
MAX_CHAIN = 12
# Files with a certificate and its key in one (haproxy): openssl says the dates without showing the key.
MAX_KEY_FILES = 8
_X509 = ("x509", "-noout", "-subject", "-issuer", "-startdate", "-enddate", "-nameopt", "RFC2253")
_OPENSSL_TIME = "%b %d %H:%M:%S %Y GMT"
# The number of seconds in a day.
_DAY = 86400

_NAMES = ("-name", "*.pem", "-o", "-name", "*.crt", "-o", "-name", "*.cer", "-o", "-name", "*.cert")
_STORES = re.compile(
    r"/(?:ca-certificates|ca-bundle|tls-ca-bundle|cacert|ca-bundle\.trust)\.(?:crt|pem)$"
    r"|^/etc/(?:ssl|pki/tls)/cert\.pem$|/extracted/|/ca-trust/"
)
_KEY_NAMES = re.compile(r"(?:^|[._-])(?:key|privkey|private|dhparams?|dh[0-9]*)(?:[._-]|$)", re.IGNORECASE)
_PLAIN = re.compile(r"/[A-Za-z0-9_@%+=:,./~-]{1,1000}")


def _listed(readings: Readings) -> List[str]:
    """The files that may hold a certificate somebody on this machine cares for."""
    found: List[str] = []
    for name in ("files", "links"):
        for path in readings.lines(name) or ():
            base = path.rpartition("/")[2]
            if not _PLAIN.fullmatch(path) or _STORES.search(path) or _KEY_NAMES.search(base) or path in found:
                continue
            # On Debian this directory holds a link for each of the distribution's own authorities.
            if name == "links" and path.startswith(("/etc/ssl/certs/", "/etc/pki/tls/certs/")):
                continue
            found.append(path)
    return sorted(found)


def _first(parameters: Parameters) -> Sequence[Probe]:
    roots = parameters["roots"]
    find = ("find", *roots, "-maxdepth", "3")
    return [
        command("now", "date", "+%s"),
        command("files", *find, "-type", "f", "(", *_NAMES, ")", partial=True, optional=True, output_bytes=262144),
        command("links", *find, "-type", "l", "(", *_NAMES, ")", partial=True, optional=True, output_bytes=262144),
    ]


def _further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    paths = _listed(readings)[:MAX_FILES]
    if not paths:
        return []
    # Its exit status differs between versions of grep; what it prints does not.
    probes = [command("keyless", "grep", "-L", "-e", "PRIVATE KEY", *paths, ok_statuses=(0, 1), partial=True)]
    keyless = readings.lines("keyless")
    for path in keyless or ():
        if path in paths:
            probes.append(file("file:" + path, path, output_bytes=262144))
    with_key = _with_key(readings, paths)[:MAX_KEY_FILES]
    return probes + [command("x509:" + path, "openssl", *_X509, "-in", path, optional=True) for path in with_key]


def _with_key(readings: Readings, paths: Sequence[str]) -> List[str]:
    """The files among ``paths`` that hold a private key: searched, readable, and not named as without one."""
    result, keyless = readings.result("keyless"), readings.lines("keyless")
    if (
        result is None
        or result.cut
        or result.exit_status not in (0, 1, 2)
        or (keyless is None and result.exit_status == 2)
    ):
        return []
    return [path for path in paths if path not in (keyless or ()) and path + ":" not in result.stderr]


def _printed(lines: Optional[Sequence[str]]) -> Optional[Certificate]:
    """What ``openssl x509`` prints about the first certificate of a file."""
    shown = keyed(lines)
    start = seconds_of_utc(" ".join(shown.get("notBefore", "").split()), _OPENSSL_TIME)
    end = seconds_of_utc(" ".join(shown.get("notAfter", "").split()), _OPENSSL_TIME)
    subject, issuer = shown.get("subject"), shown.get("issuer")
    if start is None or end is None or subject is None or issuer is None:
        return None
    return Certificate(subject, issuer, start, end, (), None, subject == issuer)


def _row(path: str, position: int, certificate: Certificate, now: Optional[int]) -> JsonObject:
    left = None if now is None else certificate.not_after - now
    return {
        "path": clean(path),
        "position": position,
        "subject": clean(certificate.subject, 200),
        "issuer": clean(certificate.issuer, 200),
        "names": [clean(name, 120) for name in certificate.names[:10]],
        "not_before": utc(certificate.not_before),
        "not_after": utc(certificate.not_after),
        "expires_in_s": left,
        "days_left": None if left is None else left // _DAY,
        "not_yet_valid": None if now is None else certificate.not_before > now,
        "authority": certificate.authority,
        "self_issued": certificate.self_issued,
    }


def _read(readings: Readings, _parameters: Parameters) -> JsonObject:
    now = integer(readings.first_line("now"))
    paths = _listed(readings)
    rows: List[JsonObject] = []
    unreadable: List[JsonObject] = []
    stores = 0
    for name in readings.names("file:"):
        text = readings.text(name)
        if text is None:
            continue
        found = pem_certificates(text)
        if len(found) > MAX_CHAIN:
            stores += 1
            continue
        for position, certificate in enumerate(found):
            if certificate is None:
                reason = "certificate %d of the file cannot be read" % (position + 1)
                unreadable.append({"probe": clean(name[5:]), "reason": reason})
            else:
                rows.append(_row(name[5:], position, certificate, now))
    for name in readings.names("x509:"):
        printed = _printed(readings.lines(name))
        if printed is not None:
            rows.append(_row(name[5:], 0, printed, now))
    # A key alone is no certificate: openssl then ends with 1, which is no news.
    refused = [name for name in readings.names("x509:") if getattr(readings.result(name), "exit_status", None) == 1]
    account = readings.account(refused)
    entries = account["unavailable"]
    for name in ("files", "links"):
        result = readings.result(name)
        entries[:] = [
            entry
            for entry in entries
            if name not in readings or entry["probe"] != clean(readings.probe(name).label, 200)
        ]
        if (
            result is not None
            and (result.error or result.timed_out or result.signal is not None)
            and not readings.missing(name)
        ):
            entries.append({"probe": clean(readings.probe(name).label, 200), "reason": readings.problem(name)})
        elif result is not None and name == "files":
            # One line for each directory that may not be listed; roots that are not there are no news.
            for line in result.stderr.split("\n")[:200]:
                if "denied" in line or "not permitted" in line:
                    unreadable.append({"probe": "find", "reason": clean(line.partition(": ")[2] or line, 200)})
    keyless = readings.result("keyless")
    if keyless is not None:
        own = clean(readings.probe("keyless").label, 200)
        denied = [line for line in keyless.stderr.split("\n")[:200] if "denied" in line]
        if denied:
            entries[:] = [entry for entry in entries if entry["probe"] != own]
            unreadable += [{"probe": "grep", "reason": clean(line.partition(": ")[2] or line, 200)} for line in denied]
    entries += unreadable[:20]
    observed = readings.result("files") is not None and not any(
        entry["probe"].startswith("find /") for entry in entries
    )
    if "keyless" in readings and readings.lines("keyless") is None:
        observed = False
    dated = [row for row in rows if row["expires_in_s"] is not None]
    soonest = min(dated, key=lambda row: int(row["expires_in_s"]), default=None)
    return dict(
        account,
        certificates=rows if observed else None,
        count=len(rows) if observed else None,
        next_to_expire=dict(soonest) if soonest else None,
        files_read=len(readings.names("file:")) + len(readings.names("x509:")) if observed else None,
        files_left_out=max(0, len(paths) - MAX_FILES) if observed else None,
        trust_stores=stores if observed else None,
    )


_CERTIFICATE = {
    "path": "file",
    "position": "place in the file, 0 is the first",
    "subject": "whose",
    "issuer": "by whom",
    "names": ["name it is valid for"],
    "not_before": "UTC",
    "not_after": "UTC",
    "expires_in_s": "negative: expired",
    "days_left": "whole days",
    "not_yet_valid": "begins in the future",
    "authority": "may sign others, null where not known",
    "self_issued": "subject and issuer are the same",
}

CERTIFICATES = Observer(
    name="certificates",
    summary="X.509 certificates (PEM files without a private key) under given roots and when they expire. "
    "Trust stores of the distribution are left out.",
    parameters=(
        Parameter("roots", "paths", "Directories or files to look in, three levels deep.", default=ROOTS, maximum=20),
    ),
    returns={
        "certificates": [_CERTIFICATE],
        "count": "how many",
        "next_to_expire": _CERTIFICATE,
        "files_read": "files looked at",
        "files_left_out": "files beyond the limit of %d" % MAX_FILES,
        "trust_stores": "files left out as trust stores",
    },
    first=_first,
    further=_further,
    read=_read,
)
