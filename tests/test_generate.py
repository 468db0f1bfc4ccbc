"""`longrope generate` and `longrope chat`, and the text that they write."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from commands import COMMAND, TARGET, longrope, table, write_checkpoint
from longrope.api import switched
from longrope.checkpoint import LoadOptions
from longrope.model import LoadedModel, load_model
from longrope.runtime.text import Conversation, Sampling, prompt_ids, write_text
from models import ORIGINAL

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
PROMPT = "The quick brown fox jumps over the lazy dog"  # 43 bytes and BOS: four tokens before the boundary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("ground") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    table().save(folder / "factors.json")
    return folder


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), LoadOptions(device="cpu", dtype="float32", threads=1))


def whole(loaded: LoadedModel, ids: list[int], new: int) -> list[int]:
    """Greedy tokens, each from a pass over the whole text under the row of its length."""
    ends = {loaded.tokenizer.eos_token_id}
    with loaded.patch() as patch:
        made: list[int] = []
        while len(made) < new and not ends & set(made):
            patch.install(table().row_for(len(ids) + len(made)))
            model: Any = loaded.model
            made.append(int(model(torch.tensor([[*ids, *made]]), use_cache=False).logits[0, -1].argmax()))
    return made


def test_generate_writes_what_passes_over_the_whole_text_would(folder: Path, loaded: LoadedModel) -> None:
    ids = prompt_ids(loaded.tokenizer, PROMPT)
    expected = whole(loaded, ids, 20)
    assert len(ids) < ORIGINAL < len(ids) + len(expected)
    options = ("--dtype", "float32", "--threads", 1, "-n", 20)
    done = longrope("generate", folder, "--prompt", PROMPT, *options, "--json")
    assert done.code == 0, done.err
    (result,) = done.document["results"]
    assert result["tokens"] == expected
    assert result["recomputed"] == ORIGINAL
    assert done.document["command"] == "generate"
    assert result["prompt"] == len(ids)
    plain = longrope("generate", folder, "-p", PROMPT, *options)
    assert plain.out == result["text"] + "\n"
    assert f"{len(ids)} tokens in" in plain.err
    assert f"; {ORIGINAL} run again at a boundary" in plain.err


def test_a_prompt_comes_from_a_file_or_standard_input_and_quiet_is_quiet(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    options = ("--dtype", "float32", "--threads", 1, "-n", 5, "-q")
    expected = longrope("generate", folder, "-p", PROMPT, *options)
    assert longrope("generate", folder, "--prompt-file", tmp_path / "prompt.txt", *options).out == expected.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert longrope("generate", folder, "--prompt-file", "-", *options).out == expected.out
    assert expected.err == ""


def test_a_byte_order_mark_is_no_part_of_a_prompt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT, "utf-8-sig")
    options = ("--dtype", "float32", "--threads", 1, "-n", 3, "--json")
    expected = longrope("generate", folder, "-p", PROMPT, *options).document["results"][0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff" + PROMPT))
    for file in (tmp_path / "prompt.txt", "-"):
        found = longrope("generate", folder, "--prompt-file", file, *options).document["results"][0]
        assert (found["prompt"], found["tokens"]) == (expected["prompt"], expected["tokens"])


@pytest.mark.parametrize("more", [("--chunk", 7), ("--cache", "quantized", "--chunk", 7), ("--policy", "ahead"),
                                  ("--policy", "fixed"), ("--temperature", 0.7, "--top-k", 5, "--top-p", 0.9),
                                  ("--beams", 2), ("--factors", "none"), ("--chat",)], ids=str)  # fmt: skip
def test_every_option_generates(folder: Path, more: tuple[object, ...]) -> None:
    new = 4 if "none" in more else 12
    prompt = PROMPT[:30] if "none" in more else PROMPT
    command = ("generate", folder, "-p", prompt, "--dtype", "float32", "--threads", 1, "-n", new, "--json", *more)
    done = longrope(*command)
    assert done.code == 0, done.err
    assert 1 <= len(done.document["results"][0]["tokens"]) <= new
    assert longrope(*command).document["results"][0]["tokens"] == done.document["results"][0]["tokens"]


def test_what_is_drawn_is_the_seeds_and_leaves_the_callers_generator_alone(loaded: LoadedModel) -> None:
    ids = prompt_ids(loaded.tokenizer, PROMPT)
    with switched(loaded, table()) as applied:
        torch.manual_seed(3)
        state = torch.random.get_rng_state()
        drawn = [
            write_text(loaded, applied, ids, new=16, sampling=Sampling(temperature=2.0, seed=seed)).tokens
            for seed in (0, 0, 1)
        ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "prompt: got neither; a text begins with one of --prompt and --prompt-file; give one of them"),
        (("-p", "a", "--prompt-file", "b"), "prompt: got both; "),
        (("--prompt-file", "missing"), "prompt: got missing; No such file or directory; "),
        (("-p", "a", "-n", TARGET), f"max_new_tokens: got {TARGET} tokens after a prompt of 2; the factor table ends "),
        (("-p", "a" * TARGET), f"sequence: got {TARGET + 2} tokens; the factor table ends at {TARGET}; "),
        (("-p", "a", "--policy", "x"), "policy: got 'x'; it is one of exact, ahead, fixed; "),
        (("-p", "a", "--cache", "x"), "--cache: got 'x'; it is one of device, offloaded, quantized; "),
        (("-p", "a", "--cache", "offloaded"), "--cache: got 'offloaded'; on a CPU the cache is in host memory "),
        (("-p", "a", "--temperature", "-1"), "--temperature: got -1.0; it is from 0 to 100; "),
        (("-p", "a", "--beams", "2", "--temperature", "1"), "--beams: got 2 with a temperature; "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    done = longrope("generate", folder, "--device", "cpu", *arguments)
    assert done.code == 2
    assert done.err.startswith(f"longrope: {message}"), done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_a_conversation_goes_on_from_its_cache_and_says_what_a_fresh_one_would(loaded: LoadedModel) -> None:
    turns = ["Hello there", "and then?", "go on, please"]
    with switched(loaded, table()) as applied:
        talk = Conversation(loaded, applied, "Be brief.", new=9)
        said = [talk.say(turn).tokens for turn in turns]
        assert [each["role"] for each in talk.messages] == ["system"] + ["user", "assistant"] * 3
        reused = talk._cache.get_seq_length()
        assert reused > ORIGINAL, "the boundary lies within the conversation"
        talk.reset()
        assert [talk.say(turn).tokens for turn in turns] == said
    messages = [{"role": "system", "content": "Be brief."}]
    for turn, tokens in zip(turns, said, strict=True):
        messages.append({"role": "user", "content": turn})
        text = str(loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
        assert whole(loaded, ids, 9) == tokens
        messages.append(
            {"role": "assistant", "content": str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))}
        )


def test_chat_answers_lines_until_they_end_and_what_is_refused_ends_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * TARGET)
    (tmp_path / "short.txt").write_text("a short one")
    lines = ["Hello", "/file missing", f"/file {tmp_path / 'long.txt'}", "what is it?", "And now?", "/reset",
             f"/file {tmp_path / 'short.txt'}", "and this?", "/exit", "never"]  # fmt: skip
    command = [*COMMAND, "chat", str(folder), "-n", "5", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" tokens in ") == 3
    assert "; the document before it is left out" in done.stderr
    assert "prompt: got missing; No such file" in done.stderr
    assert "sequence: got " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_that_there_is_not_is_told_and_two_slashes_begin_a_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("a short one")
    lines = [f"/file {tmp_path / 'short.txt'}", "/Reset", "/flie x", "//tmp and more", "/etc/hosts has", "/ 2", "/exit"]
    said: list[str] = []
    say = Conversation.say

    def heard(talk: Conversation, text: str, *rest: Any) -> Any:
        said.append(text)
        return say(talk, text, *rest)

    monkeypatch.setattr(Conversation, "say", heard)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    done = longrope("chat", folder, "-n", "2", "--dtype", "float32", "--device", "cpu")
    assert done.code == 0, done.err
    assert said == ["a short one\n\n/tmp and more", "/etc/hosts has", "/ 2"]
    rule = "a command is one of /file PATH, /reset and /exit"
    for word in ("/Reset", "/flie"):
        assert f"turn: got '{word}'; {rule}; begin with /{word} to say it\n" in done.err


def test_chat_without_a_template_is_refused_at_once(tmp_path: Path) -> None:
    done = longrope("chat", write_checkpoint(tmp_path / "model"), "--device", "cpu")
    assert done.code == 2
    message = "model: got a tokenizer without one; a conversation needs the tokenizer's chat template; "
    assert f"{message}use generate, or give an instruct model\n" in done.err
    done = longrope("generate", tmp_path / "model", "-p", "x", "--chat", "--device", "cpu")
    assert done.code == 2
    assert f"{message}leave out --chat, or give an instruct model\n" in done.err


@pytest.mark.parametrize(("flag", "value"), [("--top-p", 0.9), ("--top-k", 5)])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_is_drawn_from_is_refused_where_nothing_is_drawn(command: str, flag: str, value: float) -> None:
    prompt = ("-p", "x") if command == "generate" else ()
    done = longrope(command, "tiny", *prompt, flag, value)
    assert done.code == 2
    assert done.err == (
        f"longrope: {flag}: got {value} at temperature 0; that takes the most likely token, and draws none; "
        "give a --temperature above 0, or leave it out\n"
    )
