"""Secrets in text: how they are told, and what stands in their place. Standard library only.

A config with a secret that is written out is refused (`holds_secret`). All else that is written or shown goes through
here, for libraries put addresses into their errors: events (distlm.view), result.json, metrics.jsonl and what it brings
to the tracker, the output of the controller and the workers, diffs, remotes and packages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Lengths are limited, so that lines of a megabyte take no minutes.
_USER_INFO = re.compile(r"://(?:[^\s/:@]{0,256}:\S{0,1024}|[^\s/:@]{0,256})@")
_SECRET_QUERY = re.compile(
    r"([?&](?:[^=&\s]{0,64}(?:password|passwd|secret|token|key|signature|credential)[^=&\s]{0,64}|sig)=)"
    r"(?!\$\{)[^&\s'\"]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"hf_[A-Za-z0-9]{30,}|gh[opsru]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}"  # Hugging Face, GitHub
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{30,}"  # AWS, OpenAI
    r"|xox[a-z]-[A-Za-z0-9-]{10,}"  # Slack
    r")"
)

# Of a URL, and of the path alone, as some libraries tell it.
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*|(/[^\s?'\"]*)\?[^\s='\"]*=[^\s'\"]*")

_PASSWORD = re.compile(r"://[^\s/:@]*:(?!\$\{)[^\s/@]+@")
_WEB_USER = re.compile(r"https?://(?!\$\{)[^\s/:@]+@", re.IGNORECASE)
"""Alone it is a token. Elsewhere it may be a name, as in abfss://CONTAINER@ACCOUNT."""

_SECRET_VARIABLES = ("TOKEN", "PASSWORD", "PASSWD", "SECRET", "KEY")
"""Ends of the names of environment variables that hold one."""
_SHORTEST_SECRET = 8
"""Shorter values may be words of the text, such as a password "test"."""


def redact_uri(text: str) -> str:
    """`text` (a URI, or a message that holds URIs) without user names, passwords and tokens, also those that stand in
    the environment."""
    for secret in _secrets_of_environment():
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("://***@", text)))


def redacted(value: Any) -> Any:
    """What JSON can hold, with all texts in it redacted."""
    match value:
        case str():
            return redact_uri(value)
        case Mapping():
            return {key: redacted(item) for key, item in value.items()}
        case list() | tuple():
            return [redacted(item) for item in value]
    return value


def copy_redacted(source: str, destination: str) -> None:
    """Copy a file of text, such as a log of somebody else's."""
    text = Path(source).read_text(encoding="utf-8", errors="surrogateescape")
    Path(destination).write_text(redact_uri(text), encoding="utf-8", errors="surrogateescape")


def drop_queries(text: str) -> str:
    """`redact_uri`, and without all query strings: whatever is in those of signed URLs opens them."""
    return _QUERY.sub(r"\1\2", redact_uri(text))


def holds_secret(text: str) -> bool:
    """Whether `text` holds a password or token that is written out, and not as ${NAME}."""
    return any(pattern.search(text) for pattern in (_PASSWORD, _WEB_USER, _SECRET_QUERY, _TOKEN))


def _secrets_of_environment() -> list[str]:
    """Longest first: one may be a part of another."""
    values = [value for name, value in os.environ.items() if name.upper().endswith(_SECRET_VARIABLES)]
    found = {
        line
        for value in values
        if not (value.startswith("/") and os.path.exists(value))  # a file of secrets
        for line in value.splitlines()
        if len(line) >= _SHORTEST_SECRET
    }
    return sorted(found, key=len, reverse=True)
