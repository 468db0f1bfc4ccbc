"""Factors from and to the forms people have them in: our JSON, a transformers config, the CSV of LongRoPE's authors."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from longrope.baselines import attention_factor
from longrope.configs import language_part, table_from_config
from longrope.errors import UserError
from longrope.factors import FACTORS, FactorTable, RopeFactors, unscaled
from longrope.files import parse_json, read_text
from longrope.lengths import format_length, parse_length

_N = TypeVar("_N", int, float)
_Numbered = list[tuple[int, list[str]]]  # line number and cells

logger = logging.getLogger(__name__)

_CONFIG_KEYS = {
    "architectures",
    "max_position_embeddings",
    "model_type",
    "rope_parameters",
    "rope_scaling",
    "text_config",
}
_COLUMNS = ["name", "model", "finetuned_length", "evaluated_length", "kind"]


def read_factors(
    path: Path,
    *,
    row: str | None = None,
    rope_theta: float | None = None,
    original_length: int | None = None,
    attention: str | None = None,
    up_to: int | None = None,
) -> FactorTable:
    """Factors from a factors.json, a transformers config.json, or a CSV as LongRoPE's authors publish.

    A CSV does not say its model's RoPE, so it needs `rope_theta` and `original_length`; its rows get the attention
    factor of the rule `attention` (su, which is the default, yarn, none or a number). `row` is the name of one row,
    which is put above a row of ones up to the original length, or `MODEL@LENGTH`, all rows of a fine-tuned model as
    they are. The bare form without a header (one equal row a layer) needs `up_to`, the length it was searched for.
    Raises UserError when the file is none of these or disagrees with the arguments.
    """
    text = read_text(path, "factors file")
    if not text.strip():
        rule = "it is a factors.json, a config.json or a CSV of factors"
        do = "restore the file or make it again"
        raise UserError("factors file", got=f"{path}, which is empty", rule=rule, do=do)
    if path.suffix != ".json" and not text.lstrip().startswith("{"):
        numbered = _cells(text, path)
        rule = "a CSV does not say which RoPE its factors are for"
        theta, original = _given(rope_theta, "--rope-theta", rule), _given(original_length, "--original-length", rule)
        model = _Model(theta, original, attention or "su")
        return (
            _named_table(numbered, model, row, up_to)
            if _has_names(numbered)
            else _bare_table(numbered, model, row, up_to)
        )
    for flag, value in (("--row", row), ("--up-to", up_to), ("--attention-factor", attention)):
        if value is not None:
            rule = "a JSON file of factors is one table and says its lengths and attention factors"
            raise UserError("factors file", got=f"{flag} for {path.name}", rule=rule, do=f"leave {flag} out")
    return _from_json(parse_json(text, path, "factors file", unique=True), rope_theta, original_length)


def factors_file(given: str | Path) -> Path:
    """The file itself, or the factors.json of a run or checkpoint folder."""
    return Path(given) / FACTORS if Path(given).is_dir() else Path(given)


def as_table(given: FactorTable | str | Path) -> FactorTable:
    """A factor table as it is, or of any file that `read_factors` reads without further words, or of a folder's."""
    return given if isinstance(given, FactorTable) else read_factors(factors_file(given))


def _from_json(data: object, rope_theta: float | None, original_length: int | None) -> FactorTable:
    if isinstance(data, Mapping) and "format" not in data and _CONFIG_KEYS & set(data):
        text = language_part(data)
        if rope_theta is not None and text.get("rope_theta") is None:
            text = {**text, "rope_theta": rope_theta}  # what the file says inside rope_parameters still wins
        table = table_from_config(text, original_length=original_length)
    else:
        table = FactorTable.from_dict(data)
    table.check_model(
        rope_theta=table.rope_theta if rope_theta is None else rope_theta,
        rotary_dim=table.rotary_dim,
        original_length=table.original_length if original_length is None else original_length,
    )
    return table


def to_transformers_config(table: FactorTable) -> dict[str, Any]:
    """The config.json keys that make transformers and the serving engines use the table, both old and new names.

    Whoever writes them keeps the model's own `partial_rotary_factor`, nests `rope_parameters` under `full_attention`
    where the class has one per layer type, and sets or removes a top-level `original_max_position_embeddings`: it wins.
    Raises UserError when the longrope format cannot express the table.
    """
    first, last = table.rows[0], table.rows[-1]
    if any(row.start_tokens for row in table.rows):
        got = f"start tokens {[row.start_tokens for row in table.rows]}"
        rule = "no engine keeps start tokens unscaled"
        if last.start_tokens:  # no window is without them
            _not_expressible(got, rule, "export with --force, which leaves them out")
        _not_expressible(got, rule)
    if len(table.rows) > 2:
        _not_expressible(f"{len(table.rows)} rows", "the longrope format has two, short and long")
    if first.attention_factor != last.attention_factor:
        got = f"attention factors {first.attention_factor} and {last.attention_factor}"
        _not_expressible(got, "the longrope format has one for both rows")
    if first.up_to != table.original_length:
        got = f"a first row up to {first.up_to}"
        _not_expressible(got, f"the longrope format switches at the original length, {table.original_length}")
    parameters = {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": table.rope_theta,
        "short_factor": list(first.rescale),
        "long_factor": list(last.rescale),
        "original_max_position_embeddings": table.original_length,
        "factor": last.up_to / table.original_length,
        "attention_factor": last.attention_factor,
        "short_mscale": last.attention_factor,
        "long_mscale": last.attention_factor,
    }
    return {
        "max_position_embeddings": last.up_to,
        "rope_theta": table.rope_theta,
        "rope_parameters": parameters,
        "rope_scaling": {**parameters, "short_factor": list(first.rescale), "long_factor": list(last.rescale)},
    }


def convert(table: FactorTable, form: str) -> str:
    """The table as text: `json` (factors.json), `transformers` (config.json keys) or `csv`. Raises UserError."""
    if form == "json":
        return table.to_json()
    if form == "transformers":
        return json.dumps(to_transformers_config(table), indent=1) + "\n"
    if form == "csv":
        return to_csv(table)
    raise UserError("--to", got=repr(form), rule="it is json, transformers or csv", do="choose one of them")


def to_csv(table: FactorTable) -> str:
    """The table as a CSV with the columns of the published one. `read_factors` reads it back with row `MODEL@LENGTH`.

    A CSV holds no attention factor, rope_theta or original length: they are arguments of reading it. Attention factors
    that one argument cannot give back are told.
    Raises UserError for start tokens, which it cannot hold either.
    """
    if any(row.start_tokens for row in table.rows):
        got = f"start tokens {[row.start_tokens for row in table.rows]}"
        raise UserError("CSV", got=got, rule="a CSV has no column for them", do="keep the table as factors.json")
    if len(attention := dict.fromkeys(row.attention_factor for row in table.rows)) > 1:
        told = ", ".join(f"{value:g}" for value in attention)
        logger.warning(
            "a CSV has no column for attention factors: %s are left out, and reading one gives all the same", told
        )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_COLUMNS, *(f"lambda_{pair}" for pair in range(table.rotary_dim // 2))])
    model = table.model or "model"
    known = table.provenance.get("finetuned_length")
    tuned = known if isinstance(known, int) else table.rows[-1].up_to
    for row in table.rows:
        kind = "recovery" if row.up_to < tuned else "finetune" if row.up_to == tuned else "second_interpolation"
        values = (repr(value) for value in row.rescale)
        writer.writerow([f"{format_length(row.up_to)}_{model}", model, tuned, row.up_to, kind, *values])
    return out.getvalue()


@dataclass(frozen=True)
class _Line:
    """One row of the published form: factors that a model fine-tuned to one length uses at another."""

    name: str
    model: str
    finetuned_length: int
    evaluated_length: int
    rescale: tuple[float, ...]

    @property
    def group(self) -> str:
        return f"{self.model}@{self.finetuned_length}"


@dataclass(frozen=True)
class _Model:
    """What a CSV does not say: the model's RoPE, and the rule of the attention factor."""

    rope_theta: float
    original_length: int
    attention: str

    def row(self, rescale: tuple[float, ...], up_to: int) -> RopeFactors:
        factor = attention_factor(self.attention, up_to / self.original_length, self.original_length)
        return RopeFactors(up_to, rescale, attention_factor=factor)

    def above_base(self, rescale: tuple[float, ...], up_to: int) -> tuple[RopeFactors, ...]:
        row = self.row(rescale, up_to)
        return (unscaled(len(rescale), self.original_length), row) if up_to > self.original_length else (row,)

    def table(self, rows: tuple[RopeFactors, ...], name: str | None, provenance: dict[str, object]) -> FactorTable:
        dimension, method = 2 * len(rows[0].rescale), {"method": "csv"}
        return FactorTable(self.rope_theta, dimension, self.original_length, rows, name, method | provenance)


def _named_table(numbered: _Numbered, model: _Model, row: str | None, up_to: int | None) -> FactorTable:
    if up_to is not None:
        rule = "this CSV says the lengths itself, in evaluated_length"
        raise UserError("--up-to", got=up_to, rule=rule, do="leave --up-to out")
    chosen = _choose(_lines(numbered), row)
    provenance = {"rows": [line.name for line in chosen], "finetuned_length": chosen[0].finetuned_length}
    if row in (None, chosen[0].name):
        rows = model.above_base(chosen[0].rescale, chosen[0].evaluated_length)
    else:
        rows = tuple(model.row(line.rescale, line.evaluated_length) for line in chosen)
    return model.table(rows, chosen[0].model, provenance)


def _bare_table(numbered: _Numbered, model: _Model, row: str | None, up_to: int | None) -> FactorTable:
    if row is not None:
        raise UserError("--row", got=repr(row), rule="a CSV without a header has no names", do="leave --row out")
    length = _given(up_to, "--up-to", "a CSV without a header does not say the length its factors are for")
    first, *others = ((number, _numbers(number, cells)) for number, cells in numbered)
    for number, vector in others:
        if vector != first[1]:
            rule = f"one vector serves all layers, so every line equals line {first[0]}"
            raise UserError(f"CSV line {number}", got="other factors", rule=rule, do="keep the line that is meant")
    return model.table(model.above_base(first[1], length), None, {})


def _choose(lines: list[_Line], row: str | None) -> list[_Line]:
    """The one row of a name, or all rows of a fine-tuned model, ascending by the length they are for."""
    if row is None and len(lines) == 1:
        return lines
    named = [line for line in lines if line.name == row]
    if len(named) == 1:
        return named
    group = [line for line in lines if line.group == _plain_group(row or "")]
    if not named and group:
        return sorted(group, key=lambda line: line.evaluated_length)
    names, groups = (", ".join(dict.fromkeys(kind)) for kind in ([x.name for x in lines], [x.group for x in lines]))
    raise UserError(
        "--row",
        got=f"{len(named)} rows called {row}" if named else "none" if row is None else repr(row),
        rule=f"the file has the rows {names} and the models {groups}",
        do="give the name of one row, or MODEL@LENGTH for all rows of a fine-tuned model",
    )


def _plain_group(text: str) -> str:
    """`NAME@128k` as `NAME@131072`."""
    model, at, length = text.rpartition("@")
    return f"{model}@{parse_length(length)}" if at else ""


def _cells(text: str, path: Path) -> _Numbered:
    """Line number and cells of every line that is not empty."""
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        numbered = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except csv.Error as error:
        got = f"{path}, line {reader.line_num} ({error})"
        raise UserError("factors file", got=got, rule="it is JSON or CSV", do="check the path") from None
    if not (_has_names(numbered) or _is_number(numbered[0][1][0])):
        rule = f"a CSV of factors has the columns {', '.join(_COLUMNS)}, lambda_0, ..., or numbers only"
        got = f"{path}, which begins with {numbered[0][1][0][:40]!r}"
        raise UserError("factors file", got=got, rule=rule, do="check the path")
    return numbered


def _has_names(numbered: _Numbered) -> bool:
    return numbered[0][1][0] == _COLUMNS[0]


def _lines(numbered: _Numbered) -> list[_Line]:
    header = numbered[0][1]
    expected = [*_COLUMNS, *(f"lambda_{pair}" for pair in range(max(1, len(header) - len(_COLUMNS))))]
    if header != expected:
        missing = next(name for name, there in zip_longest(expected, header) if name != there)
        rule = f"the columns are {', '.join(_COLUMNS)}, lambda_0, lambda_1, ..."
        raise UserError("CSV header", got=f"no {missing} in its place", rule=rule, do="correct the header")
    if len(numbered) == 1:
        raise UserError("CSV", got="a header alone", rule="it has at least one row of factors", do="check the path")
    return [_line(number, cells, header) for number, cells in numbered[1:]]


def _line(number: int, cells: list[str], header: list[str]) -> _Line:
    if len(cells) != len(header):
        rule = f"the header has {len(header)}"
        raise UserError(f"CSV line {number}", got=f"{len(cells)} columns", rule=rule, do="restore the file")
    finetuned, evaluated = parse_length(cells[2]), parse_length(cells[3])
    return _Line(cells[0], cells[1], finetuned, evaluated, _numbers(number, cells[len(_COLUMNS) :]))


def _numbers(number: int, cells: Iterable[str]) -> tuple[float, ...]:
    values = []
    for pair, cell in enumerate(cells):
        value = float(cell) if _is_number(cell) else math.nan
        if not 0 < value < math.inf:
            rule = "it is a finite, positive number"
            raise UserError(f"CSV line {number}, lambda_{pair}", got=repr(cell)[:40], rule=rule, do="correct the file")
        values.append(value)
    return tuple(values)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _given(value: _N | None, flag: str, rule: str) -> _N:
    if value is None:
        raise UserError("CSV of factors", got=f"no {flag}", rule=rule, do=f"give {flag}")
    if not 0 < value < math.inf:
        raise UserError(flag, got=value, rule="it is a finite, positive number", do="correct it")
    return value


def _not_expressible(got: str, rule: str, do: str = "export with --window long") -> NoReturn:
    raise UserError("factor table", got=got, rule=rule, do=f"{do}, or keep factors.json, which longrope reads")
