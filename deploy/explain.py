"""Explains Flower's messages when a SuperNode or a SuperLink ends at once, and says what to do."""

from __future__ import annotations

_OTHER_AUTHORITY = (
    "the SuperLink's certificate was not signed by the authority whose ca.crt this node was given: give it the "
    "deployment's ca.crt, and look whether the address is the right SuperLink's"
)
_NOT_BELIEVED = (
    "the SuperLink did not believe this node's signature, and Flower says nothing about it: the node's clock may be at "
    "most 5 s ahead of the SuperLink's and 305 s behind it; set both by NTP"
)
_CAUSES = (
    ("unable to get local issuer certificate", _OTHER_AUTHORITY),
    ("self-signed certificate", _OTHER_AUTHORITY),
    ("certificate signature failure", _OTHER_AUTHORITY),
    (
        "certificate is not yet valid",
        "this machine's clock is behind that of the machine the certificate was made on: set both by NTP",
    ),
    (
        "certificate has expired",
        "the SuperLink's certificate has expired, or this machine's clock is ahead: set the clock by NTP, or make a "
        "new one (python -m deploy certificates --overwrite) and restart the SuperLink",
    ),
    (
        "certificate is not valid for",
        "the SuperLink's certificate does not have the host that this node was given: use a name or address it was "
        "made for, or make a new one with --host (python -m deploy certificates --overwrite)",
    ),
    (
        "code: 2004",
        "the SuperLink does not take this node's key: it is not registered (python -m deploy register), or the node "
        "was killed a moment ago and is believed to be there still, for about a minute: start it again then",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "this side speaks TLS and the other does not: start both with --insecure, or better both without",
    ),
    ("Address already in use", "the port is taken: choose another with --port"),
)


def explain(log: str) -> str | None:
    """Why a process ended by itself, from everything that it printed; None if the cause is not a known one.

    Examples
    --------
    >>> explain("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired")[:39]
    "the SuperLink's certificate has expired"
    """
    if "SuperNode terminated gracefully" in log and "SuperNode ID:" not in log:
        return _NOT_BELIEVED
    return next((cause for words, cause in _CAUSES if words.lower() in log.lower()), None)
