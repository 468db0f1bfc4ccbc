"""The doctor: every trap is found where it is and not where it is not, and what it mends is mended."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from commands import contents, longrope, refused, table, write_checkpoint
from longrope.baselines import su_attention_factor
from longrope.configs import table_from_config
from longrope.convert import to_transformers_config
from longrope.doctor.examine import SEVERITIES, examine, mended, read_config
from longrope.doctor.loaded import examine_model
from longrope.doctor.view import CHECKS, Folder
from longrope.errors import UserError
from longrope.export.engines import table_for_window
from models import ORIGINAL, build, config
from published import NOT_SUPPORTED, PUBLISHED

Config = dict[str, Any]
STANDARD = su_attention_factor(4.0, ORIGINAL)


def healthy() -> Config:
    """A Llama at 4x, one list of factors in both places, everything said everywhere: nothing is to be found."""
    factors = [1.0 + 0.5 * pair for pair in range(8)]
    rope = {
        "rope_type": "longrope", "type": "longrope", "rope_theta": 500.0, "short_factor": factors,
        "long_factor": list(factors), "original_max_position_embeddings": ORIGINAL, "factor": 4.0,
        "attention_factor": STANDARD, "short_mscale": STANDARD, "long_mscale": STANDARD,
    }  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_attention_heads": 2,
        "head_dim": 16, "max_position_embeddings": 4 * ORIGINAL, "rope_theta": 500.0, "rope_parameters": rope,
        "rope_scaling": copy.deepcopy(rope),
    }  # fmt: skip


def both(change: Callable[[Config], object]) -> Callable[[Config], None]:
    """A change to both places of the RoPE."""

    def apply(config: Config) -> None:
        change(config["rope_parameters"])
        change(config["rope_scaling"])

    return apply


def put(**values: Any) -> Callable[[Config], None]:
    return lambda place: place.update(values)


def drop(*keys: str) -> Callable[[Config], None]:
    def apply(place: Config) -> None:
        for key in keys:
            place.pop(key)

    return apply


def by_type(config: Config) -> None:
    config["model_type"] = "gemma3_text"


def flat(config: Config) -> None:
    config.pop("rope_parameters")


def lose_theta(config: Config) -> None:
    both(drop("rope_theta"))(config)
    config.pop("rope_theta")


def plain(config: Config) -> None:
    config.pop("rope_scaling")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}


ONES = [1.0] * 8
TABLE = table()
# Name of a finding: what a healthy configuration is changed by to have it, and what lies beside it.
SICK: dict[str, tuple[Callable[[Config], object], Folder]] = {
    "su-name": (both(put(rope_type="su", type="su")), Folder()),
    "type-names-differ": (both(put(type="yarn")), Folder()),
    "type-name-old": (both(drop("rope_type")), Folder()),
    "unknown-type": (both(put(rope_type="banana", type="banana")), Folder()),
    "one-place": (drop("rope_scaling"), Folder()),
    "places-differ": (lambda config: config["rope_scaling"].update(factor=8.0), Folder()),
    "theta-lost": (lose_theta, Folder()),
    "theta-below": (drop("rope_theta"), Folder()),
    "theta-differs": (put(rope_theta=10000.0), Folder()),
    "head-dim-none": (put(head_dim=None), Folder()),
    "local-layers": (by_type, Folder()),  # a flat rope_scaling alone is what Gemma 3 is published with
    "original-missing": (both(drop("original_max_position_embeddings")), Folder()),
    "original-differs": (put(original_max_position_embeddings=64), Folder()),
    "not-longer": (lambda config: (put(max_position_embeddings=ORIGINAL)(config), both(put(short_factor=ONES))(config)),
                   Folder()),
    "factor-mismatch": (both(put(factor=8.0)), Folder()),
    "sliding-window": (put(sliding_window=100), Folder()),
    "tokenizer-length": (put(), Folder(tokenizer={"model_max_length": ORIGINAL})),
    "starts-short": (put(original_max_position_embeddings=ORIGINAL), Folder()),
    "list-missing": (both(drop("long_factor")), Folder()),
    "list-length": (both(put(long_factor=[1.0] * 7)), Folder()),
    "partial-rotary": (both(put(partial_rotary_factor=0.5)), Folder()),
    "per-layer-lists": (both(put(long_factor=[ONES, ONES])), Folder()),
    "factor-values": (both(put(long_factor=[*ONES[:7], float("nan")])), Folder()),
    "mscale-missing": (both(lambda rope: (drop("short_mscale", "long_mscale")(rope), put(attention_factor=1.5)(rope))),
                       Folder()),
    "mscale-alone": (both(lambda rope: (drop("attention_factor")(rope), put(long_mscale=1.5)(rope))), Folder()),
    "mscale-phimoe": (lambda config: (put(model_type="phimoe")(config), both(drop("long_mscale"))(config)), Folder()),
    "attention-at-short-length": (both(put(short_factor=ONES)), Folder()),
    "attention-not-standard": (both(put(attention_factor=1.5)), Folder()),
    "stale-cache": (both(put(short_factor=ONES)), Folder()),
    "sglang-regimes": (both(put(short_factor=ONES)), Folder()),
    "llama-cpp": (put(model_type="qwen2"), Folder()),
    "table-of-another-model": (put(), Folder(replace(TABLE, rope_theta=10000.0))),
    "table-differs": (put(), Folder(TABLE)),
    "table-not-served": (plain, Folder(TABLE)),
    "not-supported": (put(kv_lora_rank=8), Folder()),
    "scaling-values": (both(put(attention_factor=0.0)), Folder()),
    "original-null": (put(original_max_position_embeddings=None), Folder()),
    "theta-values": (lambda config: (put(rope_theta=-500.0)(config), both(put(rope_theta=-500.0))(config)), Folder()),
}  # fmt: skip
MENDED = sorted(each.name for each in CHECKS if each.mend is not None)


def sick(name: str) -> Config:
    broken = healthy()
    SICK[name][0](broken)
    return broken


def names(config: Config, folder: Folder | None = None) -> set[str]:
    return {finding.name for finding in examine(config, folder)}


def test_there_is_nothing_to_find_in_what_is_right() -> None:
    assert examine(healthy()) == []
    assert examine(config("llama").to_dict()) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_of_published_models_only_what_is_true_is_found_and_a_mend_keeps_their_rotation(name: str) -> None:
    published, wrong = PUBLISHED[name]
    found = examine(published)
    assert {finding.name for finding in found if finding.severity != "note"} == wrong
    assert ("not-supported" in names(published)) == (name in NOT_SUPPORTED)
    whole = mended(published)
    assert not [finding.name for finding in examine(whole) if finding.fixed]
    with suppress(UserError):
        before = table_from_config(published).rows
        assert [row.rescale for row in table_from_config(whole).rows] == [row.rescale for row in before]


def test_a_mend_of_yarn_lengthens_the_window_and_keeps_its_factor() -> None:
    whole = mended(PUBLISHED["Qwen2.5-7B with YaRN as its card says"][0])
    assert (whole["max_position_embeddings"], whole["rope_scaling"]["factor"]) == (131072, 4.0)


def test_a_window_that_was_not_extended_has_nothing_wrong() -> None:
    short = healthy() | {"max_position_embeddings": ORIGINAL, "sliding_window": ORIGINAL // 2}
    for key in ("rope_parameters", "rope_scaling"):
        short[key] |= {"factor": 1.0}
    assert {"not-longer", "sliding-window"} & names(short) == set()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NAN = float("nan")


def scaled(**rope: Any) -> Config:
    """The healthy configuration with another scaling, in both places."""
    return healthy() | {key: {"rope_theta": 500.0, **rope} for key in ("rope_parameters", "rope_scaling")}


def errors(config: Config) -> dict[str, str]:
    return {finding.name: finding.what for finding in examine(config) if finding.severity == "error"}


def stock_fails(described: Config) -> bool:
    """Whether transformers makes no model of a configuration, or one that does not run, or rotates by no numbers."""
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 32, "num_key_value_heads": 1}
    given = copy.deepcopy({**described, **sizes, "pad_token_id": 0})
    try:
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
        with torch.no_grad():
            model(torch.arange(8)[None])
    except Exception:  # each broken value fails in a way of its own
        return True
    return not bool(torch.isfinite(model.model.rotary_emb.inv_freq).all())


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("factor", [-4.0, 0, NAN, float("inf")])
def test_a_factor_that_is_no_positive_number_is_an_error(rope_type: str, factor: float) -> None:
    told = errors(scaled(**{**LLAMA3, "rope_type": rope_type, "factor": factor}))
    assert set(told) == {"scaling-values"}
    assert told["scaling-values"].startswith(f"{rope_type} cannot be computed: factor: {factor}; it is a finite")


@pytest.mark.parametrize(
    ("rope", "what"),
    [
        ({"rope_type": "linear"}, "no factor; this RoPE needs it"),
        ({"rope_type": "llama3", "factor": 8.0}, "no low_freq_factor; this RoPE needs it"),
        ({**LLAMA3, "low_freq_factor": 8.0}, "low_freq_factor: 8; it is at most high_freq_factor, 4"),
        ({**YARN, "beta_fast": NAN}, "beta_fast: nan; it is a finite, positive number"),
        ({**YARN, "attention_factor": -1.0}, "attention_factor: -1.0; it is a finite, positive number"),
        ({**YARN, "original_max_position_embeddings": 64.5}, "original_max_position_embeddings: 64.5; it is a whole"),
    ],
)
def test_a_scaling_that_cannot_be_computed_is_an_error(rope: Config, what: str) -> None:
    told = errors(scaled(**rope))
    assert set(told) == {"scaling-values"}
    assert f"{rope['rope_type']} cannot be computed: {what}" in told["scaling-values"]


def test_what_is_wrong_with_a_scaling_is_told_once_and_of_every_model() -> None:
    """Not beside the check of a list, nor only of models that longrope can extend."""
    for name in ("list-missing", "list-length", "factor-values", "mscale-phimoe", "original-missing"):
        assert set(errors(sick(name))) == {name}
    broken = scaled(**{**YARN, "factor": 0}) | {"kv_lora_rank": 8}
    assert "scaling-values" in errors(broken)


@pytest.mark.parametrize("family", ["gpt_neox", "stablelm", "phi", "nemotron", "glm"])
def test_a_class_that_rotates_a_share_of_its_own_has_a_scaling_that_can_be_computed(family: str) -> None:
    described = healthy() | {"model_type": family}
    assert "scaling-values" not in names(described)
    del described["rope_parameters"]["factor"], described["rope_scaling"]["factor"]
    assert "scaling-values" not in names(described)
    assert "scaling-values" in errors(scaled(**{**YARN, "factor": 0}) | {"model_type": family})


@pytest.mark.parametrize("rope", [YARN, LLAMA3, healthy()["rope_scaling"], {"rope_type": "linear", "factor": 4.0}])
def test_a_null_original_length_is_an_error_where_transformers_fails_on_it(rope: Config) -> None:
    described = scaled(**rope)
    assert "original-null" not in errors(described)
    assert not stock_fails(described)
    described["original_max_position_embeddings"] = None
    assert ("original-null" in errors(described)) == stock_fails(described) == (rope["rope_type"] != "linear")
    assert not stock_fails(mended(described))


@pytest.mark.parametrize("theta", [0, -500.0, NAN, None])
def test_a_base_that_is_no_positive_number_is_an_error(theta: float | None) -> None:
    described = {**healthy(), "rope_theta": theta}
    del described["rope_parameters"], described["rope_scaling"]
    assert set(errors(described)) == {"theta-values"}
    assert stock_fails(described)
    lost = healthy()
    lose_theta(lost)
    assert "theta-values" not in errors(lost)


@pytest.mark.parametrize(("inside", "severity"), [(True, "warning"), (False, "error")])
def test_su_is_an_error_where_transformers_fails_on_it(inside: bool, severity: str) -> None:
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    original = {"original_max_position_embeddings": ORIGINAL}
    scaling = {"type": "su", **lists, **(original if inside else {})}
    described = {
        "model_type": "phi3", "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 4 * ORIGINAL,
        "rope_theta": 500.0, **original, "rope_scaling": scaling,
    }  # fmt: skip
    assert [each.severity for each in examine(described) if each.name == "su-name"] == [severity]
    assert stock_fails(described) == (severity == "error")
    assert not stock_fails(mended(described))


def test_mrope_is_no_name_that_other_classes_know() -> None:
    rope = {"rope_type": "mrope", "mrope_section": [2, 3, 3]}
    assert "unknown-type" in errors(scaled(**rope))
    assert "unknown-type" not in errors(scaled(**rope) | {"model_type": "qwen2_vl"})


def test_every_finding_is_tested() -> None:
    assert set(SICK) == {each.name for each in CHECKS}
    assert len(SICK) >= 20


@pytest.mark.parametrize("name", SICK)
def test_a_trap_is_found_where_it_is(name: str) -> None:
    found = [finding for finding in examine(sick(name), SICK[name][1]) if finding.name == name]
    assert found
    for finding in found:
        assert finding.severity in SEVERITIES
        assert finding.what
        assert finding.do
        assert "\n" not in finding.what + finding.do


@pytest.mark.parametrize("name", MENDED)
def test_what_can_be_mended_is_not_found_again(name: str) -> None:
    folder = Folder(TABLE) if name == "original-missing" else SICK[name][1]
    broken = sick(name)
    before = copy.deepcopy(broken)
    whole = mended(broken, folder)
    assert broken == before, "what is given is left alone"
    assert name in names(broken, folder)
    assert name not in names(whole, folder)
    errors = {finding.name for finding in examine(whole, folder) if finding.severity == "error"}
    assert errors <= {finding.name for finding in examine(broken, folder) if finding.severity == "error"} - {name}


def test_mending_what_is_right_changes_nothing() -> None:
    assert mended(healthy()) == healthy()


@pytest.mark.parametrize("name", ["su-name", "one-place", "head-dim-none", "theta-below", "type-name-old"])
def test_what_was_mended_builds_and_rotates_as_the_healthy_one(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    models = []
    for each in (healthy(), mended(sick(name))):
        torch.manual_seed(0)
        settings = {**each, "vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 32, "num_key_value_heads": 1}
        models.append(LlamaForCausalLM(LlamaConfig(**settings)).train(False))
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo3"])
def test_what_transformers_saves_of_models_with_local_layers_has_no_errors(family: str) -> None:
    described = config("gemma3" if family == "gemma3_text" else family).to_dict()
    assert not [finding for finding in examine(described) if finding.severity == "error"]


@pytest.mark.parametrize("window", ["long", "dynamic"])
def test_what_we_export_has_no_errors(tmp_path: Path, window: str) -> None:
    import longrope as package

    write_checkpoint(tmp_path / "model")
    served = (
        TABLE if window == "long" else replace(TABLE, rows=tuple(r.with_values(attention_factor=1) for r in TABLE.rows))
    )
    folder = package.export(str(tmp_path / "model"), served, tmp_path / "out", window=window)
    path, described, beside = read_config(folder)
    assert path == folder / "config.json"
    found = examine(described, beside)
    assert not [finding for finding in found if finding.severity == "error"], found
    assert to_transformers_config(table_for_window(served, window))["rope_parameters"]["rope_type"] == "longrope"


def test_a_scaling_that_is_set_after_loading_is_found(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "model"))
    assert "set-after-load" not in {finding.name for finding in examine_model(model)}
    model.config.rope_parameters = healthy()["rope_parameters"]
    model.config.max_position_embeddings = 4 * ORIGINAL
    found = {finding.name: finding for finding in examine_model(model)}
    assert "other frequencies than its configuration says" in found["set-after-load"].what
    built: Any = build("llama-longrope")
    assert "set-after-load" not in {finding.name for finding in examine_model(built)}


def test_the_command_says_what_it_finds_and_ends_with_1_on_errors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    done = longrope("doctor", tmp_path / "model")
    assert (done.code, done.out, done.err) == (0, "", "nothing found\n")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sick("su-name")))
    done = longrope("doctor", path)
    assert done.code == 1
    assert "su-name" in done.err
    assert done.err.endswith("1 finding\n")
    document = longrope("doctor", path, "--json").document
    assert [each["name"] for each in document["findings"]] == ["su-name"]
    assert document["findings"][0]["severity"] == "error"
    note = healthy() | {"model_type": "qwen2"}
    path.write_text(json.dumps(note))
    assert longrope("doctor", path).code == 0


def test_fix_writes_a_mended_copy_of_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    described = json.loads((folder / "config.json").read_text()) | {
        name: sick("one-place").get(name) for name in ("rope_parameters", "max_position_embeddings")
    }
    described["rope_parameters"] |= {"rope_type": "longrope", "type": "longrope"}
    described.pop("rope_theta", None)
    (folder / "config.json").write_text(json.dumps(described))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": ORIGINAL}))
    before = contents(folder)
    done = longrope("doctor", folder, "--fix", tmp_path / "out")
    assert done.code == 0, done.err
    assert contents(folder) == before
    _, whole, beside = read_config(tmp_path / "out")
    assert examine(whole, beside) == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_without_the_hub_a_name_that_is_no_folder_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its library would ask again for half a minute, and say so on every try."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    begun = time.monotonic()
    assert refused("doctor", "models/nope") == (
        "model: got models/nope, which is no folder here; the Hub was not reached, and no model of this name was "
        "fetched from it before; check the path: a folder, a config.json or a Hub id"
    )
    assert time.monotonic() - begun < 10
    assert capfd.readouterr().err == ""


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused("doctor", "missing").startswith("model: got missing, which is no folder here; ")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("doctor", "empty")
    for name, inside in (("searched", ""), ("trained", "checkpoint"), ("adapted", "adapter")):
        (Path(name) / inside).mkdir(parents=True)
        (Path(name) / "config.json").write_text(json.dumps({"command": "finetune", "settings": {}}))
        do = {"": "give the model that it was of", "checkpoint": f"give {name}/checkpoint"}
        told = f"model: got {name}, a run; a model is a folder of weights; {do.get(inside, 'train with --merge')}"
        for command in (["doctor", name], ["generate", name, "-p", "x"]):
            assert refused(*command).startswith(told)
    Path("list.json").write_text("[]")
    assert refused("doctor", "list.json").startswith("config: got list.json, a list; it is an object; ")
    Path("broken.json").write_text("{")
    assert "broken.json" in refused("doctor", "broken.json")
    Path("config.json").write_text(json.dumps(healthy()))
    assert refused("doctor", "config.json", "--fix", "empty/../config.json").startswith("--fix: got ")
