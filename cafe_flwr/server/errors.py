"""What goes wrong in a round, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class RoundFailed(RuntimeError):
    """Too few clients replied well in a round; the server's state is as before it.

    Attributes
    ----------
    participants
        Clients that were asked.
    left_out
        Those that did not, with the reason.
    """

    def __init__(self, text: str, participants: Sequence[int], left_out: Mapping[int, str]) -> None:
        super().__init__(text)
        self.participants = participants
        self.left_out = left_out


def last_line(reason: str | None) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return lines[-1].removesuffix("'>") if lines else "no reason given"  # Ray's errors come in <class 'x'>:<'…'>
