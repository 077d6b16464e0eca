"""What may leave the process in a span: known secrets and things that look like secrets are masked, long values cut.

Owns: the list of patterns, the search for registered secret values in the forms they take on the way (JSON, URL, HTML,
base64, hex), and the limits on size and depth.
Deliberately does not know: spans' meaning, where they are kept or sent, where a secret came from.

Not covered, and not claimed: a secret split over two values or broken up by other characters (line-wrapped base64,
terminal escapes, spaces between digits); compressed, encrypted or reversed forms; a secret nobody registered that looks
like an ordinary word and stands behind no telling name (``mysql -phunter2``); anything in a span id.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import json
import re
import threading
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from otel.spans import Span, SpanEvent

MASK: Final = "[redacted]"
MIN_SECRET: Final = 4  # characters; anything shorter would black out ordinary text
_MIN_ENCODED: Final = 8  # characters of a base64 or hex form: shorter ones meet by accident
_MIN_LINE: Final = 16  # characters of a line of a longer secret that counts as a secret of its own


class SecretTooShort(ValueError):
    """A value was registered as secret that is too short to be searched for."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Caps on what one span may carry; each keeps a hostile or broken machine from filling spool and MLflow.

    ``text_bytes``: of one text, UTF-8 (16 KiB shows a screenful of output; the whole is in the evidence);
    ``span_bytes``: of all texts of a span together; ``items``: of one list or object; ``depth``: levels of nesting.
    """

    text_bytes: int = 16 * 1024
    span_bytes: int = 128 * 1024
    items: int = 256
    depth: int = 12


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """``needles``: lower-case texts of which one must be present for ``regex`` to be worth running (a text search costs
    half a microsecond where a regex without a literal start costs fifty); ``group``: what of a match is masked."""

    name: str
    needles: tuple[str, ...]
    regex: re.Pattern[str]
    group: int = 0


def _pattern(name: str, needles: str, regex: str, group: int = 0, flags: int = 0) -> _Pattern:
    return _Pattern(name, tuple(needles.split()), re.compile(regex, flags), group)


# Names that make the value behind them a secret. ``tokens`` (a count) is not ``token``, ``keyboard`` is not ``key``.
_SECRET_WORD: Final = (
    r"(?:pass(?:word|wd|phrase|code)|pwd|secret|token|credentials?|(?:api|access|private|secret|signing|encryption|auth"
    r"|account|shared|master)[_.-]?key(?:[_.-]?id)?|psk)"
)
_SECRET_NEEDLES: Final = "pass pwd secret token credential key psk"
_KEY_NAME: Final = re.compile(r".*" + _SECRET_WORD + r"\Z", re.IGNORECASE | re.DOTALL)
_OPTION: Final = re.compile(r"--?(?:[a-z0-9]+[_-])*" + _SECRET_WORD + r"\Z", re.IGNORECASE)
_USER_OPTION: Final = re.compile(r"(?:-u|--user|--proxy-user|-U)\Z")

# A quote as it stands in text, in JSON, or in JSON within JSON.
_QUOTE: Final = r"""(?:\\{0,3}["'])"""
_SEPARATOR: Final = _QUOTE + r"?\s*(?:=>|:=|=|:|%3D)\s*"

_PATTERNS: Final = (
    _pattern(
        "private key", "-----begin",
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----[\s\S]*?"
        r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)",
    ),
    _pattern("putty key", "private-lines", r"Private-Lines:[\s\S]*?(?:Private-MAC:[^\r\n]*|\Z)"),
    _pattern("bearer", "bearer", r"bearer(?:[\s:=]|%20|\\[ntr])+" + _QUOTE + r"?([A-Za-z0-9._~+/=-]{8,})", 1, re.IGNORECASE),
    _pattern(
        "authorization", "authorization",
        r"authorization" + _QUOTE + r"?\s*[:=,]\s*" + _QUOTE + r"?(?:(?:basic|bearer|token|digest|negotiate|apikey)\s+)?"
        r"([^\s\"',;\\]{4,})", 1, re.IGNORECASE,
    ),
    _pattern("basic", "basic", r"\bbasic\s+([A-Za-z0-9+/]{12,}={0,2})", 1, re.IGNORECASE),
    _pattern("cookie", "cookie", r"cookie" + _QUOTE + r"?\s*[:=]\s*" + _QUOTE + r"?([^\r\n\"'\\]{4,})", 1, re.IGNORECASE),
    _pattern("header", "x-", r"x-[a-z-]{0,40}(?:key|token|auth)" + _SEPARATOR + _QUOTE + r"?([^\s\"',;\\]{4,})", 1, re.IGNORECASE),
    _pattern("password hash", "$", r"\$(?:1|2[aby]|5|6|7|y|gy|argon2(?:id|i|d))\$[./A-Za-z0-9$=,+-]{16,}"),
    _pattern("password in url", "://", r"://[^\s/:@\"'<>]{0,256}:([^\s/\"'<>]{1,512})@", 1),
    _pattern("token in url", "://", r"://([^\s/:@\"'<>]{12,512})@", 1),
    _pattern("signed url", "signature= sig=", r"(?:X-(?:Amz|Goog)-Signature|[?&]sig)=([^\s&\"']{16,})", 1, re.IGNORECASE),
    _pattern("webhook", "hooks.slack", r"hooks\.slack(?:-gov)?\.com/[A-Za-z0-9/_-]{10,}"),
    # Name, separator, value: the value ends at its own closing quote, at whichever level of JSON it stands; without
    # quotes at the next blank or delimiter.
    _pattern("named, quoted", _SECRET_NEEDLES, _SECRET_WORD + _SEPARATOR + r"\"((?:\\.|[^\"\\\r\n]){1,4096})", 1, re.IGNORECASE),
    _pattern("named, single quotes", _SECRET_NEEDLES, _SECRET_WORD + _SEPARATOR + r"'((?:\\.|[^'\\\r\n]){1,4096})", 1, re.IGNORECASE),
    _pattern("named, in json", _SECRET_NEEDLES, _SECRET_WORD + _SEPARATOR +
             r"\\[\"']((?:\\{3}[\"']|\\\\|(?!\\[\"'])[^\r\n]){1,4096})", 1, re.IGNORECASE),
    _pattern("named, in json in json", _SECRET_NEEDLES, _SECRET_WORD + _SEPARATOR +
             r"\\{3}[\"']((?:(?!\\{3}[\"'])[^\r\n]){1,4096})", 1, re.IGNORECASE),
    # A number of up to seven digits behind ``token`` is a count, not a secret.
    _pattern("named", _SECRET_NEEDLES, _SECRET_WORD + _SEPARATOR +
             r"(?![\"'\\\[{(])(?!(?:\d{1,7}|null|true|false|none)(?![^\s,;}\])]))([^\s,;&\"'<>\\})\]]{1,4096})", 1, re.IGNORECASE),
    _pattern("option", _SECRET_NEEDLES, r"--(?:[a-z0-9]+[_-])*" + _SECRET_WORD + r"[\s=]+" + _QUOTE +
             r"?([^\s\"'\\]{1,4096})", 1, re.IGNORECASE),
    _pattern("netrc", "pass", r"\blogin\s+\S+\s+password\s+(\S+)", 1),
    _pattern("user option", "-u", r"(?:(?<=\s)|^)(?:-u|--user|--proxy-user)[\s=]+" + _QUOTE +
             r"?[^\s:\"']{1,256}:([^\s\"'\\]{1,1024})", 1, re.IGNORECASE | re.MULTILINE),
)  # fmt: skip
_NEEDLES: Final = tuple(sorted({needle for pattern in _PATTERNS for needle in pattern.needles}))

# Secrets known by how they begin stand in a long run of these characters: the runs are found first, then looked into.
_RUN: Final = re.compile(r"[A-Za-z0-9_.\-]{16,}")
_TOKEN: Final = re.compile(
    r"eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*){0,3}"  # JSON web token
    r"|(?<![A-Za-z0-9])(?:A[KS]IA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # Amazon access key id
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|gl(?:pat|dt|rt|cbt|ptt|soat|agent)-[A-Za-z0-9_.-]{16,}"
    r"|(?<![A-Za-z0-9])(?:sk|pk)-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic and those that copied the form
    r"|(?<![A-Za-z0-9])(?:gsk_|xai-|pplx-|nvapi-|r8_|hf_|npm_)[A-Za-z0-9_-]{20,}|pypi-[A-Za-z0-9_-]{30,}"
    r"|AIza[0-9A-Za-z_-]{30,}|ya29\.[0-9A-Za-z_-]{20,}|GOCSPX-[0-9A-Za-z_-]{20,}"  # Google
    r"|xox[abeoprs](?:\.[a-z]+)?-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"  # Slack
    r"|(?:[sr]k_(?:live|test)|whsec)_[A-Za-z0-9]{10,}"  # Stripe
    r"|hv[sbr]\.[A-Za-z0-9_-]{20,}|atlasv1\.[A-Za-z0-9_-]{20,}"  # HashiCorp
    r"|do[op]_v1_[a-f0-9]{32,}|dapi[a-f0-9]{32}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|shpat_[a-fA-F0-9]{32}"
    r"|dckr_pat_[A-Za-z0-9_-]{20,}|lin_api_[A-Za-z0-9]{20,}|tskey-[A-Za-z0-9-]{16,}|AGE-SECRET-KEY-1[0-9A-Z]{20,}"
)


@functools.lru_cache(maxsize=4096)
def names_a_secret(key: str) -> bool:
    """Whether a value under this name is masked whatever it is (``password``, ``db.api_key``; not ``input_tokens``)."""
    return len(key) <= 256 and _KEY_NAME.match(key) is not None


class Redactor:
    """Masks what must not leave. Safe to use from several threads; registering takes effect for the next value.

    ``secrets``: values to search for literally; ``limits``: see ``Limits``. Never shows a secret in its ``repr``.
    """

    def __init__(self, secrets: Iterable[str] = (), limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._secrets: frozenset[str] = frozenset()
        self._variants: tuple[tuple[str, int], ...] = ()
        for secret in secrets:
            self.add_secret(secret)

    def __repr__(self) -> str:
        return f"Redactor({len(self._secrets)} secrets, {self.limits!r})"

    def add_secret(self, value: str) -> None:
        """From now on mask ``value`` in every form this module knows. Raises ``SecretTooShort`` below 4 characters."""
        if len(value.strip()) < MIN_SECRET:
            raise SecretTooShort(
                f"a secret of {len(value.strip())} characters cannot be masked without masking ordinary text; "
                f"expected at least {MIN_SECRET}: use a longer secret"
            )
        with self._lock:
            if value not in self._secrets:
                self._secrets = self._secrets | {value}
                variants = dict(self._variants)
                for variant, edge in _variants(value):
                    variants[variant] = max(edge, variants.get(variant, 0))
                self._variants = tuple(sorted(variants.items(), key=lambda item: -len(item[0])))

    def text(self, text: str, cap_bytes: int | None = None) -> str:
        """``text`` with secrets masked, fit for UTF-8 and PostgreSQL (no lone surrogates, no NUL), cut to the cap."""
        return _cut(_encodable(self._mask(text)), self.limits.text_bytes if cap_bytes is None else cap_bytes)

    def value(self, value: Any) -> Any:
        """A JSON value with every text (keys too) redacted, and what is too deep, too long or too many cut, saying so."""
        return self._value(value, 0, _Budget(self.limits.span_bytes))

    def span(self, span: Span) -> Span:
        """The span as it may leave. Gives the same object back when there was nothing to do."""
        if self._is_clean(span):
            return span
        budget = _Budget(self.limits.span_bytes)
        return dataclasses.replace(
            span,
            name=self.text(span.name, 250) or MASK,
            status_message=self._text(span.status_message, budget),
            attributes=self._object(span.attributes, 0, budget),
            events=tuple(
                SpanEvent(self.text(event.name, 250) or MASK, event.at_ns, self._object(event.attributes, 0, budget))
                for event in span.events[: self.limits.items]
            ),
        )

    # The common span holds nothing to mask. One pass collects its texts and one search over them together decides
    # that; only a hit pays for the careful walk. A secret within one text is also within the texts joined.
    def _is_clean(self, span: Span) -> bool:
        if len(span.name) > 200 or len(span.attributes) > self.limits.items or len(span.events) > self.limits.items:
            return False
        texts = [span.name, span.status_message]
        limits = self.limits
        for mapping in (span.attributes, *(event.attributes for event in span.events)):
            if not _collect(mapping, texts, 0, limits):
                return False
        texts.extend(event.name for event in span.events)
        joined = "\n".join(texts)
        # Four bytes a character at most: below that no cap can be reached, so nothing has to be encoded to know.
        if len(joined) * 4 > limits.text_bytes:
            sizes = [len(text) if text.isascii() else len(text) * 4 for text in texts]
            if max(sizes) > limits.text_bytes or sum(sizes) > limits.span_bytes:
                return False
        if "\0" in joined or not (joined.isascii() or _is_encodable(joined)):
            return False
        lowered = joined.lower()
        if any(_TOKEN.search(run) for run in _RUN.findall(joined)):
            return False
        present = {needle for needle in _NEEDLES if needle in lowered}
        if present:
            if any(pattern.regex.search(joined) for pattern in _PATTERNS if not present.isdisjoint(pattern.needles)):
                return False
            if any(_OPTION.match(text) or _USER_OPTION.match(text) for text in texts):
                return False
        return not any(variant in joined for variant, _ in self._variants)

    def _mask(self, text: str) -> str:
        intervals: list[tuple[int, int]] = []
        for variant, edge in self._variants:
            at = text.find(variant)
            while at >= 0:
                intervals.append((max(at - edge, 0), min(at + len(variant) + edge, len(text))))
                at = text.find(variant, at + 1)
        for run in _RUN.finditer(text):
            for match in _TOKEN.finditer(run[0]):
                intervals.append((run.start() + match.start(), run.start() + match.end()))
        lowered = text.lower()
        present = {needle for needle in _NEEDLES if needle in lowered}
        for pattern in _PATTERNS:
            if not present.isdisjoint(pattern.needles):
                for match in pattern.regex.finditer(text):
                    intervals.append(match.span(pattern.group))
        if not intervals:
            return text
        # Overlapping finds are masked as one: masking them one by one would leave the ends of the second.
        intervals.sort()
        parts, done = [], 0
        start, end = intervals[0]
        for next_start, next_end in intervals[1:]:
            if next_start < end:
                end = max(end, next_end)
            else:
                parts += [text[done:start], MASK]
                done, start, end = end, next_start, next_end
        parts += [text[done:start], MASK, text[end:]]
        return "".join(parts)

    def _text(self, text: str, budget: _Budget) -> str:
        if not text:
            return text
        masked = _encodable(self._mask(text))
        size = len(masked.encode("utf-8"))
        allowed = min(self.limits.text_bytes, budget.left)
        budget.left -= min(size, allowed)
        return _cut(masked, allowed)

    def _value(self, value: Any, depth: int, budget: _Budget) -> Any:
        if isinstance(value, str):
            return self._text(value, budget)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if depth >= self.limits.depth:
            return f"[cut: deeper than {self.limits.depth} levels]"
        if isinstance(value, Mapping):
            return self._object(value, depth, budget)
        if isinstance(value, Sequence):
            return self._list(value, depth, budget)
        return self._text(str(value), budget)

    def _object(self, value: Mapping[str, Any], depth: int, budget: _Budget) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for number, (key, item) in enumerate(value.items()):
            if number >= self.limits.items:
                result["cut"] = f"[cut: first {self.limits.items} of {len(value)} entries]"
                break
            name = self.text(str(key), 512)
            while name in result:  # two keys may become one by masking; neither value may be lost
                name += "'"
            masks = names_a_secret(str(key)) and item not in (None, "", True, False)
            result[name] = MASK if masks else self._value(item, depth + 1, budget)
        return result

    def _list(self, value: Sequence[Any], depth: int, budget: _Budget) -> list[Any]:
        result: list[Any] = []
        previous = ""
        for number, item in enumerate(value):
            if number >= self.limits.items:
                result.append(f"[cut: first {self.limits.items} of {len(value)} items]")
                break
            # An argv: the secret is the word after the option.
            if isinstance(item, str) and item and _OPTION.match(previous):
                result.append(MASK)
            elif isinstance(item, str) and ":" in item and _USER_OPTION.match(previous):
                result.append(self._text(item.split(":", 1)[0], budget) + ":" + MASK)
            else:
                result.append(self._value(item, depth + 1, budget))
            previous = item if isinstance(item, str) else ""
        return result


@dataclasses.dataclass
class _Budget:
    """Bytes of text a span may still take."""

    left: int


def _collect(value: Any, texts: list[str], depth: int, limits: Limits) -> bool:
    """Append every text below ``value`` to ``texts``; ``False`` when the careful walk is needed anyway."""
    if depth > limits.depth:
        return False
    if isinstance(value, Mapping):
        if len(value) > limits.items:
            return False
        for key, item in value.items():
            if names_a_secret(key) or len(key) > 100:
                return False
            texts.append(key)
            if type(item) is str:
                texts.append(item)
            elif not isinstance(item, (int, float, type(None))) and not _collect(item, texts, depth + 1, limits):
                return False
    elif isinstance(value, (list, tuple)):
        if len(value) > limits.items:
            return False
        for item in value:
            if type(item) is str:
                texts.append(item)
            elif not isinstance(item, (int, float, type(None))) and not _collect(item, texts, depth + 1, limits):
                return False
    else:
        return False
    return True


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _encodable(text: str) -> str:
    """Bytes that were no UTF-8 (lone surrogates) and NUL, which PostgreSQL refuses, become U+FFFD."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if text.isascii() or _is_encodable(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _cut(text: str, cap: int) -> str:
    if len(text) * 4 <= cap:
        return text
    data = text.encode("utf-8")
    if len(data) <= cap:
        return text
    kept = data[: max(cap, 0)].decode("utf-8", "ignore")
    return f"{kept} [cut: first {len(kept.encode('utf-8'))} of {len(data)} bytes]"


def _variants(secret: str) -> list[tuple[str, int]]:
    """The forms a secret takes on its way, each with how many more characters around a find belong to it.

    The edge is for base64 only: the characters next to the found core carry bits of the secret as well.
    """
    plain = {secret, secret.strip()}
    lines = [line.strip() for line in secret.splitlines()]
    if len(lines) > 1:
        plain |= {line for line in lines if len(line) >= _MIN_LINE}
    forms: dict[str, int] = {}
    for text in plain:
        written = {text}
        for ensure_ascii in (True, False):
            once = json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]
            twice = json.dumps(once, ensure_ascii=ensure_ascii)[1:-1]
            written |= {once, twice, json.dumps(twice, ensure_ascii=ensure_ascii)[1:-1]}
        utf8 = text.encode("utf-8", "surrogateescape")
        written |= {
            text.replace("\n", "\r\n"), repr(text)[1:-1], html.escape(text), html.escape(text, quote=False),
            urllib.parse.quote(utf8, safe=""), urllib.parse.quote(utf8), urllib.parse.quote_plus(utf8),
            re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), urllib.parse.quote(utf8, safe="")),
        }  # fmt: skip
        for form in written:
            if len(form) >= MIN_SECRET:
                forms.setdefault(form, 0)
        for form in (utf8.hex(), utf8.hex().upper()):
            if len(form) >= _MIN_ENCODED:
                forms.setdefault(form, 0)
        # Where the secret begins within a group of three bytes decides how it looks in base64; the characters at both
        # ends also depend on the neighbours, so the core between them is searched and one more masked on each side.
        for offset in range(3):
            encoded = base64.b64encode(b"\0" * offset + utf8).decode("ascii")
            core = encoded[(0, 2, 3)[offset] : (offset + len(utf8)) * 8 // 6]
            if len(core) >= _MIN_ENCODED:
                for form in (core, core.replace("+", "-").replace("/", "_")):
                    forms[form] = max(1, forms.get(form, 0))
    return list(forms.items())
