"""Mutations of Flower messages: other records, keys, types, lengths, values, texts and bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

_INTS = (0, 1, -1, 7, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63))
_FLOATS = (0.0, -0.0, -1.0, 0.5, 1.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
_LONG = ("[" * 10**5, '{"a":' * 10**4, "9" * 5000, "y" * 10**5)
_TEXTS = ("", "xx", "null", "\x1b[31m\n[ROUND 9/9]", "\u202e\u2066gpj", *_LONG)
_JSON = (None, True, -1, 2**70, 1e308, "x", [], {}, [[]], [[1, 2], [3]], 10**400, float("nan"), float("inf"))


def delivered(content: RecordDict) -> RecordDict:
    """A content after Flower's serialisation."""
    return recorddict_from_proto(RecordDictProto.FromString(recorddict_to_proto(content).SerializeToString()))


def mutated(content: RecordDict, rng: random.Random) -> RecordDict:
    """A copy with one to three changes of records, keys, values or arrays."""
    copy = RecordDict({key: type(record)(dict(record)) for key, record in content.items()})
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _mutate(copy, rng)
    return copy


def _mutate(content: RecordDict, rng: random.Random) -> None:
    if not content:
        return
    key = rng.choice(list(content))
    record: Any = content[key]
    if rng.random() < 0.05:
        del content[key]
    elif rng.random() < 0.04:
        content[rng.choice((f"{key}x", "client-7", "config", "metrics"))] = record
    elif isinstance(record, ArrayRecord):
        content[key] = ArrayRecord(_arrays(dict(record), rng))
    else:
        content[key] = type(record)(_values(dict(record), type(record) is MetricRecord, rng))


def _values(values: dict[str, Any], numbers: bool, rng: random.Random) -> dict[str, Any]:
    """Values of a record with one changed; ``numbers``: where Flower takes numbers only."""
    name = rng.choice([*values, "zzz"])
    given = values.get(name, 0)
    change = rng.randrange(6)
    if change == 0:
        values.pop(name, None)
    elif change == 1:
        values[name] = _any(numbers, rng)
    elif change == 2 and isinstance(given, str):
        values[name] = _text(given, rng)
    elif isinstance(given, list) and given:
        values[name] = _list(given, rng)
    elif isinstance(given, int | float) and type(given) is not bool:
        values[name] = rng.choice((*_INTS, *_FLOATS, -given, given + 1, float(given)))
    else:
        values[name] = _any(numbers, rng)
    return values


def _any(numbers: bool, rng: random.Random) -> Any:
    pools: list[Sequence[Any]] = [_INTS, _FLOATS]
    if not numbers:
        pools += [_TEXTS, (b"", b"\xff" * 9), (True, False)]
    pool = rng.choice(pools)
    return rng.choice(
        (rng.choice(pool), [rng.choice(pool) for _ in range(rng.choice((0, 1, 2, 3, 3 if pool is _TEXTS else 1000)))])
    )


def _list(values: list[Any], rng: random.Random) -> list[Any]:
    """A list of the same type with other values, or another length."""
    kind, place = type(values[0]), rng.randrange(len(values))
    pool = {int: _INTS, float: _FLOATS, str: _TEXTS, bool: (True, False), bytes: (b"",)}[kind]
    changes: Sequence[Callable[[], list[Any]]] = (
        lambda: values[:-1],
        lambda: values + values[:1],
        lambda: values[::-1],
        lambda: values * (2 if kind in (str, bytes) or len(values) > 1000 else 1000),
        lambda: [values[0]] * len(values),
        lambda: [*values[:place], rng.choice(pool), *values[place + 1 :]],
        lambda: [rng.choice(pool) for _ in values],
        lambda: [float(v) for v in values] if kind is int else [str(v) for v in values][:0],
        lambda: [_text(v, rng) for v in values] if kind is str else values[:0],
    )
    return rng.choice(changes)()


def _text(text: str, rng: random.Random) -> str:
    """Another text; one of JSON with a part replaced."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list | dict) or rng.random() < 0.3:
        place = rng.randrange(len(text) + 1)
        return rng.choice((rng.choice(_TEXTS), text[:place], text[:place] + "\u202e" + text[place:], text * 2))
    at: Any = value
    while True:
        steps = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not steps:
            return text
        step = rng.choice(steps)
        if isinstance(at[step], list | dict) and at[step] and rng.random() < 0.7:
            at = at[step]
            continue
        if rng.random() < 0.2:
            del at[step]
        elif type(at[step]) is int and rng.random() < 0.5:
            at[step] = rng.choice((at[step] + 1, -at[step] - 1, at[step] * 10**6, at[step] + 0.5))
        else:
            at[step] = rng.choice(_JSON)
        return json.dumps(value)


def _arrays(arrays: dict[str, Array], rng: random.Random) -> dict[str, Array]:
    """Other arrays, or one whose bytes are not what they say."""
    if not arrays:
        return {"flat": Array(np.zeros(3, dtype=np.float32))}
    name, array = next(iter(arrays.items()))
    data = array.data
    try:
        flat = array.numpy().copy()
    except (ValueError, TypeError, EOFError, MemoryError):  # an earlier change
        flat = np.zeros(3, dtype=np.float32)
    flat = flat if flat.dtype.kind == "f" else np.zeros(3, dtype=np.float32)
    place = rng.randrange(max(1, len(data)))
    poked = flat.copy()
    if len(flat):
        with np.errstate(over="ignore"):
            poked[rng.randrange(len(flat))] = rng.choice(_FLOATS)
    lie = data.replace(b"(%d,)" % len(flat), b"(%d,)" % 10**11, 1)
    changes: Sequence[Callable[[], dict[str, Array]]] = (
        dict,
        lambda: {name: array, "more": array},
        lambda: {"other": array},
        lambda: {name: Array(flat[:-1])},
        lambda: {name: Array(np.append(flat, flat[:1]))},
        lambda: {name: Array(flat[:, None])},
        lambda: {name: Array(flat.astype(rng.choice(("f8", "f2", "i4", "?", ">f4", "c8", "U3"))))},
        lambda: {name: Array(poked)},
        lambda: {name: Array(np.nan_to_num(flat) * np.float32(rng.choice((-1, 1e3, 1e20))))},
        lambda: {name: Array(array.dtype, array.shape, array.stype, data[:place])},
        lambda: {name: Array(array.dtype, array.shape, array.stype, data[:place] + b"\xff" + data[place + 1 :])},
        lambda: {name: Array(array.dtype, array.shape, array.stype, lie)},
        lambda: {name: Array(array.dtype, array.shape, "pickle", data)},
        lambda: {name: Array("x" * 999, (2**31 - 1, 7), array.stype, data)},
    )
    with np.errstate(all="ignore"):
        return rng.choice(changes)()
