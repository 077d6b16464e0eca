"""One gated observer without an agent: the verb ``observe``.

Owns: the little loop around ``Calls`` for a single call, with a journal of its own.
Deliberately does not know: leases; an observer only observes, and the gate decides its probes like any other call.
"""

from __future__ import annotations

import selectors
import time
from typing import Any, List, Mapping

from edge_agent.host import clock, confine
from edge_agent.host.calls import Calls
from edge_agent.host.documents import seconds
from edge_agent.host.errors import BadRequest, Stale
from edge_agent.host.home import Home, HostConfig
from edge_agent.host.journal import Journal, prune, read_lines
from edge_agent.host.lease import check_in_time, check_policy_digest, check_run_id
from tools.observers.registry import OBSERVERS
from tools.policy import Policy
from tools.values import JsonObject, ToolCall, digest, want

# An observer that has not answered by then is killed with everything it started, seconds.
OBSERVE_S = 60.0


def observe_once(home: Home, config: HostConfig, name: str, document: Mapping[str, Any]) -> JsonObject:
    """Carry out observer ``name``; returns ``{decision, evidence, journal}``.

    ``document``: ``{run_id, parameters, policy, policy_digest, boot_id, not_after}``. Raises ``BadRequest``, ``Stale``,
    ``JournalFailed``.
    """
    run_id = check_run_id(want(document, "run_id", str))
    check_policy_digest(want(document, "policy", dict), want(document, "policy_digest", str))
    policy = Policy.from_json(document["policy"])
    parameters = want(document, "parameters", dict, {})
    if name not in OBSERVERS:
        raise BadRequest("there is no observer of that name", expected=", ".join(sorted(OBSERVERS)), got=name)
    if want(document, "boot_id", str) != clock.boot_id():
        raise Stale("the observation was asked for before the machine was restarted")
    check_in_time("observation", seconds(document, "not_after"), clock.boottime())
    confine.become_subreaper()
    path = home.observation_path(run_id)
    journal = Journal(path, run_id)
    journal.append(
        "lease.started", {"lease_digest": digest(dict(document)), "machine": config.machine, "observe": name}
    )
    selector = selectors.DefaultSelector()
    deadline = time.monotonic() + OBSERVE_S
    calls = Calls(policy, home, journal, selector, lambda: time.monotonic() < deadline)
    told: List[JsonObject] = []
    answers: List[JsonObject] = []
    calls.submit(ToolCall("c1", name, parameters), told.append, answers.append)
    while not answers:
        due = min(deadline, calls.deadline if calls.deadline is not None else deadline)
        for key, _ in selector.select(max(0.0, due - time.monotonic())):
            key.data()
        calls.check_time(time.monotonic())
        if time.monotonic() >= deadline:
            calls.end("the observer took longer than %g s" % OBSERVE_S)
    journal.append("stopped", {"reason": "observed", "calls": calls.counted})
    journal.close()
    prune(home.observations)
    return {
        "decision": told[0]["decision"],
        "evidence": answers[0].get("evidence"),
        "journal": read_lines(path),
    }
