"""Secrets in text. Standard library only."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"://(?:[^\s/:@]*:\S*|[^\s/:@]*)@")
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:password|passwd|secret|token|key)[^=&\s]*=)[^&\s]*", re.IGNORECASE)

# Of a URL, and of the path alone, as some libraries tell it.
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*|(/[^\s?'\"]*)\?[^\s='\"]*=[^\s'\"]*")


def redact_uri(text: str) -> str:
    """`text` (a URI, or a message that holds URIs) without user names, passwords and tokens."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("://***@", text))


def drop_queries(text: str) -> str:
    """`redact_uri`, and without all query strings: whatever is in those of signed URLs opens them."""
    return _QUERY.sub(r"\1\2", redact_uri(text))


def holds_password(text: str) -> bool:
    """Whether a URI in `text` carries a password that is written out, and not as ${NAME}."""
    return re.search(r"://[^\s/:@]*:(?!\$\{)[^\s/@]+@", text) is not None
