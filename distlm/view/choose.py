"""Which view a command has."""

from __future__ import annotations

import sys

from distlm.view import View
from distlm.view.plain import JsonView, PlainView


def make_view(as_json: bool) -> View:
    return JsonView(sys.stdout) if as_json else PlainView(sys.stdout)
