"""The command line: what it refuses and how, what it prints, and what a run folder holds."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from commands import SHAPE, TARGET, contents, longrope, longrope_process, refused, table, write_checkpoint
from commands import write_documents as write_documents_to
from longrope import __version__
from longrope.baselines import RopeShape
from longrope.console import describe_progress, measuring_progress, search_progress
from longrope.evaluate.execute import Step
from longrope.factors import FactorTable, RopeFactors
from longrope.report.read import read_run
from longrope.report.searched import evaluations_text
from longrope.search.loop import Progress, format_seconds
from models import ORIGINAL, build, save

LENGTH_RULE = (
    "a length is a positive whole number of tokens, with k for 1024 or m for 1024k; write it like 4096, 4k, 128k or 2m"
)
DOCUMENTS_RULE = "documents are a file, a folder, a glob, hf:NAME[:SPLIT] or stdlib; check the path"
SOME = 10
"""Evaluations, of two windows: more than the first race takes."""
METHODS_RULE = (
    "known are none, pi, ntk, ntk-cd, dynamic-ntk, yarn, yarn-paper, yarn-rcd, llama3, all but none also with +su; "
    "choose one of them"
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `model`, documents `texts` and `others`, and its factors `good.json`."""
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents_to(folder / "texts")
    write_documents_to(folder / "others", count=3, characters=900)
    table().save(folder / "good.json")
    return folder


def search(*more: object, model: str = "model", to: object = TARGET, documents: str = "texts") -> list[object]:
    return ["search", model, "--to", to, "-d", documents, "--dtype", "float32", "--windows", 2, *more]


def evolution(*more: object) -> list[object]:
    return search("--method", "evolution", *more)


def compare(*more: object, model: str = "model", lengths: object = TARGET) -> list[object]:
    return ["compare", model, "--lengths", lengths, "-d", "texts", "--dtype", "float32", "--windows", 2, *more]


def perplexity(*more: object, model: str = "model", lengths: object = TARGET) -> list[object]:
    start = ["evaluate", "perplexity", model, "--lengths", lengths, "-d", "texts"]
    return [*start, "--dtype", "float32", "--windows", 2, *more]


def passkey(*more: object, lengths: object = TARGET) -> list[object]:
    return ["evaluate", "passkey", "model", "--lengths", lengths, "--dtype", "float32", "--tries", 3, *more]


def test_the_ground_of_these_tests_is_sound(here: Path) -> None:
    """So that what is refused below is refused for what is wrong with it, and for nothing else."""
    for command in (
        search("--evaluations", SOME),
        compare("-f", "good.json"),
        perplexity("-f", "good.json"),
        passkey(),
    ):
        assert longrope(*command).code == 0
    assert longrope("export", "model", "-f", "good.json", "--out", "exported").code == 0


# Models that are refused


def with_file(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


WHOLE = "a safetensors file is whole; copy or download it again"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "model: got broken with no weights; weights are read from safetensors only; "
            "restore the .safetensors files, or convert the checkpoint with save_pretrained",
        ),
        (
            only_pickle,
            "model: got broken with pytorch_model.bin; weights are read from safetensors only; "
            "restore the .safetensors files, or convert the checkpoint with save_pretrained",
        ),
        (cut_weights, f"model: got broken/model.safetensors (REASON); {WHOLE}"),
        (with_file("model.safetensors", b""), f"model: got broken/model.safetensors (REASON); {WHOLE}"),
        (
            with_file("model.safetensors", b"<html>404</html>" * 99),
            f"model: got broken/model.safetensors (REASON); {WHOLE}",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            "model: got folder broken without config.json; a model folder has one; give a checkpoint's folder",
        ),
        (
            with_file("config.json", b"{"),
            "model: got broken (REASON); it is a transformers checkpoint in a folder or on the Hub; "
            "restore the checkpoint's files",
        ),
        (
            with_file("factors.json", b'{"format": '),
            "factors file: got broken/factors.json (REASON); it is JSON; restore the file or make it again",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(here: Path, damage: Callable[[Path], None], message: str) -> None:
    shutil.copytree("model", "broken")
    damage(here / "broken")
    for command in (search(model="broken"), compare(model="broken"), perplexity(model="broken")):
        assert re.sub(r"\(.*\)", "(REASON)", refused(*command)) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such", "got /no/such, which does not exist; a model is a folder, a Hub id or tiny; check the path"),
        ("./none", "got ./none, which does not exist; a model is a folder, a Hub id or tiny; check the path"),
        ("good.json", "got file good.json; a model is a folder or a Hub id; give its folder"),
        ("texts", "got folder texts without config.json; a model folder has one; give a checkpoint's folder"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_model_that_is_not_there_is_refused(name: str, message: str) -> None:
    assert refused(*search(model=name)) == f"model: {message}"


@pytest.mark.usefixtures("here")
def test_a_hub_id_that_cannot_be_had_is_refused() -> None:
    message = refused(*search(model="acme/none-7b"))
    assert message.startswith("model: got acme/none-7b (OSError: ")
    do = "check the name, or give the folder of a downloaded checkpoint"
    assert message.endswith(f"; it is a transformers checkpoint in a folder or on the Hub; {do}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bert",
            "model: got other, a BertModel; only causal language models of transformers can be extended; "
            "give a ...ForCausalLM checkpoint",
        ),
        (
            "gpt2",
            "model: got other, a gpt2 model whose configuration has no RoPE; only a model with RoPE can be extended; "
            "choose a RoPE model (Llama, Mistral, Qwen, Phi, Gemma, OLMo, GPT-NeoX, ...)",
        ),
        (
            "deepseek_v3",
            "config: got kv_lora_rank 8; multi-head latent attention is not supported; "
            "choose a model with one rotation for the whole head",
        ),
    ],
)
def test_a_model_that_cannot_be_extended_is_refused(here: Path, name: str, message: str) -> None:
    save(build(name), here / "other")
    assert refused(*search(model="other")) == message


@pytest.mark.usefixtures("here")
def test_a_device_that_does_not_exist_is_refused() -> None:
    for command in (search, compare, perplexity, passkey):
        rule = "it is auto, cpu, cuda, cuda:N, mps, balanced or sequential; choose one of them"
        assert refused(*command("--device", "banana")) == f"--device: got 'banana'; {rule}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.usefixtures("here")
def test_cuda_where_there_is_none_is_refused() -> None:
    for command in (search, compare, perplexity, passkey):
        rule = "torch sees no CUDA device here; use --device cpu, or install torch for CUDA"
        assert refused(*command("--device", "cuda")) == f"--device: got 'cuda'; {rule}"


@pytest.mark.usefixtures("here")
def test_an_attention_that_does_not_exist_is_refused() -> None:
    for command in (search, compare, perplexity, passkey):
        assert "banana" in refused(*command("--attention", "banana"))


# Lengths, options and arguments that are refused


@pytest.mark.parametrize("length", ["0", "-5", "4kk", "", "1e3", "0.5k", "99999999999999999999", "banana"])
@pytest.mark.usefixtures("here")
def test_a_target_that_is_no_length_is_refused(length: str) -> None:
    assert refused(*search(to=length)) == f"length: got {length!r}; {LENGTH_RULE}"


@pytest.mark.parametrize("target", [1, ORIGINAL - 1, ORIGINAL])
@pytest.mark.usefixtures("here")
def test_a_target_that_is_not_longer_than_the_original_length_is_refused(target: int) -> None:
    assert refused(*search(to=target)) == (
        f"--to: got {target} tokens; the target is longer than the model's original length of 48; "
        "give a longer target, such as 384, or --original-length"
    )


@pytest.mark.parametrize(
    ("lengths", "first"), [("", ""), (",", ""), ("1,2x", "2x"), ("256;512", "256;512"), ("64,,96", "")]
)
@pytest.mark.usefixtures("here")
def test_a_list_with_something_else_than_lengths_is_refused(lengths: str, first: str) -> None:
    for command in (
        compare(lengths=lengths),
        perplexity(lengths=lengths),
        passkey(lengths=lengths),
        ["documents", "texts", "--lengths", lengths],
    ):
        assert refused(*command) == f"length: got {first!r}; {LENGTH_RULE}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bogus"], "No such command 'bogus'; see longrope --help"),
        (["--bogus"], "No such option: --bogus; see longrope --help"),
        (["search"], "Missing argument 'MODEL'; see longrope search --help"),
        (["search", "model", "-d", "texts"], "Missing option '--to'; see longrope search --help"),
        (["search", "model", "--to", "96"], "Missing option '--documents' / '-d'; see longrope search --help"),
        (["search", "model", "--to"], "Option '--to' requires an argument; see longrope search --help"),
        (
            ["evaluate", "passkey", "--tries"],
            "Option '--tries' requires an argument; see longrope evaluate passkey --help",
        ),
        (["compare", "model", "-d", "texts"], "Missing option '--lengths'; see longrope compare --help"),
        (["evaluate"], "Missing command; see longrope evaluate --help"),
        (["evaluate", "bogus"], "No such command 'bogus'; see longrope evaluate --help"),
        (["documents"], "Missing argument 'D'; see longrope documents --help"),
        (["export", "model"], "Missing option '--out' / '-o'; see longrope export --help"),
        (
            search("--method", "banana"),
            "--method: got 'banana'; it is one of evolution, gradient, hybrid; choose one of them",
        ),
        (
            search("--objective", "banana"),
            "--objective: got 'banana'; it is one of perplexity, needle, both; choose one of them",
        ),
        (search("--space", "banana"), "--space: got 'banana'; it is one of longrope, longrope2; choose one of them"),
        (
            search("--needle-depth", "banana"),
            "--needle-depth: got 'banana'; it is one of start, spread; choose one of them",
        ),
        (search("--needle-digits", 0), "--needle-digits: got 0; a number has 1 to 18 of them; use 7 as in LongRoPE2"),
        (
            search("--race"),
            "--race: got --method hybrid; it is a choice of evolution; hybrid always races; leave it out",
        ),
        (search("--hours", 0), "--hours: got 0.0; it is a number above 0; give a larger number"),
        (search("--hours", "nan"), "--hours: got nan; it is a number above 0; give a larger number"),
        (
            search("--token-passes", 10),
            "--token-passes: got 10; one evaluation of all search windows takes 384; "
            "give at least 384, or fewer --windows",
        ),
        (
            search("--token-passes", "abc"),
            "--token-passes: got 'abc'; it is a positive whole number, with k for 1024 or m for 1024k; "
            "write it like 500000, 900k or 4m",
        ),
        (
            search("--workers", 0),
            "--workers: got '0'; it is a number of at least 1, ray, or ray:HOST:PORT of a cluster started with "
            "`ray start`; give one of them, or leave it out to search in one process",
        ),
        (
            search("--init", "good.json", "--space", "longrope2"),
            "--init: got small with 8 rescale factors from 1 to 4; a seed has 8 of them within 4 and 8 from a pair of "
            "1 to 3 on, and NTK's below it; give factors of this model for a ratio of at most this search's",
        ),
        (
            search("--init", "good.json", to=2 * ORIGINAL),
            "--init: got small with 8 rescale factors from 1 to 4; a seed has 8 of them within 1 and 3; "
            "give factors of this model for a ratio of at most this search's",
        ),
        (
            search("--dtype", "int8"),
            "--dtype: got 'int8'; it is one of auto, autocast, float32, bfloat16, float16; choose one of them",
        ),
        (
            search("--rope-precision", "x"),
            "--rope-precision: got 'x'; it is one of float32, float64; choose one of them",
        ),
        (search("--original-length", ""), f"length: got ''; {LENGTH_RULE}"),
        (search("--original-length", "x"), f"length: got 'x'; {LENGTH_RULE}"),
        (compare("--methods", "none,banana"), f"method: got 'banana'; {METHODS_RULE}"),
        (compare("--methods", "pi+banana"), f"method: got 'pi+banana'; {METHODS_RULE}"),
        (compare("--methods", ""), f"method: got ''; {METHODS_RULE}"),
        (compare(lengths=1), "length: got 1 token; a window is of at least 2 tokens; ask for a longer one"),
        (
            perplexity("--stride", TARGET, "--out", "run"),
            "--stride: got 192; a stride is between 1 and the window of 192 tokens less one; "
            "use 256 as in the papers, or a smaller one",
        ),
        (
            passkey("--out", "run", lengths="20,192"),
            "passkey: got a window of 20 tokens; the prompt without filler takes 104; measure at 104 tokens or more",
        ),
        (
            ["export", "model", "--out", "x", "--engine", "banana"],
            "--engine: got 'banana'; it is one of transformers, vllm, sglang, mlx, gguf; choose one of them",
        ),
        (
            ["export", "model", "--out", "x", "-f", "good.json", "--window", "banana"],
            "--window: got 'banana'; it is one of dynamic, long, short; choose one of them",
        ),
        (
            ["factors", "good.json", "--to", "banana"],
            "--to: got 'banana'; it is json, transformers or csv; choose one of them",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_bad_usage_is_told_in_one_line(command: list[object], message: str) -> None:
    assert refused(*command) == message


@pytest.mark.usefixtures("here")
def test_a_window_that_no_needle_fits_into_is_refused_with_the_length_that_it_takes() -> None:
    message = refused(*search("--objective", "needle", to=64))
    told = (
        r"--objective: got a window of 64 tokens; the needle's prompt without a document takes (\d+); "
        r"search at (\d+) tokens or more, or with the perplexity objective"
    )
    match = re.fullmatch(told, message)
    assert match, message
    assert int(match[2]) == int(match[1]) + 2
    assert longrope(*search("--objective", "needle", "--evaluations", SOME, to=match[2])).code == 0


@pytest.mark.usefixtures("here")
def test_an_argument_too_many_is_refused() -> None:
    message = refused(*search("more"))
    assert message.startswith("Got unexpected extra argument")
    assert message.endswith(" (more); see longrope search --help")


@pytest.mark.parametrize("value", ["x", "-1", str(TARGET), "1.5", ""])
@pytest.mark.usefixtures("here")
def test_start_tokens_that_make_no_sense_are_refused(value: str) -> None:
    rule = "it is a number of tokens below the target, or search; give 0, a number or search"
    assert refused(*search("--start-tokens", value)) == f"--start-tokens: got {value!r}; {rule}"


@pytest.mark.parametrize("value", ["x", "0", "-1", "nan", "inf", ""])
@pytest.mark.usefixtures("here")
def test_an_attention_factor_that_makes_no_sense_is_refused(value: str) -> None:
    rule = "it is su, yarn, none, search or a positive number; choose one of them"
    assert refused(*search("--attention-factor", value)) == f"--attention-factor: got {value!r}; {rule}"


@pytest.mark.parametrize("option", ["--evaluations", "--windows", "--seed"])
@pytest.mark.parametrize("value", ["-1", "x", "1.5"])
@pytest.mark.usefixtures("here")
def test_a_number_that_is_none_or_too_small_is_refused_with_its_option(option: str, value: str) -> None:
    message = refused(*search(option, value))
    assert message.startswith(f"Invalid value for '{option}': ")
    assert repr(value) in message
    assert message.endswith("; see longrope search --help")


@pytest.mark.usefixtures("here")
def test_a_tilde_behind_an_equals_sign_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shells do it where it begins a word; else a folder of that name is made, which nobody dares to remove."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert longrope("factors", "good.json", "--to", "json", "--out=~/copy.json").code == 0
    assert (tmp_path / "home" / "copy.json").read_bytes() == Path("good.json").read_bytes()
    assert not Path("~").exists()
    ran = longrope("factors", "~/copy.json")
    assert "~/copy.json, which does not exist" in ran.err, "a word that begins with it is the shell's own to expand"


@pytest.mark.usefixtures("here")
def test_factors_of_a_folder_are_those_in_it() -> None:
    Path("made").mkdir()
    shutil.copy("good.json", "made/factors.json")
    assert longrope("factors", "made", "--to", "csv").out == longrope("factors", "good.json", "--to", "csv").out


# Documents that are refused


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "empty.txt",
            b"",
            "got 'empty.txt', which is empty; a document holds at least some text; give documents with text",
        ),
        (
            "blank.txt",
            b" \n",
            "got 'blank.txt', which is empty; a document holds at least some text; give documents with text",
        ),
        (
            "binary.txt",
            b"\x00\x01" * 99,
            "got 'binary.txt', which is binary (it holds a zero byte); a document is text in UTF-8; "
            "convert it, or take it out",
        ),
        (
            "latin.txt",
            b"\xe9" * 99,
            "got 'latin.txt', which is not UTF-8; a document is text in UTF-8; convert it, or take it out",
        ),
        (
            "paper.pdf",
            b"%PDF",
            "got 'paper.pdf'; a document is .txt, .jsonl, .jsonl.gz or .parquet; convert it, or give another file",
        ),
        ("missing.txt", None, f"got 'missing.txt', which does not exist; {DOCUMENTS_RULE}"),
        ("no*.txt", None, f"got 'no*.txt', which does not exist; {DOCUMENTS_RULE}"),
        ("", None, f"got '', which does not exist; {DOCUMENTS_RULE}"),
    ],
)
def test_documents_that_cannot_be_read_are_refused(here: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (here / name).write_bytes(data)
    for command in (search(documents=name), search("--unseen", name), ["documents", name], compare("-d", name)):
        assert refused(*command) == f"documents: {message}"


def test_a_text_that_is_there_with_a_prompt_too_is_measured_once_by_a_stride(here: Path) -> None:
    text = "The quick brown fox says something. " * 20
    rows = [{"text": text}, {"prompt": text[:50], "completion": text[50:]}, {"text": text[::-1]}]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ran = longrope("evaluate", "perplexity", "model", "--lengths", 96, "--stride", 48, "-d", "rows.jsonl", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["results"][0]["tokens"] == 2 * len(text), "two texts, each token but BOS"


def test_documents_says_what_it_leaves_out(here: Path) -> None:
    folder = here / "mixed"
    folder.mkdir()
    for name, text in (("a.txt", "One."), ("b.txt", "One."), ("c.txt", " "), ("d.md", "Two."), ("e.csv", "3")):
        (folder / name).write_text(text)
    told = longrope("documents", "mixed", "--json")
    assert told.document["left_out"] == {"empty": 1, "repeated": 1, "files of other kinds": 2}
    assert "left out: 1 empty, 1 repeated, 2 files of other kinds\n" in told.err
    assert "left out" not in longrope("documents", "texts").err


def test_too_short_documents_are_refused_with_what_was_found(here: Path) -> None:
    (here / "short.txt").write_text("twelve bytes")
    message = (
        "documents: got 1 document, the longest of 12 tokens, which hold 0 windows of 192 tokens; wanted: 2 windows; "
        "give longer or more documents, or ask for shorter or fewer windows"
    )
    assert refused(*search(documents="short.txt")) == message
    assert refused(*search("--unseen", "short.txt")) == message


@pytest.mark.usefixtures("here")
def test_more_windows_than_the_documents_hold_are_refused() -> None:
    assert refused(*compare("--windows", 43)) == (
        "documents: got 6 documents, the longest of 1500 tokens, which hold 42 windows of 192 tokens; "
        "wanted: 43 windows; give longer or more documents, or ask for shorter or fewer windows"
    )


# Factors that are refused


def changed(**keys: Any) -> str:
    return json.dumps(table().to_dict() | keys)


def with_last(value: float) -> str:
    data = table().to_dict()
    data["table"][1]["rescale"][7] = value
    return json.dumps(data)


def shorter() -> str:
    data = table().to_dict()
    del data["table"][1]["rescale"][7]
    return json.dumps(data)


CORRECT = "correct the file or search again"
SEARCHED = "give the factors that were searched for this model"
BAD_FACTORS = [
    (changed(format="other"), f"factors: format: got format 'other'; it is \"longrope-factors\"; {CORRECT}"),
    (
        changed(version=2),
        "factors file: got version 2; this longrope reads version 1; use the longrope that wrote it, or search again",
    ),
    (shorter(), f"factors: rescale: got 7 numbers; rotary_dim 16 has 8 pairs; {CORRECT}"),
    (with_last(math.nan), f"factors: rescale[7]: got nan; it is a finite, positive number; {CORRECT}"),
    (with_last(math.inf), f"factors: rescale[7]: got inf; it is a finite, positive number; {CORRECT}"),
    (with_last(-1.0), f"factors: rescale[7]: got -1.0; it is a finite, positive number; {CORRECT}"),
    (with_last(0.0), f"factors: rescale[7]: got 0.0; it is a finite, positive number; {CORRECT}"),
    (changed(table=[]), f"factors: table: got no rows; it has at least one row; {CORRECT}"),
    (
        changed(rope_theta=10000.0),
        f"factors: got rope_theta 10000; the model has rope_theta 500; {SEARCHED}",
    ),
    (
        json.dumps(table(shape=RopeShape(500.0, 32, ORIGINAL)).to_dict()),
        f"factors: got rotary_dim 32; the model has rotary_dim 16; {SEARCHED}",
    ),
    (
        changed(original_length=64),
        f"factors: got original_length 64; the model has original_length 48; {SEARCHED}, or --original-length",
    ),
    ("[1]", f'factors: format: got list; it is "longrope-factors"; {CORRECT}'),
    ('{"format": ', "factors file: got f.json (REASON); it is JSON; restore the file or make it again"),
    (
        "",
        "factors file: got f.json, which is empty; it is a factors.json, a config.json or a CSV of factors; "
        "restore the file or make it again",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_FACTORS)
def test_factors_that_are_none_or_another_models_are_refused(here: Path, text: str, message: str) -> None:
    (here / "f.json").write_text(text)
    given = ("--factors", "f.json")
    export = ["export", "model", *given, "--out", "exported"]
    for command in (compare(*given), perplexity(*given), passkey(*given), search("--init", "f.json"), export):
        assert re.sub(r"\(.*\)", "(REASON)", refused(*command)) == message


def test_factors_that_are_not_there_are_refused(here: Path) -> None:
    (here / "empty").mkdir()
    rule = "it is a file; check the path"
    assert refused(*compare("-f", "f.json")) == f"factors file: got f.json, which does not exist; {rule}"
    assert refused(*compare("-f", "empty")) == f"factors file: got empty/factors.json, which does not exist; {rule}"
    assert refused(*search("--init", "empty")) == f"factors file: got empty/factors.json, which does not exist; {rule}"


@pytest.mark.usefixtures("here")
def test_a_length_beyond_the_factors_is_refused() -> None:
    message = (
        "sequence: got 193 tokens; the factor table ends at 192; "
        "use at most 192 tokens, or search factors for a longer target"
    )
    for command in (perplexity, passkey, compare):
        assert refused(*command("-f", "good.json", lengths=TARGET + 1)) == message


@pytest.mark.usefixtures("here")
def test_two_tables_where_one_is_used_and_none_where_one_is_needed_are_refused() -> None:
    twice = ("-f", "good.json", "-f", "good.json")
    assert refused(*perplexity(*twice)) == "--factors: got 2 files; one table is used here; give one"
    assert refused("export", "model", "--out", "x") == (
        "--factors: got none, and no factors.json in model; an export needs factors; give a run"
    )


# Places that are refused


def test_an_output_folder_that_is_not_ours_is_refused_and_left_alone(here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    for command in (search, compare):
        assert refused(*command("--out", "good.json")) == (
            "--out: got good.json, a file; a run is a folder; choose another --out"
        )
        assert refused(*command("--out", "full")) == (
            "--out: got full, which has mine.txt; the output folder holds other files and no run; "
            "choose another --out or an empty folder"
        )
        assert refused(*command("--out", "model")).startswith(
            "--out: got model, which has config.json, generation_config"
        )
    rule = "an export is a new folder; choose another"
    for out in ("full", "good.json", "model"):
        message = refused("export", "model", "-f", "good.json", "--out", out)
        why = "a file" if out == "good.json" else "not empty"
        assert message == f"--out: got {here / out}, which is {why}; {rule}"


@pytest.mark.usefixtures("here")
def test_a_place_that_takes_no_files_is_refused() -> None:
    rule = "the folder above it must exist and take new files; choose a folder that can be written to"
    for out, reason in (("/proc/none", "No such file or directory"), ("good.json/sub", "Not a directory")):
        message = f"output: got {out} ({reason}); {rule}"
        assert refused(*search("--out", out)) == message
        assert refused(*compare("--out", out)) == message
    message = refused("export", "model", "-f", "good.json", "--out", "/proc/none/x")
    assert message == f"output: got /proc/none/x (No such file or directory); {rule}"
    message = refused("factors", "good.json", "--out", "/proc/none")
    assert message == f"output: got /proc/none (No such file or directory); {rule}"


def test_a_run_with_other_settings_and_a_run_of_another_command_are_refused_and_kept(here: Path) -> None:
    assert longrope(*search("--evaluations", SOME, "--out", "run")).code == 0
    rule = "a run is continued with its own settings, only a budget may grow; choose another --out"
    assert refused(*search("--evaluations", SOME, "--out", "run", "--seed", 1)).endswith(rule)
    assert refused(*search("--evaluations", 3, "--out", "run")) == (
        f"--out: got run, a run where settings.evaluations was {SOME}, now 3; {rule}"
    )
    message = refused(*search("--evaluations", SOME, "--out", "run", "--attention-factor", "yarn"))
    assert message == f'--out: got run, a run where settings.attention_factor was "search", now "yarn"; {rule}'
    message = refused(*compare("--out", "run"))
    assert message.startswith('--out: got run, a run where command was "search", now "compare"; ')
    assert (here / "run" / "DONE").exists()


@pytest.mark.parametrize("more", [(), ("--method", "evolution"), ("--objective", "needle")])
def test_a_search_resumed_on_other_documents_or_another_model_is_refused_and_left_as_it_was(
    here: Path, more: tuple[str, ...]
) -> None:
    command = search("--evaluations", SOME, "--out", "run", *more)
    assert longrope(*command).code == 0
    (here / "run" / "DONE").unlink()
    shutil.copytree("texts", "kept")
    for path in (here / "texts").iterdir():
        path.write_text(path.read_text().replace("e", "E"))
    assert re.fullmatch(
        r'--out: got run, a run where (documents\.search\.0\.\w+ was .*, now .*|windows was "sha256:\w+\.*, now .*); '
        "a run is continued with its own settings, only a budget may grow; choose another --out",
        refused(*command),
    )
    shutil.rmtree("texts")
    (here / "kept").rename(here / "texts")
    weights = here / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # the last weight, a little
    weights.write_bytes(data)
    assert re.fullmatch(
        r"--out: got run, a run where model\.fingerprint was .*, now .*; "
        "a run is continued with its own settings, only a budget may grow; choose another --out",
        refused(*command),
    )
    data[-1] ^= 1
    weights.write_bytes(data)
    assert longrope(*command).code == 0


# What is printed


def test_the_version_and_help_go_to_stdout() -> None:
    assert longrope("--version").out == f"longrope {__version__}\n"
    assert longrope("--version").code == 0
    for arguments in ([], ["--help"], ["-h"]):
        ran = longrope(*arguments)
        assert (ran.code, ran.err) == (0, "")
        for command in ("demo", "documents", "search", "compare", "factors", "export", "report", "watch", "evaluate"):
            assert f"\n  {command} " in ran.out


def test_help_of_every_command_imports_no_torch() -> None:
    code = """
import sys
from longrope.cli import app, run
names = [[each.name or each.callback.__name__] for each in app.registered_commands]
for group in app.registered_groups:
    names += [[group.name, each.name] for each in group.typer_instance.registered_commands]
codes = [run([*name, "--help"]) for name in names]
print(len(names), set(codes), sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "21 {0} []"
    assert done.stderr == ""


def is_standard(document: Any, command: str, model: str | None) -> bool:
    """Whether a JSON document has the shape that every command's has."""
    results = {"method", "length", "value", "tokens", "ci"}
    return (
        document["command"] == command
        and document["model"] == model
        and isinstance(document["settings"], dict)
        and all(results <= set(result) for result in document["results"])
    )


@pytest.mark.usefixtures("here")
def test_json_is_one_document_of_one_shape_on_stdout() -> None:
    commands: list[tuple[list[object], str, str | None]] = [
        (search("--evaluations", SOME, "--unseen", "others"), "search", "model"),
        (compare("--methods", "none,pi", "-f", "good.json"), "compare", "model"),
        (perplexity("-f", "good.json"), "evaluate perplexity", "model"),
        (passkey("-f", "good.json"), "evaluate passkey", "model"),
        (["documents", "texts", "--model", "model"], "documents", "model"),
        (["factors", "good.json"], "factors", "small"),
    ]
    for command, name, model in commands:
        ran = longrope(*command, "--json", "-q")
        assert (ran.code, ran.err) == (0, ""), command
        assert is_standard(ran.document, name, model), ran.out
        if name != "factors":
            assert ran.document["results"], command


@pytest.mark.usefixtures("here")
def test_json_of_a_search_measures_it_beside_the_baselines_on_both_kinds_of_windows() -> None:
    document = longrope(*search("--evaluations", SOME, "--unseen", "others", "--json")).document
    methods = ["pi", "ntk", "yarn", "yarn+su", "llama3+su", "longrope"]
    measured = [(result["windows"], result["method"], result["length"]) for result in document["results"]]
    assert measured == [(kind, method, TARGET) for kind in ("search", "unseen") for method in methods]
    assert {result["tokens"] for result in document["results"]} == {2 * (TARGET - 1)}


@pytest.mark.usefixtures("here")
def test_without_json_results_go_to_stderr_and_stdout_stays_empty() -> None:
    commands: list[tuple[list[object], str]] = [
        (search("--evaluations", SOME), "perplexity, search windows"),
        (compare(), "perplexity, methods set up for 192"),
        (perplexity(), "perplexity"),
        (passkey(), "passkey"),
        (["documents", "texts"], "6 documents, 9,000 tokens, the longest 1,500"),
        (["factors", "good.json"], "small: base 500, 16 rotary dimensions"),
    ]
    for command, shown in commands:
        ran = longrope(*command)
        assert (ran.code, ran.out) == (0, "")
        assert shown in ran.err


@pytest.mark.usefixtures("here")
def test_quiet_shows_no_progress_and_the_default_does() -> None:
    loud = longrope(*search("--evaluations", SOME, "--out", "loud"))
    quiet = longrope(*search("--evaluations", SOME, "--out", "quiet", "-q"))
    line = r"^(\w+), round \d+: best \d+\.\d{4}, \d+\.\d\d evaluations/s, 0:00:0\d left, ([\d.]+)/10$"
    told = re.findall(line, loud.err, re.MULTILINE)
    assert [stage for stage, _ in told][:1] == ["seeds"]
    spent = told[-1][1]
    assert re.search(rf"^search +{spent} evaluations of 10 *$", longrope("watch", "loud", "--once").err, re.MULTILINE)
    assert evaluations_text(read_run(Path("loud"))) == f"{spent} evaluations", "as the page has it"
    assert [float(done) for _, done in told] == sorted(float(done) for _, done in told)
    cost = r"^cost: up to 10 evaluations of 384 tokens, 3,840 token-passes; one takes .* s, all about 0:00:0\d"
    assert len(re.findall(cost, loud.err, re.MULTILINE)) == 1
    assert "evaluations" not in quiet.err
    assert "perplexity, search windows" in quiet.err


@pytest.mark.usefixtures("here")
def test_measurements_are_told_one_by_one_with_how_many_there_are() -> None:
    def told(*command: object) -> list[str]:
        return [line for line in longrope(*command).err.splitlines() if line.startswith("measuring ")]

    command = compare("--methods", "none,pi", "-f", "good.json", lengths="96,192")
    names = [f"{method} at {length}" for length in (96, 192) for method in ("none", "pi", "good")]
    lines = told(*command, "--out", "run")
    assert lines[0] == f"measuring {names[0]}, 0/12", "two windows of each"
    left = r", \d:\d\d:\d\d left"
    for n, (line, name) in enumerate(zip(lines, names, strict=True)):
        assert re.fullmatch(rf"measuring {name}{left if n else ''}, {2 * n}/12", line)
    assert told(*command, "--out", "quiet", "-q") == []
    first, second = told(*passkey(lengths="128,192"))
    assert first == "measuring none at 128, 0/6"
    assert re.fullmatch(rf"measuring none at 192{left}, 3/6", second)
    assert told(*perplexity("-q")) == []


def test_where_there_is_no_terminal_many_items_share_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="longrope"), measuring_progress(quiet=False) as on_step:
        assert on_step is not None
        for done in range(500):
            on_step(Step(done, 1000, "pi", 4096, 1000.0 - done))
        on_step(Step(500, 1000, "yarn", 4096, 500.0))
    assert caplog.messages[:2] == [
        "measuring pi at 4k, 0:16:40 left, 0/1000",
        "measuring pi at 4k, 0:16:20 left, 20/1000",
    ]
    assert len(caplog.messages) == 26
    assert caplog.messages[-1] == "measuring yarn at 4k, 0:08:20 left, 500/1000"


def progress(done: float, iteration: int, rate: float, origin: str = "mutation") -> Progress:
    return Progress(done=done, total=1000, iteration=iteration, best=9.5, rate=rate, origin=origin)


def test_time_left_is_what_is_to_do_by_the_rate() -> None:
    shown = "evolution, round 3: best 9.5000, 0.05 evaluations/s, 4:10:00 left"
    assert describe_progress(progress(250, 3, 0.05)) == shown
    assert describe_progress(progress(250, 3, 0.0)).endswith("0.00 evaluations/s, - left")
    assert format_seconds(100 * 3600 + 61.6) == "100:01:02"


@pytest.mark.parametrize(
    ("origin", "stage"),
    [
        ("pi", "seeds"),
        ("llama3+su", "seeds"),
        ("init+own", "seeds"),
        ("ntk-12+none", "seeds"),
        ("descent from llama3+su", "descent"),
        ("descent from llama3+su check", "descent"),
        ("start tokens", "start tokens"),
        ("polish", "polish"),
        ("mutation", "evolution"),
        ("crossover", "evolution"),
    ],
)
def test_progress_names_the_stage_of_every_origin(origin: str, stage: str) -> None:
    assert describe_progress(progress(250, 3, 1.0, origin)).startswith(f"{stage}, round 3: ")


def test_where_there_is_no_terminal_a_round_that_is_evaluated_here_has_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="longrope"), search_progress(quiet=False) as on_progress:
        assert on_progress is not None
        on_progress(progress(64, 0, 0.0))
        on_progress(progress(80, 1, 0.0))
        on_progress(progress(95, 1, 1.0))
        on_progress(progress(96, 1, 1.0, "crossover"))
        on_progress(progress(99.9, 2, 1.0))
    assert caplog.messages == [
        "evolution, round 1: best 9.5000, 1.00 evaluations/s, 0:15:04 left, 96/1000",
        "evolution, round 2: best 9.5000, 1.00 evaluations/s, 0:15:00 left, 99.9/1000",
    ]


def test_rounds_that_are_small_share_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="longrope"), search_progress(quiet=False) as on_progress:
        assert on_progress is not None
        for step in range(12):
            on_progress(progress(5 * step, step, 1.0, "descent from yarn+su"))
    assert [message.rpartition(" ")[2] for message in caplog.messages] == ["20/1000", "40/1000", "55/1000"]


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("longrope.console.err", terminal)
    with search_progress(quiet=False) as on_progress:
        assert on_progress is not None
        on_progress(progress(250, 3, 0.05))
    with measuring_progress(quiet=False) as on_step:
        assert on_step is not None
        on_step(Step(3, 7, "yarn", 4096))
    with search_progress(quiet=False):
        pass  # a search refused before its first candidate
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue())  # type: ignore[attr-defined]
    assert "0.05 evaluations/s, 4:10:00 left" in shown
    assert re.search(r"yarn at 4k .* 3/7", shown)
    assert not terminal._live_stack


@pytest.mark.usefixtures("here")
def test_a_perplexity_that_is_no_number_is_null() -> None:
    last = table().rows[-1].with_values(attention_factor=1e30)
    replace(table(), rows=(table().rows[0], last)).save(Path("wild.json"))
    for more in ((), ("--out", "run")):
        (result,) = longrope(*perplexity("-f", "wild.json", "--json", *more)).document["results"]
        assert (result["value"], result["ci"]) == (None, None)


@pytest.mark.usefixtures("here")
def test_factors_are_converted_to_stdout_or_to_a_file() -> None:
    assert json.loads(longrope("factors", "good.json", "--to", "json").out) == table().to_dict()
    assert longrope("factors", "good.json", "--to", "json", "--out", "copy.json").out == ""
    assert Path("copy.json").read_bytes() == Path("good.json").read_bytes()
    assert longrope("factors", "good.json", "--json").document["factors"] == table().to_dict()
    assert longrope("factors", "good.json", "--to", "csv").out.startswith("name,model,finetuned_length")


@pytest.mark.usefixtures("here")
def test_documents_are_counted_as_the_models_tokenizer_cuts_them() -> None:
    document = longrope("documents", "texts", "--model", "model", "--lengths", "192,1500,1501", "--json").document
    assert (document["documents"], document["tokens"], document["longest"]) == (6, 9000, 1500)
    counted = [(result["length"], result["value"]) for result in document["results"]]
    assert counted == [(192, 42), (1500, 6), (1501, 6)], "BOS and 1,500 tokens"
    found = longrope(*compare("--methods", "none", "--windows", 6, "--json", lengths=1501)).document
    assert found["results"][0]["tokens"] == 6 * 1500


@pytest.mark.usefixtures("here")
def test_what_commands_use_of_stdlib_is_told_beside_what_it_holds() -> None:
    from longrope.documents import read_sources

    ran = longrope("documents", "stdlib", "--model", "model", "--json")
    searched, unseen = (len(read_sources(["stdlib"], share=share)) for share in ("search", "unseen"))
    assert ran.err.startswith("left out: "), "empty modules, and equal ones"
    assert ran.err.splitlines(keepends=True)[1:] == [
        f"of stdlib, a search uses {searched} documents, and --unseen, compare and evaluate {unseen} others; "
        "all are counted\n"
    ]
    assert ran.document["documents"] > searched + unseen > 10


def test_stdout_on_a_full_disk_is_told_in_one_line(here: Path) -> None:
    with open("/dev/full", "w") as full:
        ran = longrope_process("factors", "good.json", "--json", cwd=here, stdout=full)
    rule = "the disk must have room for it; free some space, then run the same command again"
    assert ran.err == f"longrope: output: got /dev/stdout (No space left on device); {rule}\n"
    assert ran.code == 2


def test_a_demonstration_ends_in_a_report_and_a_checkpoint_and_says_when_it_is_finished(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longrope import demo

    monkeypatch.setattr(demo, "SEARCH_WINDOWS", 1)
    monkeypatch.setattr(demo, "UNSEEN_WINDOWS", 1)
    monkeypatch.setattr(demo, "METHODS", ("yarn",))
    write_documents_to(here / "more", count=1, characters=20_000)
    command = ["demo", "-d", "more", "--evaluations", 2, "--out", "story", "--dtype", "float32", "--json", "-q"]
    first = longrope(*command)
    assert first.code == 0
    assert is_standard(first.document, "demo", "tiny")
    lengths = [256, 512, 1024, 2048]
    methods = [(result["method"], result["length"]) for result in first.document["results"]]
    assert methods == [(method, length) for length in lengths for method in ("yarn", "longrope")]
    assert first.document["logit_gap"] < 1e-5
    assert {"report.html", "checkpoint", "DONE"} <= {path.name for path in (here / "story").iterdir()}
    before = contents(here / "story")
    again = longrope(*command)
    assert (again.code, again.out, contents(here / "story")) == (0, first.out, before)


# Names of tables


def test_tables_are_named_by_file_or_folder_and_never_share_a_name(here: Path) -> None:
    (here / "runs" / "best").mkdir(parents=True)
    for place in ("runs/best/factors.json", "yarn.json", "a.json"):
        table().save(here / place)
    (here / "other").mkdir()
    shutil.copy("a.json", "other/a.json")
    files = ["runs/best", "runs/best/factors.json", "yarn.json", "a.json", "other/a.json"]
    given = [word for file in files for word in ("-f", file)]
    document = longrope(*compare("--methods", "yarn", *given, "--json")).document
    names = [result["method"] for result in document["results"]]
    assert names == ["yarn", "best", "best-2", "yarn-2", "a", "a-2"]
    values = {result["value"] for result in document["results"]}
    assert len(values) == 1, "all of them are YaRN's factors"


def test_the_checkpoints_own_factors_are_used_replaced_or_ignored(here: Path) -> None:
    from longrope.baselines import baseline

    own = FactorTable(500.0, 16, ORIGINAL, (baseline("pi", SHAPE, TARGET),))
    own.save(here / "model" / "factors.json")
    stock = compare("--methods", "none,pi,yarn", "--json", "--out")

    def measured(out: str, *more: str) -> dict[str, float]:
        document = longrope(*stock, out, *more).document
        return {result["method"]: result["value"] for result in document["results"]}

    own_values, ignored, replaced = (
        measured("own"),
        measured("ignored", "-f", "none"),
        measured("replaced", "-f", "good.json"),
    )
    assert own_values["checkpoint"] == own_values["pi"] != own_values["none"]
    assert set(ignored) == {"none", "pi", "yarn"}
    assert replaced["good"] == replaced["yarn"]
    assert "checkpoint" not in replaced

    def value(*more: str) -> float:
        return float(longrope(*perplexity("--json", *more)).document["results"][0]["value"])

    assert value() == own_values["pi"]
    assert value("-f", "none") == own_values["none"]
    assert value("-f", "good.json") == own_values["yarn"]


@pytest.mark.parametrize("text", ['{"format": ', changed(original_length=64), changed(rope_theta=1.0)])
def test_a_table_beside_the_weights_that_is_ignored_is_not_even_read(here: Path, text: str) -> None:
    commands = {
        "compare": compare("--methods", "none,pi", "--json", "--out"),
        "perplexity": perplexity("--json", "--out"),
        "passkey": passkey("--json", "--out"),
        "search": search("--evaluations", SOME, "--json", "--out"),
    }
    without = {name: longrope(*command, f"{name}-without").document for name, command in commands.items()}
    (here / "model" / "factors.json").write_text(text)
    for name, command in commands.items():
        assert longrope(*command, name, "--factors", "none").document["results"] == without[name]["results"]


@pytest.mark.usefixtures("here")
def test_a_search_takes_no_factors_but_none() -> None:
    message = "--factors: got 'good.json'; a search takes only none here; give it as --init"
    assert refused(*search("--factors", "good.json")) == message


# The run folder of a search


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "elapsed", "crc")} for line in lines(run)
    ]


KEYS = [
    "index",
    "iteration",
    "origin",
    "key",
    "rescale",
    "start_tokens",
    "attention_factor",
    "windows",
    "value",
    "elapsed",
]


def test_an_evolution_leaves_a_run_folder_of_just_these_files(here: Path) -> None:
    assert longrope(*evolution("--evaluations", 70)).code == 0
    run = here / "runs" / "search-model-192"
    names = {"config.json", "evaluations.jsonl", "factors.json", "metrics.json", "results.jsonl", "DONE", ".lock"}
    assert {path.name for path in run.iterdir()} == names
    assert set(json.loads((run / "DONE").read_text())["sha256"]) == names - {"DONE", ".lock"}

    config = json.loads((run / "config.json").read_text())
    assert set(config) == {"command", "longrope", "model", "settings", "documents", "windows", "ignored", "crc"}
    assert config["model"]["original_length"] == ORIGINAL
    assert config["settings"]["to"] == TARGET
    assert [set(window) for window in config["documents"]["search"]] == [{"name", "sha256", "start"}] * 2
    assert "rope" not in json.dumps(config["documents"]), "a run holds no text"

    evaluations = lines(run)
    assert [list(line) for line in evaluations] == [[*KEYS, "losses", "tokens", "seconds", "crc"]] * 70
    assert [line["index"] for line in evaluations] == list(range(70))
    assert [line["iteration"] for line in evaluations] == [0] * 64 + [1] * 6
    assert len({line["key"] for line in evaluations}) == 70
    assert {line["tokens"] for line in evaluations} == {2 * TARGET}
    assert [line["windows"] for line in evaluations] == [[0, 1]] * 70
    for line in evaluations:
        assert line["value"] == pytest.approx(math.exp(sum(line["losses"]) / (2 * (TARGET - 1))), rel=1e-12)
    is_what_a_search_found(run, evaluations)


def is_what_a_search_found(run: Path, complete: list[dict[str, Any]]) -> None:
    """factors.json has the best of these lines, and its measurement the same value."""
    factors = json.loads((run / "factors.json").read_text())
    short, long = factors["table"]
    assert short == {"up_to": ORIGINAL, "rescale": [1.0] * 8, "start_tokens": 0, "attention_factor": 1.0}
    best = min(complete, key=lambda line: float(line["value"]))
    assert long == {"up_to": TARGET} | {key: best[key] for key in ("rescale", "start_tokens", "attention_factor")}
    assert (np.diff(long["rescale"]) >= 0).all()
    assert factors["provenance"]["value"] == best["value"]
    results = json.loads((run / "metrics.json").read_text())["results"]
    found = next(result for result in results if result["method"] == "longrope")
    assert found["value"] == pytest.approx(best["value"], rel=1e-6)


def test_a_search_by_default_is_hybrid_and_writes_a_line_a_task(here: Path) -> None:
    from longrope.report.plots import plots_of
    from longrope.report.read import read_run

    assert longrope(*search("--out", "run")).code == 0
    evaluations = lines(here / "run")
    assert [line["index"] for line in evaluations] == list(range(len(evaluations)))
    steps = [line for line in evaluations if "gradient" in line]
    tried = [line for line in evaluations if "gradient" not in line]
    assert len(steps) >= 8
    for line in evaluations:
        size = len(line["windows"])
        assert len(line["losses"]) == size
        assert line["tokens"] == size * TARGET * (3 if "gradient" in line else 1)
    assert {len(line["gradient"]) for line in steps} == {8 + 1}
    assert {line["value"] for line in steps} == {None}
    assert all(set(line["windows"]) <= {0, 1} for line in tried)
    assert all(min(line["windows"]) >= 2 for line in steps), "gradients have windows of their own"

    losses: dict[str, dict[int, float]] = {}  # of each candidate, by window
    for line in tried:
        known = losses.setdefault(str([line[key] for key in KEYS[4:7]]), {})
        known |= dict(zip(line["windows"], line["losses"], strict=True))
        if line["value"] is None:
            assert len(known) < 2, "only the line that completes a candidate has its value"
        else:
            assert line["value"] == pytest.approx(math.exp(sum(known.values()) / (2 * (TARGET - 1))), rel=1e-12)
    complete = [line for line in tried if line["value"] is not None and not line["origin"].endswith("unrounded")]
    is_what_a_search_found(here / "run", complete)
    seeds = [line["value"] for line in complete if line["iteration"] == 0 and "+" in line["origin"]]
    assert min(line["value"] for line in complete) < min(seeds)

    (plot,) = (plot for plot in plots_of([read_run(here / "run")]) if plot.name == "convergence")
    best = plot.figure["data"][-1]
    assert best["x"][-1] == sum(line["tokens"] for line in evaluations)
    assert best["y"][-1] == min(line["value"] for line in complete)
    assert {"seeds", "descent"} <= {trace["name"] for trace in plot.figure["data"]}


@pytest.mark.usefixtures("here")
def test_a_finished_search_says_so_and_evaluates_nothing() -> None:
    command = search("--evaluations", SOME, "--out", "run")
    first = longrope(*command, "--json")
    before = contents(Path("run"))
    again = longrope(*command, "--json")
    assert again.code == 0
    assert again.err == "run is finished: its factors are in run/factors.json\n"
    assert again.out == first.out
    assert contents(Path("run")) == before


@pytest.mark.usefixtures("here")
def test_a_finished_comparison_says_so_and_measures_nothing() -> None:
    command = compare("--methods", "none", "--out", "run", "--json")
    first = longrope(*command)
    again = longrope(*command)
    assert (again.code, again.out) == (0, first.out)
    assert again.err == "run is finished: its measurements are in run/metrics.json\n"


@pytest.mark.parametrize("method", ["evolution", "hybrid", "gradient"])
def test_a_larger_budget_continues_and_ends_like_a_search_with_that_budget(here: Path, method: str) -> None:
    given = ("--method", method)
    assert longrope(*search("--evaluations", 30, "--out", "grown", *given)).code == 0
    before = len(lines(here / "grown"))
    more = longrope(*search("--evaluations", 70, "--out", "grown", *given))
    assert f"resuming grown after {before} evaluations" in more.err
    assert longrope(*search("--evaluations", 70, "--out", "direct", *given)).code == 0
    assert without_seconds(here / "grown") == without_seconds(here / "direct")
    for name in ("factors.json", "metrics.json"):
        assert (here / "grown" / name).read_bytes() == (here / "direct" / name).read_bytes()


def test_a_limit_of_token_passes_is_that_of_evaluations_in_other_words(here: Path) -> None:
    assert longrope(*search("--token-passes", 20 * 2 * TARGET, "--out", "passes")).code == 0
    assert longrope(*search("--evaluations", 20, "--out", "evaluations")).code == 0
    assert without_seconds(here / "passes") == without_seconds(here / "evaluations")
    spent = sum(line["tokens"] for line in lines(here / "passes"))
    assert 19 * 2 * TARGET < spent <= 20 * 2 * TARGET


def mine() -> RopeFactors:
    """Factors that no baseline has, in mine.json."""
    last = table().rows[-1].with_values(rescale=tuple(np.linspace(1, 4, 8).round(2)))
    replace(table(), rows=(table().rows[0], last)).save(Path("mine.json"))
    return last


def test_an_evolution_starts_from_the_factors_it_is_given(here: Path) -> None:
    assert longrope(*evolution("--evaluations", 4, "--init", "good.json", "--out", "run")).code == 0
    assert [line["origin"] for line in lines(here / "run")] == ["pi", "ntk", "yarn", "mutation"], "YaRN, known already"
    given = mine()
    assert longrope(*evolution("--evaluations", 4, "--init", "mine.json", "--out", "mine")).code == 0
    assert lines(here / "mine")[3]["origin"] == "init"
    assert lines(here / "mine")[3]["rescale"] == list(given.rescale)


def test_a_search_tries_the_factors_it_is_given_with_every_attention_factor_and_their_own(here: Path) -> None:
    own = mine().attention_factor
    assert longrope(*search("--evaluations", 15, "--init", "mine.json", "--out", "run")).code == 0
    tried = {line["origin"]: line["attention_factor"] for line in lines(here / "run") if "init" in line["origin"]}
    su = math.sqrt(1 + math.log(TARGET / ORIGINAL) / math.log(ORIGINAL))
    assert tried == pytest.approx({"init+none": 1.0, "init+su": su, "init+yarn": own})


@pytest.mark.parametrize("method", ["evolution", "hybrid"])
def test_a_search_keeps_to_the_start_tokens_and_attention_factor_it_is_given(here: Path, method: str) -> None:
    given = ("--start-tokens", 4, "--attention-factor", "1.25", "--method", method)
    assert longrope(*search("--evaluations", 12, *given, "--out", "run")).code == 0
    assert {(line["start_tokens"], line["attention_factor"]) for line in lines(here / "run")} == {(4, 1.25)}
    assert longrope("report", "run").code == 0
    page = (here / "run" / "report.html").read_text()
    assert "<dt>Attention factor</dt><dd>not searched: 1.25</dd>" in page
