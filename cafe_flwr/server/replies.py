"""Sorting out what came back: replies that can be used, and clients that are left out, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from flwr.app import Message


class _Reply(Protocol):
    @property
    def reports(self) -> Sequence[Any]: ...

    @property
    def failures(self) -> Mapping[int, str]: ...

    @property
    def notes(self) -> Mapping[int, str]: ...


R = TypeVar("R", bound=_Reply)


@dataclass(frozen=True)
class Asked:
    """A message under way, and the node and clients it is for."""

    message: Message
    node: int
    clients: list[int]


def sort_out(
    replies: Iterable[Message],
    asked: Sequence[Asked],
    read: Callable[[Message], R],
    on_node: Callable[[int, bool], None],
) -> tuple[list[R], dict[int, str]]:
    """Match replies with what was asked, and read them.

    Parameters
    ----------
    replies
        In any order; some may be errors, some missing, some nobody asked for.
    asked
        The messages they answer.
    read
        Reads a reply; whatever it raises leaves the reply's clients out.
    on_node
        Called with every node asked, and whether it failed.

    Returns
    -------
    Replies with at least one report, in the order of their clients, and the clients left out with the reason.
    """
    waiting = {one.message.metadata.message_id: one for one in asked}
    good: list[R] = []
    left_out: dict[int, str] = {}
    for message in replies:
        # By the message it answers: an error's sender may be the server itself.
        one = waiting.pop(message.metadata.reply_to_message_id, None)
        if one is None:
            continue
        on_node(one.node, message.has_error())
        if message.has_error():
            left_out |= dict.fromkeys(one.clients, f"its node failed: {last_line(message.error.reason)}")
            continue
        try:
            reply = read(message)
            answered = [report.client for report in reply.reports] + list(reply.failures)
            if sorted(answered) != one.clients:
                raise ValueError(f"it answers for clients {answered}, asked were {one.clients}")
        except Exception as error:  # whatever a node may send: the round goes on without it
            left_out |= dict.fromkeys(one.clients, f"its node's reply cannot be used: {error}")
            continue
        left_out |= reply.failures
        if reply.reports:
            good.append(reply)
    for one in waiting.values():
        on_node(one.node, True)
        left_out |= dict.fromkeys(one.clients, "no reply from its node in time")
    return sorted(good, key=lambda reply: reply.reports[0].client), left_out


def notes_in(replies: Iterable[_Reply]) -> dict[int, str]:
    """What nodes noted about clients that they report, in the order of the clients."""
    found = {
        report.client: reply.notes[report.client]
        for reply in replies
        for report in reply.reports
        if report.client in reply.notes
    }
    return dict(sorted(found.items()))


def last_line(reason: str | None) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return lines[-1].removesuffix("'>") if lines else "no reason given"  # Ray's errors come in <class 'x'>:<'…'>
