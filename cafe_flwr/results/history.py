"""What a run has written of its rounds: checked before it is resumed, and cut to what its checkpoint has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe_flwr.core.files import append, to_json, write_atomically

COLUMNS = ("round", "client", "phase", "exit", "accuracy", "loss", "ece", "examples")

# What the summary needs of every round.
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "participants": list,
    "left_out": dict,
    "bytes_up": (int, float),
    "bytes_down": (int, float),
    "local_steps": (int, float),
    "accuracy_per_exit": list,
    "accuracy_per_exit_after": list,
}


@dataclass(frozen=True)
class History:
    """``rounds.jsonl`` and ``checkpoint/clients.csv`` of a results folder; a round's lines are on disk when it ends."""

    folder: Path

    @property
    def rounds(self) -> Path:
        """A line of JSON for every round."""
        return self.folder / "rounds.jsonl"

    @property
    def rows(self) -> Path:
        """The long table: a row for every client, phase and exit of an evaluated round."""
        return self.folder / "checkpoint" / "clients.csv"

    def begin(self) -> None:
        """Make both files new."""
        write_atomically(self.rounds, "")
        write_atomically(self.rows, ",".join(COLUMNS) + "\n")

    def add(self, rows: Iterable[Sequence[Any]], line: dict[str, Any] | None = None) -> None:
        """Add rows to the long table, then the line of their round."""
        append(self.rows, "".join(",".join(map(str, row)) + "\n" for row in rows))
        if line is not None:
            append(self.rounds, to_json(line))

    def read(self) -> list[dict[str, Any]]:
        """The lines of all rounds."""
        return [json.loads(line) for line in self.rounds.read_bytes().splitlines()]

    def cut(self, last: int) -> None:
        """Drop what was written after round ``last``; ValueError as :meth:`until`."""
        for path, lines in self.until(last).items():
            write_atomically(path, b"".join(lines))

    def until(self, last: int) -> dict[Path, list[bytes]]:
        """Lines of both files until round ``last``, with their ends.

        ValueError, naming the file and what to do, if one of them lacks a round, or holds what the run did not write.
        """
        texts = _lines_of(self.rounds)[:last]
        rounds = list(self._read_rounds(texts, last))
        header, *rows = _lines_of(self.rows) or [b""]
        if header.strip() != ",".join(COLUMNS).encode():
            raise _damaged(self.rows, f"it should begin with {','.join(COLUMNS)}")
        kept, seen = [header], set[tuple[int, int]]()
        for number, row in enumerate(rows, start=2):
            try:
                server_round, client, phase = _read_row(row)
            except ValueError:
                if number <= len(rows) or row.endswith(b"\n"):  # else a row that a killed process has begun
                    raise _damaged(self.rows, f"line {number} is no row of the table") from None
                continue
            if server_round <= last and phase != "final":
                kept.append(row)
                seen.add((server_round, client))
        for server_round, line in enumerate(rounds, start=1):
            evaluated = any(value is not None for value in line["accuracy_per_exit"])
            clients = {int(client) for client in line["participants"]} - set(map(int, line["left_out"]))
            if lost := evaluated and [c for c in sorted(clients) if (server_round, c) not in seen]:
                raise _damaged(self.rows, f"it has no rows of client {lost[0]} in round {server_round}")
        return {self.rounds: texts, self.rows: kept}

    def _read_rounds(self, texts: Sequence[bytes], last: int) -> Iterator[dict[str, Any]]:
        for number in range(1, last + 1):
            try:
                line = json.loads(texts[number - 1])
                sound = line["round"] == number and all(isinstance(line[key], kind) for key, kind in _NEEDED.items())
            except (ValueError, LookupError, TypeError, RecursionError):
                sound = False
            if not sound:
                raise _damaged(
                    self.rounds, f"the run has finished {last} rounds, but line {number} is not that of round {number}"
                )
            yield line


def _lines_of(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise _damaged(path, str(error)) from None


def _read_row(row: bytes) -> tuple[int, int, str]:
    """Round, client and phase of a row; ValueError if it is not whole."""
    server_round, client, phase, *figures = row.decode().removesuffix("\n").split(",")
    if not row.endswith(b"\n") or len(list(map(float, figures))) != len(COLUMNS) - 3:
        raise ValueError("it is cut")
    return int(server_round), int(client), phase


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(f"{path} is damaged: {how}. Bring the file back from a copy, or start a new run")
