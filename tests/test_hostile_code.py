"""No code of a file runs: no pickle, no module of a checkpoint, no kernel, unless it was asked for."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from commands import TARGET, longrope, refused, table, write_checkpoint, write_documents
from longrope.errors import UserError
from longrope.evaluate.harness_answers import answers_as_json
from longrope.training.sharded import check_shards
from longrope.training.state import WHOLE, mark_whole

SOURCE = Path(__file__).parents[1] / "src" / "longrope"


class Spy:
    """Unpickled, it makes a folder: the sign that code was run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


# What runs, or may run, what it is given. `torch.load` reads with weights_only, numpy without pickles.
FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "marshal.loads", "yaml.load"}
FORBIDDEN |= {"os.system", "os.popen", "dill.load", "dill.loads", "joblib.load", "shelve.open", "runpy.run_path"}


def calls(source: str) -> list[str]:
    """Calls of a module that run what they are given, as they are written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        bad = (
            name in FORBIDDEN or given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False"
        )
        bad = bad or (name.endswith("torch.load") and given.get("weights_only") != "True")
        if bad:
            found.append(ast.unparse(node))
    return found


def test_the_tests_that_hold_the_promises_are_there() -> None:
    page = (SOURCE.parents[1] / "SECURITY.md").read_text()
    named = set(re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`", page))
    assert len(named) >= 7
    assert [name for name in sorted(named) if not (SOURCE.parents[1] / name).is_file()] == []
    assert {f"tests/{path.name}" for path in Path(__file__).parent.glob("test_hostile_*.py")} <= named


def test_no_module_of_ours_runs_what_it_is_given() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    found = {str(path.relative_to(SOURCE)): calls(path.read_text()) for path in files}
    assert {name: said for name, said in found.items() if said} == {}
    unpicklers = [path.name for path in files if "Unpickler" in path.read_text()]
    assert unpicklers == ["sharded.py"], "which makes the parts of a list of shards alone"


@pytest.mark.parametrize(
    "line",
    [
        *("eval(x)", "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(t)"),
        *("np.load(f, allow_pickle=True)", "subprocess.run(c, shell=True)", "np.load(f, allow_pickle=wanted)"),
    ],
)
def test_the_test_sees_a_call_that_runs_what_it_is_given(line: str) -> None:
    assert calls(line) == [line]
    assert calls("torch.load(f, weights_only=True); np.load(f); subprocess.run(c); model.eval()") == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, documents, and a training whose last step is still to be done."""
    folder = tmp_path_factory.mktemp("trained")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts", count=2)
    table().save(folder / "good.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert longrope(*TRAINING).code == 0
    shutil.rmtree(folder / "run" / "checkpoints" / "checkpoint-2")
    for name in ("DONE", "metrics.json"):
        (folder / "run" / name).unlink()
    losses = folder / "run" / "training.jsonl"
    losses.write_text("".join(losses.read_text().splitlines(keepends=True)[:1]))
    return folder


TRAINING = [
    "finetune",
    "model",
    "--factors",
    "good.json",
    "-d",
    "texts",
    "--length",
    TARGET,
    "--steps",
    2,
    "--batch",
    1,
]
TRAINING += ["--save-every", 1, "--dtype", "float32", "--device", "cpu", "--tracker", "none", "--out", "run", "-q"]


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "shards"])
@pytest.mark.parametrize("how", ["pickled", "saved"])
def test_state_of_a_training_that_others_wrote_runs_nothing(here: Path, mark: Path, name: str, how: str) -> None:
    checkpoint = here / "run" / "checkpoints" / "checkpoint-1"
    path = checkpoint / name
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    if name == "shards":
        path = checkpoint / "optimizer_0" / ".metadata"
        path.parent.mkdir()
    stored = io.BytesIO()
    torch.save(Spy(mark), stored)
    path.write_bytes(pickle.dumps(Spy(mark)) if how == "pickled" else stored.getvalue())
    mark_whole(checkpoint, of=json.loads((checkpoint / WHOLE).read_text())["of"])
    told = refused(*TRAINING)
    assert told.startswith("checkpoint: got run/checkpoints/checkpoint-1: ")
    assert not mark.exists()
    assert torch.load(path, weights_only=False) is None if how == "saved" else pickle.loads(path.read_bytes()) is None
    assert mark.exists(), "it would have run"


def test_a_training_that_nobody_touched_goes_on(here: Path) -> None:
    assert longrope(*TRAINING).code == 0


def write_shards(folder: Path, **items: Any) -> Path:
    state = {"moment": torch.ones(3, dtype=torch.bfloat16), "step": torch.tensor(3.0), "rate": 1e-3, **items}
    save_shards({"state": state}, checkpoint_id=str(folder / "optimizer_0"), no_dist=True)
    return folder / "optimizer_0" / ".metadata"


def change_list(path: Path, change: Callable[[Any], None]) -> None:
    told = pickle.loads(path.read_bytes())
    change(told)
    path.write_bytes(pickle.dumps(told))


def _elsewhere(told: Any) -> None:
    for item in told.storage_data.values():
        item.relative_path = "../other.distcp"


def _compressed(told: Any) -> None:
    for item in told.storage_data.values():
        item.transform_descriptors = ["zstd"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shards_that_others_wrote_run_nothing_and_read_nothing_elsewhere(tmp_path: Path, mark: Path) -> None:
    path = write_shards(tmp_path / "good")
    check_shards(tmp_path / "good")
    check_shards(None)
    write_shards(tmp_path / "item", other=Spy(mark))
    with pytest.raises(UserError, match=r"optimizer_0/\.metadata"):
        check_shards(tmp_path / "item")
    for change in (_elsewhere, _compressed):
        shutil.copytree(tmp_path / "good", tmp_path / change.__name__)
        change_list(tmp_path / change.__name__ / "optimizer_0" / ".metadata", change)
        with pytest.raises(UserError, match="a training goes on from whole files"):
            check_shards(tmp_path / change.__name__)
    for data in (b"", b"x", pickle.dumps(torch.load), pickle.dumps(save_shards), pickle.dumps({"a": 1})):
        path.write_bytes(data)
        with pytest.raises(UserError, match="a training goes on from whole files"):
            check_shards(tmp_path / "good")
    assert not mark.exists()


def test_answers_that_others_kept_are_not_unpickled(tmp_path: Path, mark: Path) -> None:
    import sqlitedict

    kept = {"a": (-1.5, True), "b": -0.25, "c": "text", "d": (float("-inf"), False)}
    with answers_as_json(), sqlitedict.SqliteDict(str(tmp_path / "kept.db"), autocommit=True) as answers:
        for key, value in kept.items():
            answers[key] = value
        assert dict(answers) == kept
    with sqlitedict.SqliteDict(str(tmp_path / "others.db"), autocommit=True) as answers:
        answers["a"] = Spy(mark)
    with answers_as_json(), sqlitedict.SqliteDict(str(tmp_path / "others.db")) as answers:
        with pytest.raises(UserError, match="answers that were kept can be read"):
            answers["a"]
        assert not mark.exists()


CODE = """import os
os.makedirs({mark!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("kind", ["own", "llama", "../own", "/etc/passwd"])
def test_code_of_a_checkpoint_runs_in_no_command(
    here: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    own = here / "model"
    (own / "own.py").write_text(CODE.format(mark=str(mark)))
    named = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(own / "config.json", model_type=kind, auto_map=named, architectures=["OwnModel"])
    change(
        own / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer"] * 2},
    )
    commands: list[list[object]] = [
        ["doctor", "model", "--fix", "mended"],
        ["documents", "texts", "--model", "model"],
        ["search", "model", "--to", TARGET, "-d", "texts", "--out", "searched", "--evaluations", 1],
        ["export", "model", "--factors", "good.json", "--out", "exported"],
        ["verify", "model", "--against", "model"],
        ["generate", "model", "--prompt", "a", "-n", 1],
        ["evaluate", "perplexity", "model", "--lengths", ORIGINAL, "-d", "texts", "--windows", 1],
        ["extend", "model", "--to", TARGET, "-d", "texts", "--dry-run"],
    ]
    codes = []
    for command in commands:
        ran = longrope(*command, "-q")
        assert "Traceback" not in ran.err, ran
        assert ran.code in (0, 1, 2), ran
        assert "with -v" not in ran.err, ran
        codes.append(ran.code)
        assert not mark.exists(), command
    if kind == "own":
        assert codes[2:4] == [2, 2]
        longrope("generate", "model", "--prompt", "a", "-n", 1, "--trust-remote-code", "-q")
        assert mark.exists(), "it runs where it is asked for"


ORIGINAL = "48"


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_an_adapter_beside_the_weights_is_refused(here: Path) -> None:
    (here / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "elsewhere", "peft_type": "LORA", "megatron_core": "own"})
    )
    for command in (
        ("search", "model", "--to", TARGET, "-d", "texts"),
        ("export", "model", "--factors", "good.json", "--out", "o"),
    ):
        assert "merge the adapter" in refused(*command)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ raise_exception('\x1b[31m no\n') }}", "no"),
        ("{% if %}", "chat template"),
        ("{{ messages[0]['x']['y'] }}", "chat template"),
    ],
)
def test_a_chat_template_is_a_program_without_python(here: Path, template: str, told: str) -> None:
    path = here / "model" / "tokenizer_config.json"
    change(path, chat_template=template)
    (here / "talk.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    said = [
        refused("generate", "model", "--chat", "--prompt", "a", "-q"),
        refused("documents", "talk.jsonl", "--model", "model"),
    ]
    for line in said:
        assert told in line
        assert "\x1b" not in line


TOKENIZERS: dict[str, Callable[[Any], object]] = {
    "no model": lambda data: data.pop("model"),
    "another type": lambda data: data["model"].update(type="x"),
    "numbers for names": lambda data: data["model"].update(vocab=[1, 2]),
    "merges of nothing": lambda data: data["model"].update(merges=[["x", "y"]]),
    "an id beyond": lambda data: data["model"]["vocab"].update({"far": 2**40}),
    "an unknown normalizer": lambda data: data.update(normalizer={"type": "x"}),
    "a pattern that does not end": lambda data: data.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$("}, "behavior": "Isolated", "invert": False}
    ),
    "added tokens of another kind": lambda data: data.update(added_tokens=[{"id": -1, "content": 7}]),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused(here: Path, case: str) -> None:
    path = here / "model" / "tokenizer.json"
    data = json.loads(path.read_text())
    TOKENIZERS[case](data)
    path.write_text(json.dumps(data))
    refused("documents", "texts", "--model", "model")
    refused("search", "model", "--to", TARGET, "-d", "texts", "-q")


@pytest.mark.parametrize(
    "settings",
    ["{", "[]", '{"max_new_tokens": "x"}', '{"do_sample": true, "temperature": -1, "top_p": "x", "eos_token_id": "y"}'],
)
def test_generation_settings_of_others_change_nothing_of_what_is_asked(here: Path, settings: str) -> None:
    (here / "model" / "generation_config.json").write_text(settings)
    ran = longrope("generate", "model", "--prompt", "a", "-n", 2, "--device", "cpu", "--json", "-q")
    assert ran.code in (0, 2), ran
    assert ran.err.count("\n") == (ran.code == 2), ran
