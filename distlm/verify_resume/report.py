"""A verdict as text for people. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from distlm.verify_resume.compare import PieceResult, Verdict

_HEAD = ("piece", "workers", "steps", "ended", "samples", "max |loss difference|")


def table(verdict: Verdict) -> Iterator[str]:
    """A line for each piece, compared with the straight run, and one for each checkpoint."""
    rows = [_HEAD, *(_row(number, result) for number, result in enumerate(verdict.pieces, 1))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for state in verdict.states:
        if state.identical:
            text = "weights and optimizer state bit-identical"
        elif state.max_weight_difference == 0:
            text = "weights bit-identical, optimizer state not"
        else:
            text = (
                f"weights differ by up to {state.max_weight_difference:.1e}; their distance is {state.relative:.1e} of "
                "the way that training moved them"
            )
        yield f"checkpoint of step {state.step}: {text}"


def _row(number: int, result: PieceResult) -> tuple[str, ...]:
    piece = result.piece
    return (
        str(number),
        str(piece.workers),
        f"{piece.first_step}-{piece.last_step}",
        "finished" if piece.killed_in_step is None else f"killed in step {piece.killed_in_step}",
        "equal" if result.samples_equal else "DIFFERENT",
        f"{result.max_loss_difference:.1e}" if result.max_loss_difference else "0",
    )


def verdict_text(verdict: Verdict) -> str:
    """The last line: what holds, or the first thing that does not."""
    if not verdict.is_correct:
        more = f" ({len(verdict.differences) - 1} more)" if len(verdict.differences) > 1 else ""
        return f"resume is NOT correct: {verdict.differences[0]}{more}"
    workers = verdict.pieces[0].piece.workers
    resized = [result for result in verdict.pieces if result.was_resized]
    sizes = ", ".join(dict.fromkeys(str(result.piece.workers) for result in resized))
    if not verdict.bit_identical:
        return (
            f"resume is within tolerance, not bit-identical: the same samples; on {workers} workers, too, losses or "
            "weights differ by rounding, as kernels on GPUs may"
        )
    text = f"resume is exact: the same samples, and the same bits on {workers} workers"
    return text + (f"; after resizing to {sizes}, losses and weights agree within rounding" if resized else "")
