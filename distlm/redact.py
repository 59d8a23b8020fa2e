"""Secrets in text. Standard library only."""

from __future__ import annotations

import re

# Lengths are limited, so that lines of a megabyte take no minutes.
_USER_INFO = re.compile(r"://(?:[^\s/:@]{0,256}:\S{0,1024}|[^\s/:@]{0,256})@")
_SECRET_QUERY = re.compile(
    r"([?&][^=&\s]{0,64}(?:password|passwd|secret|token|key)[^=&\s]{0,64}=)[^&\s]*", re.IGNORECASE
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


def redact_uri(text: str) -> str:
    """`text` (a URI, or a message that holds URIs) without user names, passwords and tokens."""
    return _TOKEN.sub("***", _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("://***@", text)))


def drop_queries(text: str) -> str:
    """`redact_uri`, and without all query strings: whatever is in those of signed URLs opens them."""
    return _QUERY.sub(r"\1\2", redact_uri(text))


def holds_password(text: str) -> bool:
    """Whether a URI in `text` carries a password that is written out, and not as ${NAME}."""
    return re.search(r"://[^\s/:@]*:(?!\$\{)[^\s/@]+@", text) is not None
