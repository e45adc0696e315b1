"""What a request to train or to evaluate may say: a senseless one is refused on the node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from cafe_flwr.core.text import kebab, shown
from cafe_flwr.training.options import LocalBudget
from cafe_flwr.wire.codec import prefixed
from cafe_flwr.wire.keys import WIRES
from cafe_flwr.wire.options import Privacy
from cafe_flwr.wire.reader import CLIENT, distinct, flag, read, token, whole

_REQUEST = {
    "run": token(),
    "seed": whole(high=2**63 - 1),
    "digest": token(),
    "server-round": whole(low=1),
    "num-rounds": whole(low=1),
    "resumable-from": whole(),
    "clients": CLIENT,
    "versions": whole("v"),
    "downloads": whole("d"),
    "active-exits": flag("e"),
    "evaluate": flag(default=True),
    "publish": flag(default=False),
    "method": token(),
    "wire-dtype": token(default="float32"),
    "plain-mean": flag(default=False),
}


def request_values(config: Mapping[str, Any], message_type: str, num_exits: int | None) -> dict[str, Any]:
    """The values of a request's config, by key.

    ValueError if one is impossible, or if they do not agree with one another or with the node's deepest client, which
    has ``num_exits``.
    """
    values = read(config, _REQUEST, subject="the request's lists")
    if values["wire-dtype"] not in WIRES:
        raise ValueError(f"the server's values are {values['wire-dtype']!r}, this node reads {' and '.join(WIRES)}")
    clients, versions, exits = values["clients"], values["versions"], values["active-exits"]
    wanted = len(exits) if num_exits is None else len(clients) * (num_exits - 1)
    if len(versions) != len(clients) or len(exits) != wanted or (clients and len(exits) % len(clients)):
        raise ValueError(
            f"the request names {len(clients)} clients, {len(versions)} versions of their state and "
            f"{len(exits)} exits: they do not agree"
        )
    if not set(distinct(values["downloads"], "downloads")) <= set(distinct(clients, "clients")):
        raise ValueError(
            f"the request has something for clients {shown(repr(values['downloads']))}, which it is not for"
        )
    now, last = values["server-round"], values["num-rounds"]
    newest = now if message_type.startswith("evaluate") else now - 1
    if now > last or values["resumable-from"] > now or max(versions, default=0) > newest:
        raise ValueError(
            f"the request is of round {now} of {last}, may be resumed from round {values['resumable-from']}, and "
            f"starts from state of rounds {shown(repr(versions))}: they do not agree"
        )
    return values


_Settings = TypeVar("_Settings", LocalBudget, Privacy)


def settings_from(kind: type[_Settings], config: Mapping[str, Any], prefix: str) -> _Settings:
    """Settings of a request; ValueError if one is unknown or out of range."""
    given = prefixed(config, prefix)
    if unknown := given.keys() - {f.name for f in fields(kind)}:
        names = ", ".join(sorted(prefix + kebab(name) for name in unknown))
        raise ValueError(f"this node knows no setting {shown(names)}")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(shown(str(error))) from None
