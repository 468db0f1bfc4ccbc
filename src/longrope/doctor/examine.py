"""All checks on a configuration, and the mends."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

# Importing them registers their checks.
from longrope.doctor import engines, lengths, lists, places, scalings  # noqa: F401
from longrope.doctor.view import CHECKS, Folder, View
from longrope.errors import UserError
from longrope.factors import FACTORS, FactorTable
from longrope.files import read_json, write_atomically
from longrope.folders import is_free, whole_folder
from longrope.guard import files_to_copy
from longrope.hub import hub_answers
from longrope.runs import check_no_run

SEVERITIES = ("error", "warning", "note")
"""error: does not load, or rotates wrongly. warning: an engine does something else. note: good to know."""
_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
# A mend may bring another finding to light; none needs more rounds.
_ROUNDS = 3


@dataclass(frozen=True)
class Finding:
    """Something about a configuration. do: the mend. fixed: whether `--fix` makes it."""

    name: str
    severity: str
    what: str
    do: str
    fixed: bool

    def told(self) -> dict[str, Any]:
        """As a document."""
        return dict(vars(self))


def examine(config: Mapping[str, Any], folder: Folder | None = None) -> list[Finding]:
    """All findings about a parsed config.json, errors first. Reads no weights."""
    view = View(config, folder)
    found = []
    for each in CHECKS:
        severity = each.severity if isinstance(each.severity, str) else each.severity(view)
        can = each.mend is not None or each.name == "tokenizer-length"
        found += [Finding(each.name, severity, what, each.do, can) for what in each.look(view)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def mended(config: Mapping[str, Any], folder: Folder | None = None) -> dict[str, Any]:
    """A configuration with everything mended that can be."""
    view = View(config, folder)
    for _ in range(_ROUNDS):
        for each in CHECKS:
            if each.mend is not None and any(True for _ in each.look(view)):
                each.mend(view)
    return view.config


def files_of(model: str) -> Path:
    """The folder or the config.json of a MODEL; of a Hub id the files are fetched that the doctor reads.

    Raises UserError for a model that is not there.
    """
    if Path(model).exists():
        check_no_run(Path(model))
        return Path(model)
    if model == "tiny":
        return Path(str(files("longrope") / "assets" / "tiny"))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    cached_only = not hub_answers()
    try:
        found = Path(hf_hub_download(model, _CONFIG, local_files_only=cached_only)).parent
        for name in (_TOKENIZER, FACTORS):
            with suppress(EntryNotFoundError, OSError):
                hf_hub_download(model, name, local_files_only=cached_only)
    except Exception as error:  # each way in which a name is none has an error of its own
        rule = textwrap.shorten(str(error), 200, placeholder=" ...")
        if cached_only:
            rule = "the Hub was not reached, and no model of this name was fetched from it before"
        got, do = f"{model}, which is no folder here", "check the path: a folder, a config.json or a Hub id"
        raise UserError("model", got=got, rule=rule, do=do) from None
    return found


def read_config(given: str | Path) -> tuple[Path, dict[str, Any], Folder]:
    """The config.json of a folder, or a file of that form, with what lies beside it. Raises UserError without one."""
    path = Path(given)
    path = path / _CONFIG if path.is_dir() else path
    config = read_json(path, "config")
    if not isinstance(config, dict):
        raise UserError("config", got=f"{path}, a {type(config).__name__}", rule="it is an object", do="check the path")
    tokenizer = path.parent / _TOKENIZER
    table = path.parent / FACTORS
    settings = read_json(tokenizer, "tokenizer") if tokenizer.is_file() else None
    return path, config, Folder(
        FactorTable.load(table) if table.is_file() else None, settings if isinstance(settings, dict) else None
    )  # fmt: skip


def write_mended(given: str | Path, out: str | Path) -> list[Finding]:
    """A copy of a checkpoint, or of a config.json alone, with everything mended that can be; returns what is left.

    Raises UserError for an `out` that is not a new folder.
    """
    _, config, folder = read_config(given)
    out = Path(out)
    if not is_free(out):
        raise UserError("--fix", got=f"{out}, which exists", rule="a mended copy is a new folder", do="choose another")
    whole = mended(config, folder)
    copied = list(files_to_copy(Path(given))) if Path(given).is_dir() else []
    with whole_folder(out) as unfinished:
        for each in copied:
            if each.name != _CONFIG:
                shutil.copyfile(each, unfinished / each.name)
        longest = View(whole, folder).longest
        settings = dict(folder.tokenizer or {})
        short = settings.get("model_max_length")
        if (unfinished / _TOKENIZER).is_file() and isinstance(short, int | float) and longest and short < longest:
            settings["model_max_length"] = longest
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            write_atomically(unfinished / _TOKENIZER, text)
            folder = Folder(folder.table, settings)
        write_atomically(unfinished / _CONFIG, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return examine(whole, folder)
