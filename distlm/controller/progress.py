"""What the controller tells those who watch the attempt: the events of `distlm.view`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distlm.view import View, make_event

if TYPE_CHECKING:
    from distlm.data.notes import PreparationProgress

_WARNING = "warning: "


class Progress:
    """Makes events and hands them to a view."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._total_steps = 0

    def say(self, text: str) -> None:
        """A line for people; one that begins with "warning: " is a warning."""
        if text.startswith(_WARNING):
            self._view.show(make_event("warning", message=text.removeprefix(_WARNING)))
        else:
            self._view.show(make_event("note", message=text))

    def phase(self, phase: Literal["ray", "prepare", "workers", "export", "upload"], message: str) -> None:
        """What is being done from now on."""
        self._view.show(make_event("phase", phase=phase, message=message))

    def preparation(self, progress: PreparationProgress) -> None:
        """How far the data is."""
        self._view.show(make_event("preparation", **progress.to_json()))

    def training(self, step: int, total_steps: int, device: str) -> None:
        """An incarnation begins after `step`, to train up to `total_steps` on devices of this kind."""
        self._total_steps = total_steps
        self._view.show(make_event("training", step=step, total_steps=total_steps, device=device))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._view.show(make_event("metrics", step=step, total_steps=self._total_steps, values=values))

    def stopping(self, message: str) -> None:
        self._view.show(make_event("stopping", message=message))
