"""The agent card of a worker, known to both ends."""

from __future__ import annotations

from a2a.types import AgentCapabilities, AgentCard, AgentInterface, AgentSkill


def agent_card(name: str, version: str) -> AgentCard:
    """The card of an edge agent. Its address is a UNIX socket, so the URL names no host."""
    return AgentCard(
        name=name,
        description="Edge agent of Chargehand: carries out one task under a lease, through a default-deny gate.",
        version=version,
        supported_interfaces=[
            AgentInterface(url="http://edge/", protocol_binding="JSONRPC", protocol_version="1.0"),
            AgentInterface(url="http://edge/", protocol_binding="JSONRPC", protocol_version="0.3"),
        ],
        capabilities=AgentCapabilities(streaming=True),
        default_input_modes=["text/plain", "application/json"],
        default_output_modes=["application/json"],
        skills=[
            AgentSkill(
                id="diagnose",
                name="Diagnose this machine",
                description="Looks at the machine with read-only tools and reports findings with their evidence.",
                tags=["linux", "diagnostics"],
            )
        ],
    )
