"""What `import longrope` gives to people's own code."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import longrope
from commands import SHAPE, TARGET, table, write_checkpoint, write_documents
from longrope.baselines import RopeShape, baseline
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from models import ORIGINAL, build, tokens

FLOAT32 = LoadOptions(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts")
    table().save(folder / "factors.json")
    return folder


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama").requires_grad_(False)


def logits(model: Any, length: int) -> torch.Tensor:
    answer: torch.Tensor = model(tokens(length)).logits
    return answer


def stock(kind: str, **parameters: Any) -> PreTrainedModel:
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, **parameters}
    return build("llama", max_position_embeddings=TARGET, rope_parameters=rope).requires_grad_(False)


def yarn() -> PreTrainedModel:
    return stock("yarn", original_max_position_embeddings=ORIGINAL)


def test_one_length_and_one_source_need_no_list(ground: Path) -> None:
    """A text is not a list of its letters, nor is one of digits."""
    given: dict[str, Any] = {"windows": 1, "options": FLOAT32}
    model, texts = str(ground / "model"), str(ground / "texts")
    listed = longrope.evaluate("perplexity", model, lengths=[32, 40], documents=[texts], **given)["results"]
    for lengths in ("40,32", ("32", 40)):
        found = longrope.evaluate("perplexity", model, lengths=lengths, documents=texts, **given)["results"]
        assert found == listed
    one = longrope.evaluate("perplexity", model, lengths=40, documents=Path(texts), **given)["results"]
    assert one == listed[1:]
    made = longrope.search(
        model, to=TARGET, documents=texts, evaluations=2, windows=1, options=FLOAT32, out=ground / "searched"
    )
    assert made.lengths[-1] == TARGET


ON_A_PATH: dict[str, Callable[[Path, Path, Path], object]] = {
    "load": lambda model, ground, out: longrope.load(model, ground / "factors.json", dtype="float32"),
    "search": lambda model, ground, out: longrope.search(
        model, to=TARGET, documents=ground / "texts", evaluations=2, windows=1, options=FLOAT32, out=out
    ),
    "finetune": lambda model, ground, out: longrope.finetune(
        model, length=TARGET, factors=ground, documents=ground / "texts", steps=1, batch=1, options=FLOAT32, out=out
    ),
    "extend": lambda model, ground, out: longrope.extend(
        model, to=TARGET, documents=ground / "texts", stages=ground / "plan.toml", options=FLOAT32, out=out
    ),
    "evaluate": lambda model, ground, out: longrope.evaluate(
        "passkey", model, lengths=TARGET, tries=1, options=FLOAT32, out=out
    ),
    "compare": lambda model, ground, out: longrope.compare(
        model, lengths=TARGET, methods=["pi"], documents=ground / "texts", windows=1, options=FLOAT32, out=out
    ),
    "export": lambda model, ground, out: longrope.export(model, ground, out, options=FLOAT32),
    "verify": lambda model, ground, out: longrope.verify(
        longrope.export(str(model), ground, out, options=FLOAT32), against=model
    ),
    "plan": lambda model, ground, out: longrope.plan(model, to=TARGET, gpus="1x24GB"),
    "doctor": lambda model, ground, out: longrope.doctor(model),
}
TAKES_NO_MODEL_BY_NAME = {"apply"}


def test_every_public_function_is_given_a_path_below() -> None:
    functions = {name for name in dir(longrope) if inspect.isfunction(getattr(longrope, name))}
    assert functions - TAKES_NO_MODEL_BY_NAME == set(ON_A_PATH)


@pytest.mark.parametrize("name", ON_A_PATH)
def test_a_model_may_be_a_path(name: str, ground: Path, tmp_path: Path) -> None:
    (ground / "plan.toml").write_text(
        '[[stages]]\ndo = "search"\nto = "4x"\nwindows = 1\nevaluations = 2\n[measure]\nwindows = 1\npasskey = 1\n'
    )
    ON_A_PATH[name](ground / "model", ground, tmp_path / "out")


def test_a_path_that_reads_tiny_is_a_folder_as_it_is_in_a_command(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pathlib drops the ./ by which a command tells the folder from the embedded model."""
    (tmp_path / "tiny").symlink_to(ground / "model")
    monkeypatch.chdir(tmp_path)
    loaded = longrope.load(Path("./tiny"), ground / "factors.json", dtype="float32")
    assert loaded.config.rope_parameters["rope_theta"] == SHAPE.rope_theta
    exported = longrope.export(Path("./tiny"), ground / "factors.json", tmp_path / "out", options=FLOAT32)
    assert longrope.FactorTable.load(exported / "factors.json").rope_theta == SHAPE.rope_theta


def test_importing_longrope_and_naming_what_it_has_imports_no_torch() -> None:
    code = (
        "import sys, longrope; dir(longrope); longrope.__version__; longrope.RopeFactors; longrope.FactorTable; "
        "longrope.UserError; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_public_names_are_callable_whatever_modules_of_the_same_names_are_loaded() -> None:
    import longrope.compare
    import longrope.evaluate.run
    import longrope.export.run
    import longrope.search.driver

    names = {"RopeFactors", "FactorTable", "UserError", "load", "apply", "search", "compare", "evaluate", "export"}
    assert names | {"__version__"} <= set(dir(longrope))
    assert all(callable(getattr(longrope, name)) for name in names)
    with pytest.raises(AttributeError, match=r"^module 'longrope' has no attribute 'banana'$"):
        getattr(longrope, "banana")  # noqa: B009  (a name that a type checker would refuse)


def test_factors_applied_rotate_like_stock_transformers_and_undo_restores_the_model(model: PreTrainedModel) -> None:
    before = logits(model, TARGET)
    handle = longrope.apply(model, baseline("yarn", SHAPE, TARGET))
    assert torch.allclose(logits(model, TARGET), logits(yarn(), TARGET), atol=1e-5)
    handle.undo()
    assert torch.equal(logits(model, TARGET), before)
    with longrope.apply(model, baseline("pi", SHAPE, TARGET)):
        assert not torch.equal(logits(model, TARGET), before)
    assert torch.equal(logits(model, TARGET), before)


def test_a_table_is_used_by_the_length_of_the_sequence(model: PreTrainedModel) -> None:
    short, long = logits(model, ORIGINAL), logits(yarn(), ORIGINAL + 1)
    longrope.apply(model, table())
    assert torch.equal(logits(model, ORIGINAL), short)
    assert torch.allclose(logits(model, ORIGINAL + 1), long, atol=1e-5)
    with pytest.raises(UserError, match=r"^sequence: got 193 tokens; the factor table ends at 192; "):
        logits(model, TARGET + 1)


def test_factors_are_given_as_table_row_dict_path_or_folder(ground: Path) -> None:
    expected = logits(yarn(), TARGET)
    path = ground / "factors.json"
    for given in (table(), table().rows[-1], table().to_dict(), path, str(path), ground):
        model = build("llama").requires_grad_(False)
        longrope.apply(model, given)
        assert torch.allclose(logits(model, TARGET), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (RopeShape(10000.0, 16, ORIGINAL), "factors: got rope_theta 10000; the model has rope_theta 500; "),
        (RopeShape(500.0, 32, ORIGINAL), "factors: got rotary_dim 32; the model has rotary_dim 16; "),
        (RopeShape(500.0, 16, 64), "factors: got original_length 64; the model has original_length 48; "),
    ],
)
def test_factors_of_another_model_are_refused_and_leave_the_model_alone(
    model: PreTrainedModel, ground: Path, other: RopeShape, message: str
) -> None:
    before = logits(model, ORIGINAL)
    with pytest.raises(UserError, match=rf"^{message}give the factors that were searched for this model"):
        longrope.apply(model, table(shape=other))
    with pytest.raises(UserError, match=rf"^{message}"):
        longrope.load(str(ground / "model"), table(shape=other), dtype="float32")
    assert torch.equal(logits(model, ORIGINAL), before)
    longrope.apply(model, table())


def test_a_row_of_another_model_is_refused_and_leaves_the_model_alone(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"^factors: got 4 "):
        longrope.apply(model, baseline("pi", RopeShape(500.0, 8, ORIGINAL), TARGET))
    longrope.apply(model, table())


def test_an_original_length_given_is_the_one_that_counts(model: PreTrainedModel) -> None:
    for_64 = table(shape=RopeShape(500.0, 16, 64))
    before = logits(model, TARGET)
    with pytest.raises(UserError, match=r"^factors: got original_length 64; the model has original_length"):
        longrope.apply(model, for_64)
    assert torch.equal(logits(model, TARGET), before)
    longrope.apply(model, for_64, original_length=64)
    assert not torch.allclose(logits(model, TARGET), before, atol=1e-3)


def test_load_gives_a_transformers_model_with_the_factors_installed(ground: Path, tmp_path: Path) -> None:
    expected = logits(yarn(), TARGET)
    loaded = longrope.load(str(ground / "model"), ground / "factors.json", device="cpu", dtype="float32")
    assert isinstance(loaded, PreTrainedModel)
    assert torch.allclose(logits(loaded, TARGET), expected, atol=1e-5)
    own = write_checkpoint(tmp_path / "own")
    table().save(own / "factors.json")
    assert torch.allclose(logits(longrope.load(str(own), dtype="float32"), TARGET), expected, atol=1e-5)
    ready = build("llama").requires_grad_(False)
    assert longrope.load(ready, table()) is ready
    assert torch.allclose(logits(ready, TARGET), expected, atol=1e-5)


def test_load_without_factors_is_refused(ground: Path, model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"^factors: got none; .*model has no factors.json of its own; give a factors"):
        longrope.load(str(ground / "model"), dtype="float32")
    with pytest.raises(UserError, match=r"^factors: got none; a model already loaded needs them; give a factors.json$"):
        longrope.load(model)


def test_a_model_generates_within_one_row_of_its_table(ground: Path) -> None:
    loaded: Any = longrope.load(str(ground / "model"), table().rows[-1], device="cpu", dtype="float32")
    reference: Any = yarn()
    ids = tokens(60)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), reference.generate(ids, **options))


def test_the_line_of_calls_from_search_to_export(ground: Path, tmp_path: Path) -> None:
    """search -> compare -> evaluate -> export, each by its keywords, and what is exported loads in transformers."""
    name, documents = str(ground / "model"), [str(ground / "texts")]
    common: dict[str, Any] = {"documents": documents, "windows": 2, "options": FLOAT32, "seed": 1}
    settings: dict[str, Any] = {
        "start_tokens": "0",
        "attention_factor": "none",
        "evaluations": 8,
        "method": "evolution",
    }
    found = longrope.search(name, to=TARGET, out=tmp_path / "run", **settings, **common)
    assert isinstance(found, longrope.FactorTable)
    assert found == longrope.FactorTable.load(tmp_path / "run" / "factors.json")
    assert [row.up_to for row in found.rows] == [ORIGINAL, TARGET]

    compared = longrope.compare(
        name, lengths=[TARGET], methods=["pi"], factors={"found": found}, out=tmp_path / "compared", **common
    )
    value = {result["method"]: result["value"] for result in compared["results"]}
    assert value["found"] != value["pi"]
    for given in (found, tmp_path / "run" / "factors.json", str(tmp_path / "run" / "factors.json")):
        (evaluated,) = longrope.evaluate("perplexity", name, lengths=[TARGET], factors=given, **common)["results"]
        assert evaluated["value"] == value["found"]

    folder = longrope.export(name, found, tmp_path / "exported", engine="transformers", window="long", options=FLOAT32)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = longrope.load(name, found.rows[-1], device="cpu", dtype="float32")
    with torch.no_grad():
        assert torch.allclose(logits(reloaded, TARGET), logits(ours, TARGET), atol=1e-5)


def test_a_seed_vector_of_another_model_is_refused_before_anything_is_written(ground: Path, tmp_path: Path) -> None:
    other = replace(table(), rope_theta=10000.0)
    with pytest.raises(UserError, match=r"^factors: got rope_theta 10000; the model has rope_theta 500; "):
        longrope.search(
            str(ground / "model"),
            to=TARGET,
            documents=[str(ground / "texts")],
            windows=2,
            init=[other],
            out=tmp_path / "run",
            options=FLOAT32,
        )
    assert not (tmp_path / "run").exists()


def test_seed_vectors_are_given_as_tables_files_or_runs(ground: Path, tmp_path: Path) -> None:
    table().save(tmp_path / "factors.json")
    found = []
    ways: list[Any] = [table(), str(tmp_path / "factors.json"), [tmp_path]]
    for number, init in enumerate(ways):
        given: dict[str, Any] = {"documents": ground / "texts", "windows": 2, "evaluations": 20, "options": FLOAT32}
        longrope.search(ground / "model", to=TARGET, init=init, out=tmp_path / f"run-{number}", **given)
        config = json.loads((tmp_path / f"run-{number}" / "config.json").read_text())
        found.append(config["settings"]["init"])
    assert found[0]
    assert found[0] == found[1] == found[2]
