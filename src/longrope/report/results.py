"""The measurements of a run folder, checked: its metrics.json, and those of the runs inside it, measured afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from longrope.errors import UserError
from longrope.files import read_json
from longrope.runs import CHECKPOINT, CONFIG, METRICS, is_run

RUN_SEPARATOR = "\x1f"  # between the name of a run and that of a method, where several runs are shown
_LONGEST = 2**62  # tokens
_STAGES = ("search", "finetune")
_INTERVAL = 2  # an interval is its two ends
# Details of each measure that are plotted: rows of numbers (n) and texts (s), or objects by task.
_DETAILS: dict[str, dict[str, str]] = {
    "perplexity": {"by_position": "nn"},
    "passkey": {"by_depth": "nnnn"},
    "needle": {"by_depth": "nnnn"},
    "ruler": {"tasks": "tasks"},
    "harness": {"tasks": "tasks"},
    "nonuniformity": {"whole": "sn", "groups": "nnnn", "start_tokens": "nsn", "attention": "ssn"},
}
MEASURES = tuple(_DETAILS)
"""Those the page knows, in its order."""
_Details = Mapping[str, Any]
_Key = tuple[str, int, bool]  # method, length, and whether it is of the windows of the search


@dataclass(frozen=True)
class Against:
    """The best method, the paired difference from it (relative in perplexity, of shares otherwise), its interval."""

    method: str
    value: float | None
    ci: tuple[float, float] | None


@dataclass(frozen=True)
class Result:
    """The value of one method at one length; None when it is not finite. tokens: how many were measured.

    seen: measured on the windows of the search itself rather than on held-out ones. details: what plots and tables
    show beside the value, checked; rows of numbers and texts, or {task: {name: number}}. against: the best method at
    this length, the paired difference from it and its interval.
    """

    method: str
    length: int
    value: float | None
    tokens: int | None
    ci: tuple[float, float] | None
    seen: bool
    details: _Details = field(default_factory=dict)
    against: Against | None = None

    @property
    def told_apart(self) -> bool:
        """Whether there is no difference from the best, or its paired interval leaves zero out."""
        if self.against is None or not self.against.value:
            return True
        return self.against.ci is not None and not self.against.ci[0] <= 0 <= self.against.ci[1]


@dataclass(frozen=True)
class Measured:
    """What is measured of a run: all results by measure, its own measure first.

    own: its metrics.json as it is. inner: config.json of the runs inside it whose results are among them. left_out:
    what is there and is not shown, a sentence each. searched_on: by measure, documents that the search has read, too.
    """

    own: Mapping[str, Any]
    measures: Mapping[str, tuple[Result, ...]]
    inner: tuple[Mapping[str, Any], ...]
    left_out: tuple[str, ...]
    searched_on: Mapping[str, int]


def read_measured(run: Path, config: Mapping[str, Any]) -> Measured:
    """A run's own metrics.json and those of the runs inside it, as far as they are of the same model and items.

    Raises UserError for an own file that is not as it should be, naming it; what is wrong inside is left out, and said.
    """
    own = read_mapping(run / METRICS)
    found: dict[str, _Found] = {}
    if own:
        found[_measure(own)] = _Found(_results(own, run / METRICS), _items(own), _items(own, "search_items"))
    inner, left_out = [], []
    for folder in _folders(run):
        try:
            if not is_run(folder):
                continue
            theirs, data = read_mapping(folder / CONFIG), read_mapping(folder / METRICS)
            if config.get("command") == "extend" and theirs.get("command") in _STAGES:
                continue  # which is told of as a stage
            there = found.setdefault(_measure(data), _Found())
            if reason := _strange(data, theirs, config, own, run) or there.refuses(_items(data)):
                left_out.append(f"{folder.name}: {reason}")
                continue
            there.add(data, folder / METRICS, len(_hashes(theirs, "unseen") & _hashes(config, "search")))
        except UserError as error:
            left_out.append(f"{folder.name}: {error}")
            continue
        inner.append(theirs)
    order = sorted(found, key=lambda name: (bool(own) and name != _measure(own), _place(name)))
    measures = {measure: tuple(found[measure].results.values()) for measure in order if found[measure].results}
    searched_on = {measure: each.searched_on for measure, each in found.items() if each.searched_on}
    return Measured(own, measures, tuple(inner), tuple(left_out), searched_on)


@dataclass
class _Found:
    """What is shown of a measure so far, with the hashes of its items by length or task.

    items: of all but the windows of the search itself. searched: of those. shared: how many documents that the search
    has read are among those measured inside the run, by whether the very windows of the search are.
    """

    results: dict[_Key, Result] = field(default_factory=dict)
    items: dict[str, Any] = field(default_factory=dict)
    searched: dict[str, Any] = field(default_factory=dict)
    shared: dict[bool, int] = field(default_factory=dict)

    def refuses(self, items: Mapping[str, Any]) -> str:
        """Why results on these items do not belong beside what is shown; empty when they do."""
        beside = "give it to the report beside this run."
        if not self._held_out or self._of_the_search(items):
            return ""  # there is nothing yet that they could be mistaken for, or they are of the search's windows
        if not items or not self.items:
            says = "what is shown does not say its" if items else "it does not say its"
            return f"{says} items, as an earlier version left it; {beside}"
        if other := [key for key, each in items.items() if self.items.get(key, each) != each]:
            return f"not on the same items as what is shown at {', '.join(other)}; {beside}"
        return ""

    def add(self, data: Mapping[str, Any], path: Path, shared: int) -> None:
        """Take in the metrics.json of a run inside; shared: how many of its documents the search has read."""
        items = _items(data)
        seen = self._of_the_search(items)
        self.results |= _results(data, path, seen=seen)
        self.items |= {} if seen else items
        self.shared[seen] = shared or self.shared.get(seen, 0)

    @property
    def searched_on(self) -> int:
        """How many documents of the results that are shown first the search has read, where any was measured inside."""
        return self.shared.get(not self._held_out, 0)

    @property
    def _held_out(self) -> bool:
        """Whether there are results on others than the windows of the search, which then are shown first."""
        return any(not each.seen for each in self.results.values())

    def _of_the_search(self, items: Mapping[str, Any]) -> bool:
        """Whether items are the windows of the search itself, at every length that they have in common."""
        common = items.keys() & self.searched.keys()
        return bool(common) and all(items[key] == self.searched[key] for key in common)


def _measure(data: Mapping[str, Any]) -> str:
    return str(data.get("measure", "perplexity"))


def _results(data: Mapping[str, Any], path: Path, *, seen: bool = False) -> dict[_Key, Result]:
    """The results of a metrics.json; `seen`: they are all of the search's windows, whether it says so or not."""
    results = data.get("results", [])
    good = isinstance(results, list) and all(isinstance(item, Mapping) for item in results)
    check(good, path, "results is a list")
    made = [_result(item, _measure(data), path) for item in cast(list[Mapping[str, Any]], results)]
    made = [replace(each, seen=True) for each in made] if seen else made
    return {(each.method, each.length, each.seen): each for each in made}


def _folders(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("*/") if path.is_dir()) if run.is_dir() else []


def _strange(
    data: Mapping[str, Any],
    theirs: Mapping[str, Any],
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    run: Path,
) -> str:
    """Why a run inside another is none of its measurements; empty when it is one."""
    if not data:
        return "not finished, it has no metrics.json."
    if theirs.get("command") == "search":
        return "a search of its own; give it to the report beside this run."
    # An extension measures the checkpoint that it has made, which its own metrics.json names by its fingerprint.
    printed = own.get("fingerprint") if config.get("command") == "extend" else None
    of_own = printed is not None and data.get("fingerprint") == printed
    if not of_own and not _same_model(theirs.get("model"), config.get("model"), run):
        return "of another model; give it to the report beside this run."
    return ""


def _same_model(theirs: object, own: object, run: Path) -> bool:
    """Whether two runs are of the same model, as far as they say; a dtype of its own is no other model.

    A model that a run has made itself is its own.
    """
    if not isinstance(theirs, Mapping) or not isinstance(own, Mapping):
        return True
    if _same_place(theirs.get("name", ""), run / CHECKPOINT):
        return True
    shape = ("rope_theta", "rotary_dim", "original_length")
    if any(theirs.get(name) != own.get(name) for name in shape if name in theirs and name in own):
        return False
    if "name" not in theirs or "name" not in own:
        return True
    # A fingerprint is of the weights wherever they lie, but in one dtype: the name speaks for another.
    printed = own.get("fingerprint")
    return (printed is not None and theirs.get("fingerprint") == printed) or _same_place(theirs["name"], own["name"])


def _same_place(name: object, other: object) -> bool:
    """Whether two names of models are of one place, with a slash at the end or not, from the root or from here."""
    return Path(str(name)).resolve() == Path(str(other)).resolve()


def _items(data: Mapping[str, Any], name: str = "items") -> dict[str, Any]:
    """Hash of what was run by length or task, as metrics.json says it; empty where it does not."""
    items = data.get(name)
    return dict(items) if isinstance(items, Mapping) else {}


def _hashes(config: Mapping[str, Any], use: str) -> set[str]:
    documents = config.get("documents")
    named = documents.get(use) if isinstance(documents, Mapping) else None
    return {str(each["sha256"]) for each in named or () if isinstance(each, Mapping) and each.get("sha256")}


def _place(name: str) -> int:
    """Known measures in their order, whatever else there is behind them."""
    return MEASURES.index(name) if name in MEASURES else len(MEASURES)


def read_mapping(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file, empty when there is no file. Raises UserError when it is something else."""
    if not path.exists():
        return {}
    data = read_json(path, "file of the run")
    check(isinstance(data, Mapping), path, "it is a JSON object")
    return cast(Mapping[str, Any], data)


def check(good: bool, path: Path, rule: str) -> None:
    """Raise UserError naming the file unless `good`."""
    if not good:
        raise UserError("file of the run", got=f"{path}, not as expected", rule=rule, do="restore it or run again")


def number(value: object, path: Path, name: str) -> float | None:
    """A finite number, or None for null and for what is not finite."""
    check(value is None or (isinstance(value, int | float) and not isinstance(value, bool)), path, f"{name}: a number")
    try:
        found = math.nan if value is None else float(cast(float, value))
    except OverflowError:  # a whole number with more digits than a float holds
        return None
    return found if math.isfinite(found) else None


def length_of(value: object) -> int | None:
    """A number of tokens that can be one, else None."""
    return value if type(value) is int and 0 < value < _LONGEST else None


def _result(item: Mapping[str, Any], measure: str, path: Path) -> Result:
    method, length, ci = item.get("method"), item.get("length"), item.get("ci")
    check(isinstance(method, str), path, "a method is a name")
    check(length_of(length) is not None, path, "a length is a positive whole number")
    tokens = number(item.get("tokens"), path, "tokens")
    return Result(
        method=cast(str, method).replace(RUN_SEPARATOR, " "),
        length=cast(int, length),
        value=number(item.get("value"), path, "value"),
        tokens=None if tokens is None else int(tokens),
        ci=_interval(ci, path),
        seen=item.get("windows") == "search",
        details=_details(item.get("details") or {}, measure, path),
        against=_against(item.get("against_best"), path),
    )


def _interval(data: object, path: Path) -> tuple[float, float] | None:
    check(data is None or (isinstance(data, list) and len(data) == _INTERVAL), path, "ci is null or two numbers")
    low, high = (number(end, path, "ci") for end in cast(list[object], data or [None, None]))
    return None if low is None or high is None else (low, high)


def _against(data: object, path: Path) -> Against | None:
    if data is None:
        return None
    check(isinstance(data, Mapping) and isinstance(data.get("method"), str), path, "against_best names a method")
    given = cast(Mapping[str, Any], data)
    value = number(given.get("value"), path, "against_best.value")
    return Against(str(given["method"]).replace(RUN_SEPARATOR, " "), value, _interval(given.get("ci"), path))


def _details(data: object, measure: str, path: Path) -> _Details:
    """Those that are known; any other is of a version that knows more, and is left out."""
    check(isinstance(data, Mapping), path, "details is an object")
    made: dict[str, Any] = {}
    for name, form in _DETAILS.get(measure, {}).items():
        given = cast(Mapping[str, Any], data).get(name)
        if given is not None:
            where = f"details.{name}"
            made[name] = _tasks(given, path, where) if form == "tasks" else _rows(given, form, path, where)
    return made


def _rows(data: object, form: str, path: Path, where: str) -> list[list[Any]]:
    kinds = ", ".join({"n": "number", "s": "text"}[kind] for kind in form)
    rule = f"{where} is a list of rows of {kinds}"
    good = isinstance(data, list) and all(isinstance(row, list) and len(row) == len(form) for row in data)
    check(good, path, rule)
    rows = cast(list[list[Any]], data)
    check(all(isinstance(row[i], str) for row in rows for i, kind in enumerate(form) if kind == "s"), path, rule)
    return [[number(c, path, where) if kind == "n" else c for c, kind in zip(row, form, strict=True)] for row in rows]


def _tasks(data: object, path: Path, where: str) -> dict[str, dict[str, float | None]]:
    rule = f"{where} is an object of objects, by task"
    check(isinstance(data, Mapping) and all(isinstance(each, Mapping) for each in data.values()), path, rule)
    return {
        task: {
            name: number(value, path, f"{where}.{task}.{name}")
            for name, value in figures.items()
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        }
        for task, figures in cast(Mapping[str, Mapping[str, Any]], data).items()
    }
