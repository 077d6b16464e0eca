"""The shape of the settings: every section, every limit with its name, unit and reason.

Owns: names, types, defaults, bounds and reasons. The name of a limit carries its unit (``_s`` seconds, ``_bytes``,
``_usd``; a plain plural is a count), its ``description`` is the reason.
Deliberately does not know: files, the environment, how an error is told (``supervisor.settings.load``).
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from supervisor.settings.secrets import SecretRef


class Section(BaseModel):
    """A table of the file. Unknown keys are refused: a mistyped limit must not silently be the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _limit(default: Any, unit: str, reason: str, **bounds: Any) -> Any:
    return Field(default, description=reason, json_schema_extra={"unit": unit}, **bounds)


def _http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as https://host:port/path")
    if parts.username or parts.password:
        raise ValueError("must not hold a user name or password: use a key reference")
    return text.rstrip("/")


HttpUrl = Annotated[str, AfterValidator(_http_url)]


class Limits(Section):
    """What bounds a run and everything that waits."""

    # The lease and what enforces it.
    lease_s: int = _limit(
        30,
        "s",
        "a machine that lost its gateway is inert after this long; longer survives longer network gaps",
        ge=5,
        le=120,
    )
    renew_s: int = _limit(
        10, "s", "how often the lease is renewed; a third of the lease lets two renewals be lost", ge=1, le=60
    )
    hard_stop_s: int = _limit(
        900, "s", "no run lives longer than this, renewed or not; systemd enforces it on the machine", ge=30, le=3600
    )

    # How long a run may stay in each state (supervisor.runs.states names these).
    request_s: int = _limit(60, "s", "from the request to the queue; only a dead gateway takes longer", ge=5, le=3600)
    queue_s: int = _limit(
        900, "s", "a run that waited longer expires: the question it was asked is out of date", ge=1, le=86400
    )
    activate_s: int = _limit(
        60, "s", "from `start` to the worker answering; a cold image on a slow disk takes tens", ge=5, le=600
    )
    task_s: int = _limit(
        600, "s", "wall time of the task; ends before the hard stop so that the run ends in order", ge=5, le=3600
    )
    approval_s: int = _limit(3600, "s", "a question nobody answers is refused after this long", ge=30, le=604800)
    evaluate_s: int = _limit(60, "s", "judging evidence is local work", ge=1, le=600)
    stop_s: int = _limit(
        60, "s", "asking, then killing, then proving; longer than systemd's own time to stop a unit", ge=10, le=600
    )

    # What a task may use.
    steps: int = _limit(30, "inferences", "longer investigations are less accurate, and loops cost money", ge=1, le=500)
    tokens: int = _limit(200_000, "tokens", "in and out together, of one run", ge=1000, le=20_000_000)
    cost_usd: float = _limit(1.0, "USD", "of one run, where the price of the model is known", ge=0, le=1000)
    refusals: int = _limit(3, "refusals", "the same refused call so often ends the task: no retry storm", ge=1, le=20)

    # The way to a machine.
    connect_s: float = _limit(
        10.0, "s", "SSH connection and login; over a slow link with a slow key it takes seconds", gt=0, le=120
    )
    verb_s: float = _limit(30.0, "s", "one verb of the gatekeeper other than `start` and `stop`", gt=0, le=300)
    keepalive_s: float = _limit(15.0, "s", "a dead connection is noticed within three of these", gt=0, le=300)
    connections: int = _limit(
        256, "connections", "open SSH connections of this gateway; each costs about 0.3 MB", ge=1, le=10_000
    )

    # The centre.
    runs_at_once: int = _limit(
        64, "runs", "running runs of this gateway; each holds a connection and a task", ge=1, le=10_000
    )
    queue_length: int = _limit(
        10_000, "runs", "requests beyond this are refused at once instead of expiring unseen", ge=1, le=1_000_000
    )
    checkpoint_s: int = _limit(
        300, "s", "audit records younger than the last signed checkpoint can be cut off without a trace", ge=1, le=86400
    )
    shutdown_s: float = _limit(30.0, "s", "an orderly shutdown; afterwards leases end what is left", gt=0, le=600)
    request_bytes: int = _limit(
        1_048_576, "bytes", "one request to the gateway; a question is a few hundred", ge=1024, le=67_108_864
    )

    @model_validator(mode="after")
    def _they_fit_together(self) -> Self:
        if self.renew_s * 2 > self.lease_s:
            raise ValueError(f"renew_s ({self.renew_s}) must be at most half of lease_s ({self.lease_s})")
        if self.task_s >= self.hard_stop_s:
            raise ValueError(f"task_s ({self.task_s}) must be below hard_stop_s ({self.hard_stop_s})")
        return self


class Gateway(Section):
    """Where the gateway listens."""

    host: str = Field(default="127.0.0.1", description="loopback unless you terminate TLS in front of it", min_length=1)
    port: int = Field(default=8420, description="API and console", ge=0, le=65535)


class Ssh(Section):
    """The key with which the gateway reaches its machines."""

    key_file: Path | None = Field(default=None, description="private key; unset: one is made in the data directory")


class Model(Section):
    """One language model, or none."""

    provider: Literal["auto", "openai", "anthropic", "runbook"] = Field(
        default="auto",
        description="auto: Anthropic or OpenAI if their key is in the environment, else an answering "
        "127.0.0.1:8888, else runbook",
    )
    name: str = Field(default="", description="the model's name at the provider; empty: the provider's default")
    base_url: HttpUrl | None = Field(
        default=None, description="any OpenAI-compatible endpoint; unset: the provider's own"
    )
    key: SecretRef | None = Field(default=None, description="a reference: env:NAME or file:/path, never the key itself")
    via: Literal["gateway", "edge"] = Field(
        default="gateway", description="gateway: the key stays here; edge: an endpoint on the machine itself"
    )
    input_usd_per_million: float | None = Field(
        default=None, description="price of input tokens; unset: the public price list", ge=0
    )
    output_usd_per_million: float | None = Field(
        default=None, description="price of output tokens; unset: the public price list", ge=0
    )
    context_tokens: int | None = Field(
        default=None, description="size of the context window; unset: the known one", ge=2048
    )
    timeout_s: float = Field(
        default=120.0, description="one inference; a long report on a slow GPU takes a minute", gt=0, le=3600
    )

    @model_validator(mode="after")
    def _it_can_be_asked(self) -> Self:
        if self.via == "edge" and self.key is not None:
            raise ValueError("via = 'edge' cannot be used with a key: a key never leaves the centre")
        if self.provider == "runbook" and (self.name or self.base_url or self.key):
            raise ValueError("provider = 'runbook' uses no language model: leave name, base_url and key unset")
        return self


class Mlflow(Section):
    """Where traces are seen. The audit chain is the record; this is the view."""

    mode: Literal["embedded", "external", "off"] = Field(
        default="embedded", description="embedded: the gateway starts its own server in the data directory"
    )
    url: HttpUrl | None = Field(default=None, description="of an external server")
    experiment: str = Field(
        default="chargehand", description="the experiment that traces go to", min_length=1, max_length=250
    )
    host: str = Field(default="127.0.0.1", description="where the embedded server listens", min_length=1)
    port: int = Field(default=5000, description="of the embedded server; 0: any free one", ge=0, le=65535)

    @model_validator(mode="after")
    def _an_external_server_has_a_url(self) -> Self:
        if (self.mode == "external") != (self.url is not None):
            raise ValueError("url and mode = 'external' belong together: set both or neither")
        return self


class Audit(Section):
    """The tamper-evident record."""

    content: bool = Field(
        default=False, description="keep texts, arguments and outputs in the record; off: metadata and digests only"
    )
    content_bytes: int = Field(
        default=65536,
        description="bytes kept of one text when content is on; the digest is always of the whole",
        ge=0,
        le=1_048_576,
    )


class Traces(Section):
    """The durable spool between the gateway and MLflow."""

    content: bool = Field(default=True, description="send redacted prompts, answers and tool outputs to MLflow")
    spool_bytes: int = Field(
        default=268_435_456,
        description="size of the spool; when full the oldest spans go and the gap is reported",
        ge=1_048_576,
    )
    environment: str = Field(
        default="central", description="the deployment.environment of spans made here", min_length=1, max_length=64
    )


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/chargehand-gateway``; ``…/chargehand`` is the home of an edge installation on the same host."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "chargehand-gateway"


class Settings(BaseSettings):
    """Everything that can be set. ``source`` is the file it came from, if any. Made by ``supervisor.settings.load``."""

    model_config = SettingsConfigDict(
        env_prefix="CHARGEHAND_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load` merges file and environment itself, so that an error can say which of them a value came from.
        return (init_settings,)

    data_dir: Path = Field(
        default_factory=default_data_dir, description="database, keys, spool and embedded MLflow; mode 0700"
    )
    database_url: str | None = Field(
        default=None,
        description="unset: SQLite in the data directory; postgresql+psycopg://user@host/name for several gateways",
        repr=False,
    )
    database_password: SecretRef | None = Field(default=None, description="a reference: env:NAME or file:/path")
    gateway: Gateway = Gateway()
    ssh: Ssh = Ssh()
    limits: Limits = Limits()
    model: Model = Model()
    models: dict[str, Model] = Field(default_factory=dict, description="further models, chosen with --model NAME")
    policies: tuple[Path, ...] = Field(
        default=(), description="policy files (YAML), fleet first; unset: the shipped pack observe-core"
    )
    mlflow: Mlflow = Mlflow()
    audit: Audit = Audit()
    traces: Traces = Traces()
    source: Path | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _paths_and_database(self) -> Self:
        object.__setattr__(self, "data_dir", self.data_dir.expanduser().absolute())
        if self.database_url is not None:
            scheme = self.database_url.partition("://")[0]
            if scheme not in ("sqlite", "postgresql+psycopg"):
                raise ValueError("database_url must begin with sqlite:/// or postgresql+psycopg://")
            if urlsplit(self.database_url).password:
                raise ValueError("database_url must not hold a password: use database_password = 'env:NAME'")
        return self

    @property
    def store_url(self) -> str:
        """The database to open, without its password."""
        return self.database_url or f"sqlite:///{self.data_dir / 'chargehand.db'}"

    def loopback(self) -> bool:
        """Whether the gateway listens on this host only."""
        if self.gateway.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.gateway.host).is_loopback
        except ValueError:
            return False
