"""The names of spans and attributes, each written once.

Owns: the words that appear in a trace, and the few that MLflow gives a meaning to.
Deliberately does not know: when a span begins or ends, what its values are, how it travels.
"""

from __future__ import annotations

from typing import Final

# Spans (docs: "Traces"). The root runs from the message or trigger to the reply.
MESSAGE_PROCESSED: Final = "message.processed"
MESSAGE_QUEUED: Final = "message.queued"
RUN_COMPLETED: Final = "run.completed"
AGENT_ACTIVATE: Final = "agent.activate"
TASK: Final = "task"
MODEL_INFERENCE: Final = "model.inference"
TOOL_EXECUTION: Final = "tool.execution"
APPROVAL_WAIT: Final = "approval.wait"
AGENT_STOP: Final = "agent.stop"
RUN_EVALUATE: Final = "run.evaluate"

SPAN_NAMES: Final = (
    MESSAGE_PROCESSED, MESSAGE_QUEUED, RUN_COMPLETED, AGENT_ACTIVATE, TASK, MODEL_INFERENCE, TOOL_EXECUTION,
    APPROVAL_WAIT, AGENT_STOP, RUN_EVALUATE,
)  # fmt: skip

# What MLflow calls the type of a span. Without it MLflow leaves the type empty.
AGENT: Final = "AGENT"
CHAIN: Final = "CHAIN"
CHAT_MODEL: Final = "CHAT_MODEL"
TOOL: Final = "TOOL"
EVALUATOR: Final = "EVALUATOR"

SPAN_TYPES: Final = {
    MESSAGE_PROCESSED: CHAIN,
    MESSAGE_QUEUED: CHAIN,
    RUN_COMPLETED: AGENT,
    AGENT_ACTIVATE: CHAIN,
    TASK: AGENT,
    MODEL_INFERENCE: CHAT_MODEL,
    TOOL_EXECUTION: TOOL,
    APPROVAL_WAIT: CHAIN,
    AGENT_STOP: CHAIN,
    RUN_EVALUATE: EVALUATOR,
}

# OpenTelemetry GenAI semantic conventions.
GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"  # chat | execute_tool | invoke_agent
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"  # list of str
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_TOOL_NAME: Final = "gen_ai.tool.name"
GEN_AI_TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
GEN_AI_TOOL_CALL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
GEN_AI_TOOL_CALL_RESULT: Final = "gen_ai.tool.call.result"
GEN_AI_AGENT_ID: Final = "gen_ai.agent.id"
GEN_AI_AGENT_NAME: Final = "gen_ai.agent.name"
GEN_AI_CONVERSATION_ID: Final = "gen_ai.conversation.id"

OPERATION_CHAT: Final = "chat"
OPERATION_EXECUTE_TOOL: Final = "execute_tool"
OPERATION_INVOKE_AGENT: Final = "invoke_agent"

# What MLflow reads out of a span. Objects are sent as objects, not as JSON text: MLflow would quote the text again.
MLFLOW_SPAN_TYPE: Final = "mlflow.spanType"
MLFLOW_SPAN_INPUTS: Final = "mlflow.spanInputs"
MLFLOW_SPAN_OUTPUTS: Final = "mlflow.spanOutputs"
MLFLOW_CHAT_TOKEN_USAGE: Final = "mlflow.chat.tokenUsage"  # {input_tokens, output_tokens, total_tokens}
MLFLOW_LLM_COST: Final = "mlflow.llm.cost"  # {input_cost, output_cost, total_cost} in US dollars
# Root span only: MLflow makes trace metadata of these.
SESSION_ID: Final = "session.id"
USER_ID: Final = "user.id"
MLFLOW_TRACE_TAG_PREFIX: Final = "mlflow.traceTag."
MLFLOW_TRACE_NAME: Final = "mlflow.traceTag.mlflow.traceName"

HOST_NAME: Final = "host.name"
DEPLOYMENT_ENVIRONMENT: Final = "deployment.environment"
EDGE: Final = "edge"
CENTRAL: Final = "central"

RUN_ID: Final = "chargehand.run_id"
MACHINE: Final = "chargehand.machine"
TRIGGER: Final = "chargehand.trigger"
RUNBOOK: Final = "chargehand.runbook"
STATE: Final = "chargehand.state"
OUTCOME: Final = "chargehand.outcome"
CALL_ID: Final = "chargehand.call_id"
INFERENCE_ID: Final = "chargehand.inference_id"
DECISION: Final = "chargehand.decision"  # allow | ask | deny
RULE: Final = "chargehand.rule"
EFFECT: Final = "chargehand.effect"  # observe | change | never
EXIT_STATUS: Final = "chargehand.exit_status"
OUTPUT_DIGEST: Final = "chargehand.output_digest"
HOST_DURATION_MS: Final = "chargehand.host_duration_ms"  # as measured on the machine's monotonic clock
COST_USD: Final = "chargehand.cost_usd"  # number, or "unknown"; never 0 for an unknown model
TOKENS: Final = "chargehand.tokens"
INTERRUPTED: Final = "chargehand.interrupted"  # true: closed by the supervisor because the worker was gone
APPROVED_BY: Final = "chargehand.approved_by"

INTERRUPTED_MESSAGE: Final = "interrupted"


def trace_tag(name: str) -> str:
    """The root attribute that MLflow turns into the trace tag ``name``."""
    return MLFLOW_TRACE_TAG_PREFIX + name
