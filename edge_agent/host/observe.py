"""One gated observer without an agent: the verb ``observe``.

Owns: the little loop around ``Calls`` for a single call, with a journal of its own.
Deliberately does not know: leases; an observer only observes, and the gate decides its probes like any other call.
"""

from __future__ import annotations

import os
import selectors
import time
from typing import Any, List, Mapping

from edge_agent.host import clock, confine
from edge_agent.host.calls import Calls
from edge_agent.host.errors import BadRequest, Stale
from edge_agent.host.home import Home, HostConfig
from edge_agent.host.journal import Journal, prune, read_lines
from edge_agent.host.lease import check_run_id
from tools.observers.registry import OBSERVERS
from tools.values import JsonObject, ToolCall, digest, want

# An observer that has not answered by then is killed with everything it started, seconds.
OBSERVE_S = 60.0


def observe_once(home: Home, config: HostConfig, name: str, document: Mapping[str, Any]) -> JsonObject:
    """Carry out observer ``name``; returns ``{decision, evidence, journal}``.

    ``document``: ``{run_id, parameters, policy, policy_digest, boot_id, not_after}``. Raises ``BadRequest``, ``Stale``,
    ``JournalFailed``.
    """
    run_id = check_run_id(want(document, "run_id", str))
    policy = want(document, "policy", dict)
    if digest(policy) != want(document, "policy_digest", str):
        raise BadRequest("the policy does not have the digest the gateway states")
    if name not in OBSERVERS:
        raise BadRequest("there is no observer of that name", expected=", ".join(sorted(OBSERVERS)), got=name)
    if want(document, "boot_id", str) != clock.boot_id() or clock.boottime() > want(document, "not_after", (int, float)):
        raise Stale("the observation was asked for too late, or before a restart")
    confine.become_subreaper()
    path = home.journal_path(run_id)
    journal = Journal(path, run_id)
    journal.append("lease.started", {"lease_digest": digest(dict(document)), "machine": config.machine, "observe": name})
    selector = selectors.DefaultSelector()
    calls = Calls(policy, home, journal, selector)
    told: List[JsonObject] = []
    answers: List[JsonObject] = []
    calls.submit(ToolCall("c1", name, want(document, "parameters", dict, {})), told.append, answers.append)
    deadline = time.monotonic() + OBSERVE_S
    while not answers:
        due = min(deadline, calls.deadline if calls.deadline is not None else deadline)
        for key, _ in selector.select(max(0.0, due - time.monotonic())):
            key.data()
        calls.check_time(time.monotonic())
        if time.monotonic() >= deadline:
            calls.end("the observer took longer than %g s" % OBSERVE_S)
    journal.append("stopped", {"reason": "observed", "calls": calls.counted})
    journal.close()
    prune(home.journals)
    return {
        "decision": told[0]["decision"],
        "evidence": answers[0].get("evidence"),
        "journal": read_lines(os.path.join(home.journals, run_id + ".jsonl")),
    }
