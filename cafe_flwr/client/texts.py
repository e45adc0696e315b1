"""What a node says in words to the server, without what is of this machine alone: paths, and the user's name."""

from __future__ import annotations

import functools
import getpass
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message

from cafe_flwr.core.log import logger

_TEXTS = ("failures", "notes", "problems")  # keys of a reply's config that hold sentences
_HIDDEN = "<path>"
_LONGEST = 4000  # characters of a text
_ANYBODY = {"admin", "app", "client", "data", "flower", "node", "nobody", "root", "runner", "server", "ubuntu", "user"}

_START = r"(?:file:/|/(?=[^\s/'\"`])|~[\w.-]*[/\\]|[A-Za-z]:[\\/]|\\\\(?=\w)|\.\.[\\/])"
_REST = r"[^\s'\"`<>|;,)\]}]*"
_WORD = r"[^\s/\\:;'\"`]+"
# Names may contain spaces: what follows belongs to the path if it has a separator, or ends as the name of a file.
_LATER = rf",?[ ](?:{_WORD}[ ]){{0,3}}?(?:{_WORD}[/\\]{_REST}|[^\s/\\:;'\"`]*\.[A-Za-z0-9]{{1,8}}(?=$|[\s:;,'\")]))"
_PATH = re.compile(
    rf"(?P<kept>\b(?!file:)[a-z][a-z0-9+.-]+://\S*)"
    rf"|(?P<quote>['\"`]){_START}[^\n]*?(?P=quote)"
    rf"|(?<![\w)\]-]){_START}{_REST}(?:{_LATER})*"
)


def without_paths(text: str, data: str = "") -> str:
    """A text without paths: those in the folder ``data`` are shown relative to it, others as ``<path>``.

    Examples
    --------
    >>> without_paths("cannot read '/home/ann/scans/ward 7/1.png'", "/home/ann/scans"), without_paths("in ~/a: no")
    ("cannot read 'ward 7/1.png'", 'in <path>: no')
    """
    text = text[:_LONGEST]
    if data:
        text = re.sub(rf"(?:file:/*)?{re.escape(data)}[/\\]+", "", text)
        text = re.sub(rf"{re.escape(data)}(?=$|\W)", Path(data).name, text)
    for folder in filter(None, (os.path.expanduser("~"), tempfile.gettempdir(), os.getcwd())):
        if len(folder) > 1:  # they may contain spaces
            text = text.replace(folder + os.sep, "/x/")
    text = _PATH.sub(lambda found: found["kept"] or _quoted(found["quote"]) + ":" * found[0].endswith(":"), text)
    return re.sub(rf"\b{re.escape(user)}\b", "<user>", text) if (user := _user()) else text


def _quoted(quote: str | None) -> str:
    return f"{quote}{_HIDDEN}{quote}" if quote else _HIDDEN


@functools.cache
def _user() -> str:
    """The user's name; empty if it has none, or one that is nobody's."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""
    return name if len(name) > 2 and name.lower() not in _ANYBODY else ""


T = TypeVar("T")


def without_local_texts(answer: Callable[[T, Message, Context], Message]) -> Callable[[T, Message, Context], Message]:
    """An answer of the node whose sentences, and error if it raises one, are without paths; the node's log has them."""

    @functools.wraps(answer)
    def said(self: T, message: Message, context: Context) -> Message:
        clean = functools.partial(without_paths, data=_data_folder(context))
        try:
            reply = answer(self, message, context)
        except Exception as error:
            if (text := clean(str(error))) == str(error):
                raise
            logger.warning("%s cannot be answered", message.metadata.message_type, exc_info=True)
            raise RuntimeError(f"{type(error).__name__}: {text}") from None
        for record in reply.content.config_records.values():
            for key in record.keys() & set(_TEXTS):
                record[key] = [clean(text) for text in _texts(record[key])]
        return reply

    return said


def _texts(value: Any) -> list[str]:
    return list(map(str, value))


def _data_folder(context: Context) -> str:
    """Where the clients' data are: the node's own folder, or that which the run's settings name."""
    own = str(context.node_config.get("data-dir", ""))
    kind, _, named = str(context.run_config.get("dataset", "")).partition(":")
    folder = own or (named if kind == "local" else "")
    return os.path.expanduser(folder).rstrip("/\\")
