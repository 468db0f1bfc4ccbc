"""lm-evaluation-harness as a library, on a model with its factors: short prompts get short factors."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import importlib
import json
import logging
import math
import sqlite3
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import yaml

from longrope.errors import UserError, first_line
from longrope.evaluate.harness_answers import answers_as_json
from longrope.factors import FactorTable
from longrope.model import LoadedModel

logger = logging.getLogger(__name__)

_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


def harness(
    loaded: LoadedModel,
    table: FactorTable | None,
    tasks: Sequence[str],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    include_path: str | Path | None = None,
    seed: int | None = None,
    chat: bool = False,
    unsafe_code: bool = False,
    answers: Path | None = None,
    max_length: int | None = None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Results of lm-eval's tasks, groups, tags or patterns (`mmlu_*`), each request under the row its length asks for.

    table: None is the checkpoint as it is. Prompts longer than its last row are cut from the left, as lm-eval does
    beyond a model's length; the result counts them. limit: first examples of each task, below 1 a share of them.
    num_fewshot: None is each task's own. batch_size: None is by length and memory. include_path: a folder of tasks
    as YAML files, beside the catalogue. seed: of few-shot examples and sampling, for Python's, numpy's and torch's
    global generators too; None are lm-eval's defaults, which published figures have. chat: prompts go through the
    tokenizer's chat template. unsafe_code: run tasks that execute what the model writes. answers: a file in which every
    answer is kept and found again by a later call with the same model, factors and settings. max_length: where prompts
    are cut and windows end, by default where the factors do. prepared: the tasks, where they are loaded already.

    Returns {"tasks": {task: {metric: value, metric_stderr: value}}, ...}; a metric of a filter other than lm-eval's
    default is named `metric,filter`. "value" is the mean over tasks, groups not counted, of the first metric of each
    that is a share and better when higher; None where no task has one. "requests" says how many of each task were cut,
    and how many used which row.
    Raises UserError for what does not exist or cannot be read, and when lm-eval is not installed.
    """
    _check_numbers(limit, num_fewshot, batch_size)
    if chat and loaded.tokenizer.chat_template is None:
        rule = "its tokenizer has a chat template"
        raise UserError("--chat", got=f"{loaded.name}, which has none", rule=rule, do="leave --chat out")
    _check_folder(include_path)
    _check_answers(answers)
    lm_eval = _lm_eval()
    from longrope.evaluate.harness_model import RegimeModel  # imports lm_eval

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    # What lm-eval and its tasks print is no result.
    with redirect_stdout(sys.stderr), loaded.patch() as patch:
        prepared = prepared or prepare(tasks, include_path, unsafe_code=unsafe_code)
        manager, names, loaded_tasks = prepared.manager, prepared.names, prepared.tasks
        model = RegimeModel(loaded, table, patch, batch_size, max_length)
        if note := patch.widen_window(model.max_length):
            logger.info(note)
        manager.load = lambda _: loaded_tasks
        with _told(tasks, include_path, answers), answers_as_json():
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=names,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                use_cache=str(answers) if answers else None,
                log_samples=False,
                confirm_run_unsafe_code=unsafe_code,
                **(dict.fromkeys(seeds, seed) if seed is not None else {}),
            )
        requests = {name: _requests(model, task.instances) for name, task in loaded_tasks["tasks"].items()}
    if cut := sum(each["cut"] for each in requests.values()):
        logger.warning("%d prompts were cut from the left to %d tokens, where the factors end", cut, model.max_length)
    better = {name: dict(metrics) for name, metrics in results.get("higher_is_better", {}).items()}
    groups = sorted(name for name, members in results.get("group_subtasks", {}).items() if members)
    found = {name: _metrics(values) for name, values in results["results"].items()}
    return {
        "value": _mean({name: values for name, values in found.items() if name not in groups}, better),
        "tasks": found,
        "groups": groups,
        "higher_is_better": better,
        "num_fewshot": dict(results["n-shot"]),
        "examples": {name: count["effective"] for name, count in results["n-samples"].items()},
        "limit": limit,
        "max_length": model.max_length,
        "requests": requests,
        "versions": {"lm_eval": results["lm_eval_version"], "tasks": dict(results["versions"])},
    }


@dataclass(frozen=True)
class Prepared:
    """Tasks that are found and loaded: lm-eval's manager, their names, and what it makes of them."""

    manager: Any
    names: list[str]
    tasks: Any

    def hashes(self) -> dict[str, str]:
        """A hash of every task's documents and of what is made of them."""
        found = {}
        for name, task in sorted(self.tasks["tasks"].items()):
            digest = sha256(_text(task.dump_config()).encode())
            for document in task.eval_docs:
                digest.update(_text(document).encode())
            found[name] = f"sha256:{digest.hexdigest()}"
        return found


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of `datasets`, which come before what may be refused."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def prepare(tasks: Sequence[str], include_path: str | Path | None = None, *, unsafe_code: bool = False) -> Prepared:
    """Find and load tasks. Raises UserError for what does not exist and what goes wrong in their files and data."""
    with redirect_stdout(sys.stderr), _no_bars():
        manager, names = _find_tasks(tasks, include_path)
        return Prepared(manager, names, _load(manager, names, unsafe_code))


def _text(described: object) -> str:
    """As JSON; a function by its name, for its address changes."""
    return json.dumps(described, sort_keys=True, default=lambda each: getattr(each, "__name__", type(each).__name__))


def _mean(tasks: Mapping[str, Mapping[str, float | None]], better: Mapping[str, Mapping[str, bool]]) -> float | None:
    shares = []
    for name, metrics in tasks.items():
        known = [
            value
            for metric, value in metrics.items()
            if better.get(name, {}).get(metric.partition(",")[0]) and value is not None and 0 <= value <= 1
        ]
        shares += known[:1]
    return sum(shares) / len(shares) if shares else None


def _check_numbers(limit: float | None, num_fewshot: int | None, batch_size: int | None) -> None:
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        rule = "it is a number of examples, or a share of them between 0 and 1"
        raise UserError("--limit", got=limit, rule=rule, do="leave it out for all examples")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(
            "--num-fewshot", got=num_fewshot, rule="it is not negative", do="leave it out for the tasks' own"
        )
    if batch_size is not None and batch_size < 1:
        rule = "it is at least 1"
        raise UserError("--batch-size", got=batch_size, rule=rule, do="leave it out to have it chosen by length")


@contextmanager
def _told(tasks: Sequence[str], include_path: str | Path | None, answers: Path | None) -> Iterator[None]:
    """What goes wrong in lm-eval that is the user's to mend: kept answers, the disk, functions of one's own tasks."""
    theirs = logging.getLogger("sqlitedict")  # it tells what is raised here, with three stacks
    level = theirs.level
    theirs.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except sqlite3.Error as error:
        rule, do = "the disk takes the answers that are kept", "free space there; the same command goes on"
        raise UserError("output", got=f"{answers}_rank*.db ({error})", rule=rule, do=do) from None
    except UserError:
        raise
    except Exception as error:
        folder = str(Path(include_path).resolve()) if include_path is not None else None
        files = [str(Path(frame.filename).resolve()) for frame in traceback.extract_tb(error.__traceback__)]
        own = next((file for file in reversed(files) if folder and file.startswith(folder)), None)
        if own is None:
            raise
        got = f"{', '.join(tasks)}: {type(error).__name__}: {' '.join(str(error).split())[:200]} in {own}"
        raise UserError("--tasks", got=got, rule="a task's own functions run", do="mend the function") from error
    finally:
        theirs.setLevel(level)


def _check_answers(answers: Path | None) -> None:
    """Raise UserError for kept answers that cannot be read: lm-eval would find out in a thread of its own."""
    for file in sorted(answers.parent.glob(f"{answers.name}_rank*.db")) if answers is not None else []:
        try:
            with closing(sqlite3.connect(file)) as database:
                said = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            said = str(error)
        if said != "ok":
            rule = "answers that were kept can be read"
            raise UserError("answers", got=f"{file} ({said})", rule=rule, do="remove it, and they are asked for again")


def _lm_eval() -> Any:
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        rule, do = "this measure runs lm-evaluation-harness", 'pip install "longrope[harness]"'
        raise UserError("lm-eval", got=f"no such package ({error})", rule=rule, do=do) from error


def check_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Raise UserError for what `harness` would refuse of tasks by their names, before a model is loaded."""
    _check_folder(include_path)
    _lm_eval()
    if not tasks:
        task_names(tasks, ())
    _find_tasks(tasks, include_path)


def _check_folder(include_path: str | Path | None) -> None:
    if include_path is not None and not Path(include_path).is_dir():
        rule = "it is a folder of tasks as YAML files"
        raise UserError("--include-path", got=include_path, rule=rule, do="give the folder that holds them")
    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path is not None else []:
        try:
            yaml.compose(file.read_text("utf-8"))  # lm-eval passes over a file that it cannot read
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            got, rule = f"{file}: {' '.join(str(error).split())[:200]}", "its files are YAML"
            raise UserError("--include-path", got=got, rule=rule, do="mend the file, or take it out") from None


def _find_tasks(wanted: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """A TaskManager of lm-eval's that knows these tasks, and their names. Raises UserError for one that is nowhere."""
    if include_path is not None:  # reading the whole catalogue takes many seconds; a local group may name tasks of it
        local = _manager(include_path, catalogue=False)
        if wanted and set(wanted) <= set(local.all_subtasks):
            return local, list(dict.fromkeys(wanted))
    logger.info("reading lm-eval's catalogue of tasks")
    manager = _catalogue() if include_path is None else _manager(include_path)
    return copy.copy(manager), task_names(wanted, manager.all_tasks)


def _manager(include_path: str | Path | None, *, catalogue: bool = True) -> Any:
    folder = None if include_path is None else str(include_path)
    return importlib.import_module("lm_eval.tasks").TaskManager(include_path=folder, include_defaults=catalogue)


@cache
def _catalogue() -> Any:
    return _manager(None)


def task_names(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names of tasks, patterns resolved, each once. Raises UserError for one that is not known, with those near it."""
    if not wanted:
        raise UserError("--tasks", got="none", rule="there is at least one", do="name tasks, as lm-eval ls tasks lists")
    names: list[str] = []
    for each in wanted:
        found = [each] if each in known else sorted(fnmatch.filter(known, each))
        if not found:
            near = difflib.get_close_matches(each, known, n=3, cutoff=0.5)
            do = f"did you mean {' or '.join(near)}?" if near else "choose one that `lm-eval ls tasks` lists"
            rule = "lm-eval and --include-path have no such task"
            raise UserError("--tasks", got=repr(each), rule=rule, do=do)
        names += found
    return list(dict.fromkeys(names))


def _load(manager: Any, names: Sequence[str], unsafe_code: bool) -> Any:
    """The tasks with their data sets. Raises UserError when one cannot be had, or is not for such a model."""
    try:
        loaded = manager.load(list(names))
    except Exception as error:
        text = first_line(error)
        got, rule = f"{', '.join(names)}: {text[:300]}", "a task needs its files and its data set"
        do = "mend the task, or go online once to fetch its data"
        if "StopIteration" in (type(error).__name__, text):
            got, rule, do = f"{', '.join(names)}: no examples", "a task has examples", "give it some"
        elif "uplicate" in text:
            rule, do = "a task is named once, by itself or in a group", "leave it or the group out"
        raise UserError("--tasks", got=got, rule=rule, do=do) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            rule = "tasks are of text alone"
            raise UserError("--tasks", got=f"{name}, with images or sound", rule=rule, do="choose another task")
        if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
            got, rule = f"{name}, which runs code that the model writes", "that is not done unasked"
            raise UserError("--tasks", got=got, rule=rule, do="give --unsafe-code on a machine where it can do no harm")
    return loaded


def _requests(model: Any, instances: Sequence[Any]) -> dict[str, Any]:
    """How many requests of a task were cut, and how many used the row of which length."""
    cut, rows = 0, dict[str, int]()
    for instance in instances:
        length = model.length(instance.request_type, instance.args)
        cut += length > model.max_length and instance.request_type != "loglikelihood_rolling"  # that one has windows
        row = model.row(length)
        name = str(row.up_to) if row else "none"
        rows[name] = rows.get(name, 0) + 1
    return {"cut": cut, "rows": dict(sorted(rows.items(), key=lambda pair: (len(pair[0]), pair[0])))}


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    """lm-eval's figures of a task by metric; what is not a finite number is None."""
    named = {key.removesuffix(",none"): value for key, value in values.items() if key not in _NOT_METRICS}
    return {
        key: float(value) if isinstance(value, int | float) and math.isfinite(value) else None
        for key, value in named.items()
    }
