"""What a reproduction keeps between calls: parts that are done, and every value that took long to measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from common import Figure
from longrope.files import append_line, read_lines

Json = Any


class OutOfTimeError(Exception):
    """The time of a call is up; the next call goes on."""


class State:
    """Lines in parts.jsonl and values.jsonl of a folder.

    made_of: hash of what all parts are made of; parts of anything else are none of these. minutes: after so many
    nothing more is begun, but one thing a call; None is no limit. keep: called whenever something more is done.
    """

    def __init__(
        self, folder: Path, made_of: str, minutes: float | None = None, keep: Callable[[], None] | None = None
    ) -> None:
        self._keep = keep
        self._made_of, self._begun = made_of, False
        self._until = None if minutes is None else time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)
        self._parts_file, self._values_file = folder / "parts.jsonl", folder / "values.jsonl"
        parts = read_lines(self._parts_file, repair=True, required={"part": str, "seconds": float})
        values = read_lines(self._values_file, repair=True, required={"key": str})
        ours = [line for line in parts if line.get("made_of") == made_of]
        self._parts: dict[str, Mapping[str, Any]] = {line["part"]: line for line in ours if not line.get("paused")}
        self._spent: dict[str, float] = {}
        for line in ours:
            self._spent[line["part"]] = self._spent.get(line["part"], 0.0) + line["seconds"]
        self._values: dict[str, Json] = {line["key"]: line["value"] for line in values}
        self._figures: list[dict[str, Any]] = []
        self._tables: dict[str, Json] = {}

    @property
    def cut(self) -> bool:
        """Whether calls are limited, so that what is long is done one piece at a time."""
        return self._until is not None

    def begin(self) -> None:
        """Before each training, stage and measurement: raises OutOfTimeError when the time is up and one was made."""
        if self._begun:
            if self._keep is not None:
                self._keep()
            if self._until is not None and time.monotonic() >= self._until:
                raise OutOfTimeError
        self._begun = True

    def once(self, key: str, measure: Callable[[], Json]) -> Json:
        """A value by key, measured where it is not known; the key says all that it depends on."""
        if key not in self._values:
            self.begin()
            self._values[key] = measure()
            append_line(self._values_file, {"key": key, "value": self._values[key]})
        return self._values[key]

    def figure(self, figure: str, on: str, value: float, limit: float, unit: str = "", **details: Any) -> None:
        """A figure of the part that is going on."""
        made = Figure(figure, on, value, limit, unit, details)
        self._figures.append(
            {"figure": figure, "on": on, "value": value, "limit": limit, "unit": unit, "details": dict(made.details)}
        )

    def table(self, name: str, rows: Json) -> None:
        """A table of the part that is going on."""
        self._tables[name] = rows

    def has(self, part: str) -> bool:
        """Whether a part is done."""
        return part in self._parts

    def finish(self, part: str, seconds: float, made: Mapping[str, Any]) -> None:
        """Write down that a part is done, with its figures and tables. made: when and where."""
        line: dict[str, Any] = {"part": part, "made_of": self._made_of, "seconds": round(seconds, 1)}
        line |= {"made": dict(made), "figures": self._figures, "tables": self._tables}
        append_line(self._parts_file, line)
        self._parts[part], self._figures, self._tables = line, [], {}
        self._spent[part] = self._spent.get(part, 0.0) + line["seconds"]

    def pause(self, part: str, seconds: float) -> None:
        """Write down how long this call has worked on a part that the next one goes on with."""
        line = {"part": part, "made_of": self._made_of, "seconds": round(seconds, 1), "paused": True}
        append_line(self._parts_file, line)

    def seconds(self, part: str) -> float:
        """How long a part took, over all calls."""
        return self._spent[part]

    def made(self, part: str) -> Mapping[str, Any]:
        """When and where a part was finished."""
        return cast(Mapping[str, Any], self._parts[part].get("made", {}))

    def figures(self, part: str) -> list[dict[str, Any]]:
        """The figures of a part, none where it is not done."""
        return list(self._parts.get(part, {}).get("figures", []))

    def tables(self, part: str) -> dict[str, Json]:
        """The tables of a part, none where it is not done."""
        return dict(self._parts.get(part, {}).get("tables", {}))
