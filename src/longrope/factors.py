"""RopeFactors and FactorTable: what a search finds, checked, and written as factors.json.

A rescale factor lambda_i divides the i-th RoPE frequency: pair i of a token at position n turns by
n / (lambda_i b^(2i/d)) (LongRoPE, arXiv 2402.13753, eq. 3). Factors are always relative to the unscaled rope_theta b.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from longrope.errors import UserError, shown
from longrope.files import read_json, write_atomically
from longrope.lengths import LONGEST, format_length

FACTORS = "factors.json"
"""The file of a table: of a run, beside the weights of a checkpoint, in an export."""
_FORMAT = "longrope-factors"
_VERSION = 1
_ROW_KEYS = {"up_to", "rescale", "start_tokens", "attention_factor"}
_REQUIRED_KEYS = {"format", "version", "rope_theta", "rotary_dim", "original_length", "table"}
_OPTIONAL_KEYS = {"model", "provenance"}


@dataclass(frozen=True)
class RopeFactors:
    """One rescale vector with its start tokens and attention factor, valid for sequences of up to `up_to` tokens.

    rescale: lambda_i for i = 0 .. d/2 - 1, d the rotary dimension; every one finite and positive.
    start_tokens: n-hat; positions 0 .. n-hat - 1 keep their unscaled angle.
    attention_factor: m; multiplies cos and sin, so attention logits grow by its square.
    Raises UserError when a value breaks these rules.
    """

    up_to: int
    rescale: tuple[float, ...]
    start_tokens: int = 0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "up_to", _whole(self.up_to, "up_to", at_least=1))
        object.__setattr__(self, "start_tokens", _whole(self.start_tokens, "start_tokens", at_least=0))
        object.__setattr__(self, "attention_factor", _positive(self.attention_factor, "attention_factor"))
        if (
            isinstance(self.rescale, str)
            or not isinstance(self.rescale, Sequence | np.ndarray)
            or not len(self.rescale)
        ):
            raise _wrong("rescale", shown(self.rescale), "it is a list of d/2 numbers")
        vector = tuple(_positive(value, f"rescale[{index}]") for index, value in enumerate(self.rescale))
        object.__setattr__(self, "rescale", vector)

    @property
    def vector(self) -> NDArray[np.float64]:
        """The rescale factors as an array of d/2 numbers."""
        return np.array(self.rescale)

    @property
    def key(self) -> str:
        """Short name of the values (not of `up_to`): equal for equal factors, on every machine."""
        values = [*self.rescale, self.start_tokens, self.attention_factor]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def with_values(self, **changes: Any) -> RopeFactors:
        """A checked copy with some fields replaced."""
        return replace(self, **changes)

    def over(self, base: RopeFactors) -> RopeFactors:
        """These factors on top of others: rescale and attention factors multiply, and the more start tokens are kept.

        So a second interpolation mu extends what a model was fine-tuned with, lambda = lambda_ft mu (LongRoPE, section
        3.3). Raises UserError for another number of pairs.
        """
        if len(self.rescale) != len(base.rescale):
            raise _wrong("rescale", f"{len(self.rescale)} numbers", f"those below have {len(base.rescale)}")
        return replace(
            self,
            rescale=tuple((self.vector * base.vector).tolist()),
            start_tokens=max(self.start_tokens, base.start_tokens),
            attention_factor=self.attention_factor * base.attention_factor,
        )

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in factors.json."""
        return {
            "up_to": self.up_to,
            "rescale": list(self.rescale),
            "start_tokens": self.start_tokens,
            "attention_factor": self.attention_factor,
        }


def unscaled(pairs: int, up_to: int) -> RopeFactors:
    """Factors of 1: the base model."""
    return RopeFactors(up_to=up_to, rescale=(1.0,) * pairs)


@dataclass(frozen=True)
class FactorTable:
    """Factors for several lengths of one model; the smallest sufficient row wins.

    rope_theta, rotary_dim, original_length: the model they belong to (of the extended layers).
    rows: ascending by `up_to`. model, provenance: informative.
    Raises UserError when rows and model disagree.
    """

    rope_theta: float
    rotary_dim: int
    original_length: int
    rows: tuple[RopeFactors, ...]
    model: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_theta", _positive(self.rope_theta, "rope_theta"))
        object.__setattr__(self, "rotary_dim", _whole(self.rotary_dim, "rotary_dim", at_least=2))
        object.__setattr__(self, "original_length", _whole(self.original_length, "original_length", at_least=1))
        if self.rotary_dim % 2:
            raise _wrong("rotary_dim", self.rotary_dim, "it is even")
        if not self.rows:
            raise _wrong("table", "no rows", "it has at least one row")
        object.__setattr__(self, "rows", tuple(self.rows))
        for row in self.rows:
            if len(row.rescale) != self.rotary_dim // 2:
                rule = f"rotary_dim {self.rotary_dim} has {self.rotary_dim // 2} pairs"
                raise _wrong("rescale", f"{len(row.rescale)} numbers", rule)
        lengths = [row.up_to for row in self.rows]
        if lengths != sorted(set(lengths)):
            raise _wrong("table", f"up_to {lengths}", "rows ascend by up_to")

    @property
    def lengths(self) -> list[int]:
        """`up_to` of every row, ascending."""
        return [row.up_to for row in self.rows]

    def row_for(self, length: int) -> RopeFactors:
        """The row that a sequence of `length` tokens uses. Raises UserError beyond the last row."""
        for row in self.rows:
            if length <= row.up_to:
                return row
        raise UserError(
            "sequence",
            got=f"{length} tokens",
            rule=f"the factor table ends at {self.rows[-1].up_to}",
            do=f"use at most {format_length(self.rows[-1].up_to)} tokens, or search factors for a longer target",
        )

    def check_model(self, *, rope_theta: float, rotary_dim: int, original_length: int) -> None:
        """Raise UserError unless the table belongs to a model with this RoPE."""
        pairs = [
            ("rope_theta", self.rope_theta, float(rope_theta)),
            ("rotary_dim", self.rotary_dim, rotary_dim),
            ("original_length", self.original_length, original_length),
        ]
        for name, mine, models in pairs:
            if not math.isclose(mine, models, rel_tol=1e-9):
                raise UserError(
                    "factors",
                    got=f"{name} {mine:.15g}",
                    rule=f"the model has {name} {models:.15g}",
                    do="give the factors that were searched for this model"
                    + (", or --original-length" if name == "original_length" else ""),
                )

    @classmethod
    def from_dict(cls, data: object) -> FactorTable:
        """The table of a parsed factors.json. Raises UserError when it is not one."""
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            got = f"format {shown(data.get('format'))}" if isinstance(data, Mapping) else type(data).__name__
            raise _wrong("format", got, f'it is "{_FORMAT}"')
        if data.get("version") != _VERSION or isinstance(data.get("version"), bool):
            raise UserError(
                "factors file",
                got=f"version {shown(data.get('version'))}",
                rule=f"this longrope reads version {_VERSION}",
                do="use the longrope that wrote it, or search again",
            )
        _check_keys(data, _REQUIRED_KEYS, _OPTIONAL_KEYS, "factors file")
        table = data["table"]
        if not isinstance(table, Sequence) or isinstance(table, str):
            raise _wrong("table", type(table).__name__, "it is a list of rows")
        model, provenance = data.get("model"), data.get("provenance", {})
        if model is not None and not isinstance(model, str):
            raise _wrong("model", type(model).__name__, "it is a name")
        if not isinstance(provenance, Mapping):
            raise _wrong("provenance", type(provenance).__name__, "it is an object")
        return cls(
            rope_theta=data["rope_theta"],
            rotary_dim=data["rotary_dim"],
            original_length=data["original_length"],
            rows=tuple(_row_from_dict(row) for row in table),
            model=model,
            provenance=dict(provenance),
        )

    def to_be_given_away(self) -> FactorTable:
        """As a checkpoint has it: with the name of the model's folder, and not where that lies on this machine."""
        if not self.model or not (os.path.isabs(self.model) or os.path.isdir(self.model)):
            return self  # a Hub id, or none
        return replace(self, model=Path(self.model).resolve().name)

    def to_dict(self) -> dict[str, Any]:
        """What factors.json holds; no timestamps, so that equal tables are equal files."""
        data: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "rope_theta": self.rope_theta,
            "rotary_dim": self.rotary_dim,
            "original_length": self.original_length,
            "table": [row.to_dict() for row in self.rows],
        }
        if self.model is not None:
            data["model"] = self.model
        if self.provenance:
            data["provenance"] = dict(self.provenance)
        return data

    def to_json(self) -> str:
        """The text of factors.json."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> FactorTable:
        """Read a factors.json. Raises UserError when it is missing or not one."""
        try:
            return cls.from_dict(read_json(Path(path), "factors file", unique=True))
        except UserError as error:
            if Path(path).suffix.lower() != ".csv" or not Path(path).is_file():
                raise
            rule = "it is a factors.json, and a CSV does not say its model's RoPE"
            do = "convert it with longrope factors FILE --to json, and read that"
            raise error.changed(what="factors file", got=path, rule=rule, do=do) from None

    def save(self, path: str | Path) -> None:
        """Write a factors.json, whole or not at all."""
        write_atomically(Path(path), self.to_json())


def last_row(table: FactorTable, length: int) -> RopeFactors:
    """The row for a length in tokens; beyond the table its last one, the best that is known."""
    return table.row_for(min(length, table.rows[-1].up_to))


def _row_from_dict(row: object) -> RopeFactors:
    if not isinstance(row, Mapping):
        raise _wrong("table row", type(row).__name__, "it is an object")
    _check_keys(row, _ROW_KEYS, set(), "table row")
    if isinstance(row["rescale"], str) or not isinstance(row["rescale"], Sequence):
        raise _wrong("rescale", shown(row["rescale"]), "it is a list of d/2 numbers")
    return RopeFactors(**{key.name: row[key.name] for key in fields(RopeFactors)})


def _check_keys(data: Mapping[str, Any], required: set[str], optional: set[str], what: str) -> None:
    if missing := sorted(required - set(data)):
        raise _wrong(what, f"no {_names(missing)}", f"it has {_names(sorted(required))}")
    if unknown := sorted(set(data) - required - optional):
        raise _wrong(what, _names(unknown), f"its keys are {_names(sorted(required | optional))}")


def _names(keys: Iterable[str]) -> str:
    return ", ".join(str(key) for key in keys)


def _whole(value: object, name: str, *, at_least: int) -> int:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(cast(int, value)) < at_least:
        raise _wrong(name, shown(value), f"it is a whole number of at least {at_least}")
    if int(cast(int, value)) > LONGEST:
        raise _wrong(name, shown(value), f"it is at most {LONGEST}")
    return int(cast(int, value))


def _positive(value: object, name: str) -> float:
    number = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    try:
        if number and math.isfinite(float(cast(float, value))) and float(cast(float, value)) > 0:
            return float(cast(float, value))
    except OverflowError:  # a whole number with more digits than a float holds
        pass
    raise _wrong(name, shown(value), "it is a finite, positive number")


def _wrong(name: str, got: object, rule: str) -> UserError:
    return UserError(f"factors: {name}", got=got, rule=rule, do="correct the file or search again")
