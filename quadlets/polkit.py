"""The polkit rule that lets the agent's user manage exactly the units its policy names.

Owns: the text of the rule and what may stand in it. Deliberately does not know: where the rule is put, and everything of
a policy but the units it grants. Pure. The operating system then refuses what the gate should have refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

VERBS = ("start", "stop", "restart", "try-restart", "reload", "reload-or-restart")
"""What ``systemctl`` asks systemd for by these names; enabling and masking are another action and never granted."""

_UNIT = re.compile(
    r"[A-Za-z0-9:_.\\@-]{1,240}\.(?:service|socket|timer|target|path|mount|automount|swap)"
    r"|[A-Za-z0-9:_.\\@-]{2,240}\*"
)
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


class BadGrant(ValueError):
    """A unit or verb cannot be granted; the message says what was expected and what came."""


def polkit_rule(grants: Mapping[str, Sequence[str]], user: str = "chargehand") -> str | None:
    """The text of a rules file, ``None`` when nothing is granted.

    Args:
        grants: unit name → verbs of ``VERBS``. A name is literal, or the beginning of names followed by ``*``.
        user: who is granted.

    Raises ``BadGrant``. Everything else this user might ask systemd to do to units is refused by the rule, so that a
    more generous rule of the distribution does not apply to it.
    """
    if not _USER.fullmatch(user):
        raise BadGrant(f"cannot grant anything to user {user!r}: expected a login name")
    table: dict[str, list[str]] = {}
    for unit, verbs in sorted(grants.items()):
        if not _UNIT.fullmatch(unit):
            raise BadGrant(
                f"cannot grant {unit!r}: expected the full name of one unit, such as nginx.service, or app-*"
            )
        unknown = sorted(set(verbs) - set(VERBS))
        if unknown:
            raise BadGrant(f"cannot grant {unknown} on {unit}: expected verbs out of {', '.join(VERBS)}")
        if verbs:
            table[unit] = sorted(set(verbs))
    if not table:
        return None
    return _RULE % {"user": json.dumps(user), "grants": json.dumps(table, indent=4, sort_keys=True)}


_RULE = """\
// Written by `chargehand edge install` from the policy of this machine; `chargehand edge upgrade` writes it anew.
var chargehandGrants = %(grants)s;

function chargehandAllows(name, verb) {
    return Object.prototype.hasOwnProperty.call(chargehandGrants, name) && chargehandGrants[name].indexOf(verb) !== -1;
}

polkit.addRule(function (action, subject) {
    if (subject.user !== %(user)s || action.id.indexOf("org.freedesktop.systemd1.") !== 0) {
        return polkit.Result.NOT_HANDLED;
    }
    var unit = action.lookup("unit");
    var verb = action.lookup("verb");
    if (action.id !== "org.freedesktop.systemd1.manage-units" || !unit || !verb) {
        return polkit.Result.NO;
    }
    if (chargehandAllows(unit, verb)) {
        return polkit.Result.YES;
    }
    for (var end = 2; end <= unit.length; end++) {
        if (chargehandAllows(unit.substring(0, end) + "*", verb)) {
            return polkit.Result.YES;
        }
    }
    return polkit.Result.NO;
});
"""
