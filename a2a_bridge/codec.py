"""Our messages as A2A 1.0 messages and back. The only module besides client and server that sees SDK types.

Owns: which part carries what. Deliberately does not know: transports, tasks' lives.

A2A data parts are protobuf ``Struct`` values, in which every number is a double: 1 becomes 1.0, and a digest taken of
the far side's copy differs. What must be exact (events, the task document, the result) therefore travels as a text part
with a media type of its own; the report travels as a data part as well, for A2A clients that know nothing of us.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from a2a.helpers import new_data_part, new_text_part
from a2a.types import Message, Part, Role, StreamResponse, TaskState

from a2a_bridge.messages import TaskDocument, TaskResult, TaskUpdate
from tools.values import Event, JsonObject, Malformed, want

TASK_TYPE = "application/vnd.chargehand.task+json"
EVENTS_TYPE = "application/vnd.chargehand.events+json"
RESULT_TYPE = "application/vnd.chargehand.result+json"
REPORT_NAME = "report"


def state_name(state: int) -> str:
    """``TASK_STATE_WORKING`` as ``working``."""
    return str(TaskState.Name(state)).removeprefix("TASK_STATE_").lower()


def _exact(document: Any, media_type: str) -> Part:
    return Part(text=json.dumps(document, separators=(",", ":")), media_type=media_type)


def _media_type(part: Part) -> str:
    """A2A 0.3 has no media type on a text part: there it stands in the part's metadata, as ``mediaType``."""
    if part.media_type or "mediaType" not in part.metadata:
        return str(part.media_type)
    return str(part.metadata["mediaType"])


def _read(parts: Iterable[Part], media_type: str) -> list[Any]:
    found = []
    for part in parts:
        if _media_type(part) == media_type and part.WhichOneof("content") == "text":
            try:
                found.append(json.loads(part.text))
            except (ValueError, RecursionError) as error:
                raise Malformed(f"a part of type {media_type} is not JSON: {error}") from error
    return found


def task_message(document: TaskDocument) -> Message:
    """The A2A message that asks for ``document``; its metadata carries the trace context (W3C ``traceparent``)."""
    message = Message(
        message_id=str(uuid.uuid4()),
        role=Role.ROLE_USER,
        parts=[new_text_part(document.prompt), _exact(document.to_json(), TASK_TYPE)],
    )
    message.metadata.update({"traceparent": document.traceparent, "run_id": document.run_id})
    return message


def read_task(message: Message) -> TaskDocument:
    """The task document of an incoming message. Raises ``Malformed`` when there is not exactly one."""
    documents = _read(message.parts, TASK_TYPE)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise Malformed(f"the message must hold one part of type {TASK_TYPE}, got {len(documents)}")
    return TaskDocument.from_json(documents[0])


def events_message(events: Sequence[Event], task_id: str, context_id: str) -> Message:
    """A status message that carries progress."""
    return Message(
        message_id=str(uuid.uuid4()),
        role=Role.ROLE_AGENT,
        task_id=task_id,
        context_id=context_id,
        parts=[_exact([event.to_json() for event in events], EVENTS_TYPE)],
    )


def result_parts(result: TaskResult) -> list[Part]:
    """The parts of the artifact ``report``: exact for us, structured for everybody."""
    parts = [_exact(result.to_json(), RESULT_TYPE)]
    if result.report is not None:
        parts.append(new_data_part(_plain(result.report.to_json())))
    return parts


def _plain(document: JsonObject) -> JsonObject:
    return dict(json.loads(json.dumps(document)))


def read_update(response: StreamResponse) -> TaskUpdate | None:
    """One streamed response as a ``TaskUpdate``; ``None`` for what says nothing of the task. Raises ``Malformed``."""
    kind = response.WhichOneof("payload")
    if kind == "task":
        task = response.task
        parts = [part for artifact in task.artifacts for part in artifact.parts]
        results = _read(parts, RESULT_TYPE)
        return TaskUpdate(task.id, state_name(task.status.state), (), _result(results), "")
    if kind == "status_update":
        update = response.status_update
        parts = list(update.status.message.parts)
        events = [Event.from_json(item) for items in _read(parts, EVENTS_TYPE) for item in _list(items)]
        text = " ".join(part.text for part in parts if part.text and not part.media_type.startswith("application/"))
        return TaskUpdate(update.task_id, state_name(update.status.state), tuple(events), None, text)
    if kind == "artifact_update":
        artifact = response.artifact_update
        if artifact.artifact.name != REPORT_NAME:
            return None
        return TaskUpdate(artifact.task_id, "working", (), _result(_read(artifact.artifact.parts, RESULT_TYPE)), "")
    return None


def _list(value: Any) -> list[JsonObject]:
    return list(want({"events": value}, "events", list))


def _result(results: list[Any]) -> TaskResult | None:
    return TaskResult.from_json(results[-1]) if results else None
