"""`longrope finetune`: a plain training loop's losses, LoRA, kills at any moment, bad input, the checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconH1Config, FalconH1ForCausalLM, Gemma4UnifiedConfig

from commands import TARGET, contents, longrope, refused, start, table, unfinish_training, write_checkpoint
from longrope.api import load
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.factors import FactorTable
from longrope.model import load_model
from longrope.training import arguments, callbacks
from longrope.training.lora import LoraSettings, with_lora
from longrope.training.run import finetune
from longrope.training.state import mark_whole
from longrope.training.windows import LongWindows
from models import ORIGINAL, save, tokens

STEPS = 12
FLOAT32 = LoadOptions(device="cpu", dtype="float32", threads=1)


def command(*more: object, out: str = "run") -> list[object]:
    given = ["--length", TARGET, "-f", "good.json", "-d", "texts", "--steps", STEPS, "--batch", 2, "--out", out]
    given += ["--learning-rate", 1e-3, "--dtype", "float32", "--threads", 1, "--tracker", "none"]
    return ["finetune", "model", *given, "--save-every", 3, *more]


def train(here: Path, out: str = "run", **more: Any) -> list[float]:
    given: dict[str, Any] = {"steps": 4, "batch": 2, "learning_rate": 1e-3, "tracker": "none", "options": FLOAT32}
    given |= {"documents": [str(here / "texts")], "length": TARGET, "factors": here / "good.json"}
    losses: list[float] = finetune(str(here / "model"), out=here / out, **(given | more))["losses"]
    return losses


@pytest.mark.parametrize(("schedule", "betas", "clip"), [("linear", (0.9, 0.95), 1.0), ("constant", (0.5, 0.7), 0.05)])
def test_it_is_what_a_plain_loop_of_torch_does(
    here: Path, schedule: str, betas: tuple[float, float], clip: float
) -> None:
    beta1, beta2 = betas
    given: dict[str, Any] = (
        {} if schedule == "linear" else {"beta1": beta1, "beta2": beta2, "clip": clip}
    )  # else the recipe's
    found = train(here, schedule=schedule, weight_decay=0.1, **given)
    loaded = load_model(str(here / "model"), FLOAT32)
    made = LongWindows(_documents(here), loaded.tokenizer, length=TARGET, count=8, seed=0)
    model: Any = loaded.model.requires_grad_(True).train()
    kept = {name for name, _ in model.named_parameters() if "norm" in name}
    groups = [
        {"params": [each for name, each in model.named_parameters() if name not in kept], "weight_decay": 0.1},
        {"params": [each for name, each in model.named_parameters() if name in kept], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=betas, eps=1e-8)
    expected = []
    with loaded.patch() as patch:
        patch.install(table().rows[-1])
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - step / 4 if schedule == "linear" else 1)
            ids = torch.stack([made[2 * step + index]["input_ids"] for index in range(2)])
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            expected.append(float(loss.detach()))
    assert found == pytest.approx(expected, rel=1e-5)


def test_of_prompts_the_completions_alone_are_trained_on_and_each_of_their_tokens_counts_the_same(here: Path) -> None:
    rows = [("What is the key?", " 12345."), ("And what is there beside it, in so many words?", " Nothing at all.")]
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows)
    (here / "asked.jsonl").write_text("\n".join(lines))
    [found] = train(here, steps=1, documents=[str(here / "asked.jsonl")])
    loaded = load_model(str(here / "model"), FLOAT32)
    model, ends, total, count = loaded.model, loaded.tokenizer, 0.0, 0
    with loaded.patch() as patch, torch.no_grad():
        patch.install(table().rows[-1])
        for prompt, completion in rows:
            ids = torch.tensor([[ends.bos_token_id, *f"{prompt}{completion}".encode(), ends.eos_token_id]])
            labels = ids.clone()
            labels[0, : 1 + len(prompt)] = -100
            learned = len(completion) + 1
            total, count = total + float(model(input_ids=ids, labels=labels).loss) * learned, count + learned
    assert found == pytest.approx(total / count, rel=1e-5)


def test_a_class_that_would_not_be_told_of_the_step_counts_tokens_the_same(here: Path) -> None:
    """Gemma 4's says that its loss takes no count, and Trainer would mean the means of passes."""
    text = {
        "vocab_size": 259, "vocab_size_per_layer_input": 259, "hidden_size": 32, "hidden_size_per_layer_input": 8,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "global_head_dim": 16, "max_position_embeddings": ORIGINAL,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
    }  # fmt: skip
    torch.manual_seed(0)
    own: Any = AutoModelForCausalLM
    made = own.from_config(Gemma4UnifiedConfig(text_config=text))
    assert not made.accepts_loss_kwargs
    save(made, here / "told")
    rows = [{"prompt": "key?", "completion": " 12345."}, {"prompt": "What is there?", "completion": " Nothing at all."}]
    (here / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for together in (1, 2):
        loaded = load_model(str(here / "told"), FLOAT32)
        loaded.batch_tokens = together * TARGET
        given: dict[str, Any] = {"steps": 2, "batch": 2, "learning_rate": 1e-3, "tracker": "none"}
        given |= {"documents": [str(here / "asked.jsonl")], "length": TARGET, "factors": here / "good.json"}
        found.append(finetune(loaded, out=here / f"together-{together}", **given)["losses"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def _documents(here: Path) -> Any:
    from longrope.documents import read_sources

    return read_sources([str(here / "texts")])


def test_batches_of_any_shape_and_layers_computed_twice_train_the_same(here: Path) -> None:
    expected = train(here)
    assert train(here, "again", gradient_checkpointing=True) == pytest.approx(expected, rel=1e-6)
    loaded = load_model(str(here / "model"), FLOAT32)
    loaded.batch_tokens = TARGET  # one window at a time, two accumulated
    given: dict[str, Any] = {"steps": 4, "batch": 2, "learning_rate": 1e-3, "tracker": "none"}
    given |= {"documents": [str(here / "texts")], "length": TARGET, "factors": here / "good.json"}
    assert finetune(loaded, out=here / "accumulated", **given)["losses"] == pytest.approx(expected, rel=1e-5)


def test_the_checkpoint_is_the_trained_model_with_its_factors_here_and_in_stock_transformers(here: Path) -> None:
    ran = longrope(*command("--json"))
    assert ran.code == 0, ran.err
    losses = ran.document["losses"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert ran.document["results"][0]["value"] == losses[-1]
    made = FactorTable.load("run/checkpoint/factors.json")
    assert made == FactorTable.load("run/factors.json")
    assert made.rows == (table().rows[-1],)
    loaded = load_model("run/checkpoint", FLOAT32)
    assert loaded.rope.original_length == ORIGINAL
    stock: Any = AutoModelForCausalLM.from_pretrained("run/checkpoint", dtype=torch.float32)
    assert stock.config.use_cache
    ids = tokens(TARGET)
    with torch.no_grad(), loaded.patch() as patch:
        patch.install(loaded.table)
        assert torch.allclose(loaded.model(ids).logits, stock(ids).logits, atol=1e-5)
    again = longrope(*command("--json"))
    assert (again.code, again.document) == (0, ran.document), "a finished run is read"
    longer = longrope("evaluate", "perplexity", "run/checkpoint", "--lengths", TARGET, "-d", "texts", "--windows", 2)
    assert longer.code == 0


def test_a_checkpoint_is_saved_in_the_dtype_asked_for(here: Path) -> None:
    write_checkpoint(here / "model", tie_word_embeddings=True)
    train(here, "as-trained")
    train(here, "half", save_dtype="bfloat16")
    whole, half = (load_file(here / name / "checkpoint" / "model.safetensors") for name in ("as-trained", "half"))
    assert whole.keys() == half.keys(), "tied embeddings are there once"
    assert {each.dtype for each in whole.values()} == {torch.float32}
    assert all(torch.equal(half[name], whole[name].to(torch.bfloat16)) for name in whole)
    told = json.loads((here / "half" / "checkpoint" / "config.json").read_text())
    assert told["dtype"] == "bfloat16"
    loaded: Any = AutoModelForCausalLM.from_pretrained(here / "half" / "checkpoint", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    settings = [json.loads((here / name / "config.json").read_text())["settings"] for name in ("half", "as-trained")]
    assert settings[0] == settings[1] | {"save_dtype": "bfloat16"}


@pytest.mark.usefixtures("here")
def test_mixed_windows_keep_a_row_for_short_sequences() -> None:
    assert longrope(*command("--mixed", 0.5)).code == 0
    assert FactorTable.load("run/checkpoint/factors.json").rows == table().rows
    config = json.loads(Path("run/checkpoint/config.json").read_text())
    assert config["max_position_embeddings"] == ORIGINAL, "two attention factors: config.json cannot say it"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "Fine-tuned: all weights, 12 steps of 2 windows of 192 tokens, learning rate 0.0005 (cosine), seed 0."),
        (("--lora", 2, "--merge"), "Fine-tuned: adapters (LoRA, rank 2), merged, 12 steps of 2 windows"),
        (
            ("--lora", 2, "--merge", "--embeddings", "--norms"),
            "(LoRA, rank 2), merged, and all embeddings and norms, 12",
        ),
        (("--steps", 1, "--batch", 1), "Fine-tuned: all weights, 1 step of 1 window of 192 tokens"),
        (("--mixed", 0.5), "Of the windows a share of 0.5 was packed of short documents"),
    ],
)
def test_the_model_card_says_what_was_trained_and_keeps_what_the_hub_reads(options: Sequence[Any], told: str) -> None:
    about = "---\nlicense: apache-2.0\n---\n"
    Path("model/README.md").write_text(f"{about}# A model\n")
    assert longrope(*command("--learning-rate", 0.0005, "--schedule", "cosine", *options)).code == 0
    card = Path("run/checkpoint/README.md").read_text()
    assert card.startswith(f"{about}\n# model, extended to {TARGET} tokens\n")
    assert told in card
    rows = [line for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == (2 if "--mixed" in options else 1)


@pytest.mark.usefixtures("here")
def test_conversations_are_trained_on_as_the_chat_template_writes_them() -> None:
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for each in messages %}[{{ each.role }}] {{ each.content }}\n{% endfor %}"
    Path("model/tokenizer_config.json").write_text(json.dumps(settings))
    turns = [{"role": ("user", "assistant")[turn % 2], "content": f"turn {turn} of a long talk"} for turn in range(40)]
    Path("talks.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    words = command("-d", "talks.jsonl")
    words[words.index("texts")] = "talks.jsonl"
    assert longrope(*words).code == 0
    loaded = load_model("model", FLOAT32)
    from longrope.documents import read_sources

    documents = read_sources(["talks.jsonl"], tokenizer=loaded.tokenizer)
    window = LongWindows(documents, loaded.tokenizer, length=TARGET, count=2, seed=0)[0]["input_ids"]
    text = str(loaded.tokenizer.decode(window[1:-1]))
    assert "[assistant] turn" in text
    assert text in "".join(f"[{each['role']}] {each['content']}\n" for each in turns)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_lora_trains_its_adapters_alone_and_merged_is_the_same_model(here: Path) -> None:
    from peft import PeftModel

    train(here, lora=4, learning_rate=1e-2, merge=True)
    base: Any = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32)
    ids = tokens(20)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(here / "run" / "adapter"))
    merged: Any = AutoModelForCausalLM.from_pretrained(here / "run" / "checkpoint", dtype=torch.float32)
    untouched: Any = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32)
    for name, weight in untouched.named_parameters():
        if "norm" in name or "embed" in name:
            assert torch.equal(weight, merged.get_parameter(name)), name
    adapted_logits = adapted(ids).logits
    assert not torch.allclose(adapted_logits, before, atol=1e-3)
    # The merged folder's own RoPE is the long one: both are asked under none.
    merged.model.rotary_emb, merged.config = untouched.model.rotary_emb, untouched.config
    assert torch.allclose(merged(ids).logits, adapted_logits, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_adapters_alone_have_the_factors_that_they_were_trained_under(here: Path) -> None:
    from peft import PeftModel

    train(here, lora=4, learning_rate=1e-2)
    folder = here / "run" / "adapter"
    card = (folder / "README.md").read_text()
    assert "Fine-tuned: adapters (LoRA, rank 4), 4 steps" in card
    assert "library_name: peft" in card.partition("\n# model, extended to")[0], "what the Hub reads"
    base: Any = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32)
    load(base, folder)
    adapted = PeftModel.from_pretrained(base, str(folder))
    ids = tokens(TARGET - 2)
    with torch.no_grad():
        found = adapted(ids).logits
    train(here, "merged", lora=4, learning_rate=1e-2, merge=True)
    loaded = load_model(str(here / "merged" / "checkpoint"), FLOAT32)
    with torch.no_grad(), loaded.patch() as patch:
        patch.install(table().rows[-1])
        assert torch.allclose(loaded.model(ids).logits, found, atol=1e-4)


def test_lora_with_norms_and_embeddings_trains_them(here: Path) -> None:
    train(here, lora=2, norms=True, embeddings=True, merge=True, learning_rate=1e-2)
    merged: Any = AutoModelForCausalLM.from_pretrained(here / "run" / "checkpoint", dtype=torch.float32)
    base: Any = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32)
    changed = {name for name, weight in base.named_parameters() if not torch.equal(weight, merged.get_parameter(name))}
    assert {"model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} <= changed
    assert not (here / "run" / "checkpoint" / "adapter_config.json").exists()


# Kills


def steps_of(run: Path) -> int:
    path = run / "training.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_training_killed_at_any_moment_ends_in_the_same_weights_and_losses(here: Path) -> None:
    assert longrope(*command("-q", out="whole")).code == 0
    moments: list[Callable[[], bool]] = [
        lambda: steps_of(here / "run") >= 2,  # before the first checkpoint
        lambda: (here / "run" / "checkpoints" / "checkpoint-3").exists(),  # while it is written, or just after
        lambda: steps_of(here / "run") >= 8,
        lambda: (here / "run" / ".checkpoint.unfinished").exists() or (here / "run" / "checkpoint").exists(),
    ]
    for moment, which in zip(moments, [signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL], strict=True):
        with start(*command("-q"), cwd=here) as process:
            wait_for(moment, process)
            process.send_signal(which)
            out, err = process.communicate(timeout=60)
        assert out == ""
        assert process.returncode == (130 if which == signal.SIGINT else -which), err
    assert longrope(*command("-q")).code == 0
    for name in ("training.jsonl", "metrics.json", "checkpoint/model.safetensors", "checkpoint/factors.json"):
        assert (here / "run" / name).read_bytes() == (here / "whole" / name).read_bytes(), name
    assert not (here / "run" / ".checkpoint.unfinished").exists()


@pytest.mark.usefixtures("here")
def test_a_damaged_checkpoint_is_told_and_without_it_the_one_before_is_gone_on_with() -> None:
    assert longrope(*command()).code == 0
    losses = Path("run/training.jsonl").read_bytes()
    unfinish_training(Path("run"))
    optimizer = Path("run/checkpoints/checkpoint-12/optimizer.pt")
    whole = optimizer.read_bytes()
    optimizer.write_bytes(whole[:-100])
    rule = "a training goes on from whole files; restore the file, or remove that folder"
    message = refused(*command())
    assert message.startswith(f"checkpoint: got run/checkpoints/checkpoint-12: optimizer.pt; {rule}")
    optimizer.write_bytes(b"\0" * len(whole))
    assert refused(*command()).startswith("checkpoint: got run/checkpoints/checkpoint-12: ")
    shutil.rmtree(optimizer.parent)
    assert longrope(*command()).code == 0
    assert Path("run/training.jsonl").read_bytes() == losses


@pytest.mark.usefixtures("here")
def test_losses_that_the_file_has_lost_are_those_of_the_checkpoint() -> None:
    assert longrope(*command("-q")).code == 0
    losses, metrics = Path("run/training.jsonl").read_bytes(), Path("run/metrics.json").read_bytes()
    for left in (b"", losses[:300], losses[:-30], b"".join(losses.splitlines(keepends=True)[1:])):
        unfinish_training(Path("run"))
        Path("run/training.jsonl").write_bytes(left)
        assert longrope(*command("-q")).code == 0
        assert Path("run/training.jsonl").read_bytes() == losses
        assert Path("run/metrics.json").read_bytes() == metrics
    unfinish_training(Path("run"))
    shutil.rmtree("run/checkpoints/checkpoint-12")
    Path("run/training.jsonl").write_bytes(b"")
    assert longrope(*command("-q")).code == 0
    assert Path("run/training.jsonl").read_bytes() == losses


@pytest.mark.usefixtures("here")
def test_whichever_checkpoint_is_the_last_that_is_gone_on_with() -> None:
    assert longrope(*command("--keep", 9, "-q")).code == 0
    losses = Path("run/training.jsonl").read_bytes()
    whole = _weights(Path("run/checkpoint/model.safetensors"))
    for lost in ([12], [9, 12], [6, 9, 12], [3, 6, 9, 12]):
        unfinish_training(Path("run"))
        for step in lost:
            shutil.rmtree(f"run/checkpoints/checkpoint-{step}")
        assert longrope(*command("--keep", 9, "-q")).code == 0
        assert Path("run/training.jsonl").read_bytes() == losses
        assert all(
            torch.equal(*pair) for pair in zip(_weights(Path("run/checkpoint/model.safetensors")), whole, strict=True)
        )


@pytest.mark.usefixtures("here")
def test_a_checkpoint_of_another_training_is_not_gone_on_with() -> None:
    """Of the same shape, and whole: its losses and weights would be taken for this one's."""
    assert longrope(*command("--learning-rate", 2e-3, out="other")).code == 0
    assert longrope(*command("-q")).code == 0
    losses = Path("run/training.jsonl").read_bytes()
    unfinish_training(Path("run"))
    shutil.rmtree("run/checkpoints/checkpoint-12")
    shutil.copytree("other/checkpoints/checkpoint-12", "run/checkpoints/checkpoint-12")
    told = "checkpoint: got run/checkpoints/checkpoint-12, of another training; a training goes on from its own"
    assert refused(*command()).startswith(told)
    shutil.rmtree("run/checkpoints/checkpoint-12")
    assert longrope(*command("-q")).code == 0
    assert Path("run/training.jsonl").read_bytes() == losses


@pytest.mark.usefixtures("here")
def test_a_checkpoint_of_an_earlier_version_does_not_say_whose_it_is_and_is_gone_on_with() -> None:
    assert longrope(*command("-q")).code == 0
    losses = Path("run/training.jsonl").read_bytes()
    unfinish_training(Path("run"))
    file = Path("run/checkpoints/checkpoint-12/longrope.json")
    listed = json.loads(file.read_text())
    del listed["of"]
    file.write_text(json.dumps(listed))
    assert longrope(*command("-q")).code == 0
    assert Path("run/training.jsonl").read_bytes() == losses


def test_where_one_checkpoint_stays_the_older_one_goes_when_it_is_whole(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kill while it is being marked would leave none."""
    there: list[list[str]] = []

    def watched(checkpoint: Path, of: str) -> None:
        there.append([path.parent.name for path in checkpoint.parent.glob("checkpoint-*/longrope.json")])
        mark_whole(checkpoint, of)

    monkeypatch.setattr(callbacks, "mark_whole", watched)
    train(here, keep=1, save_every=1)
    assert there == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert [path.name for path in (here / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.usefixtures("here")
def test_a_bit_that_is_turned_in_a_checkpoint_is_told_with_its_file() -> None:
    assert longrope(*command("-q")).code == 0
    unfinish_training(Path("run"))
    checkpoint = Path("run/checkpoints/checkpoint-12")
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        whole = (checkpoint / name).read_bytes()
        at = len(whole) // 2
        (checkpoint / name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert refused(*command("-q")).startswith(f"checkpoint: got {checkpoint}: {name}; "), name
        (checkpoint / name).write_bytes(whole)


@pytest.mark.parametrize(("limit", "told"), [(100_000, "File too large"), (200_000, "a write failed")])
def test_a_checkpoint_that_hits_a_limit_of_file_sizes_is_told_and_the_training_goes_on(
    here: Path, limit: int, told: str
) -> None:
    """The weights, which safetensors writes, and with a higher limit the optimizer, which torch writes."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    with start(*command("-q"), cwd=here, code=limited + "from longrope.cli import main; main()") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), err
    assert err.startswith(f"longrope: output: got run ({told}); ")
    assert err.count("\n") == 1
    assert longrope(*command("-q")).code == 0


# Bad input


@pytest.mark.usefixtures("here")
def test_a_loss_that_is_no_number_stops_with_the_step_and_the_last_good_checkpoint() -> None:
    """The first step has a learning rate of 0, the second ruins the weights, the third finds that."""
    given = command("--learning-rate", 1e30, "--warmup", 8, "--save-every", 1, "-q")
    ran = longrope(*given)
    assert (ran.code, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert line.startswith("longrope: training: got a ")
    assert " at step 3; the loss stays a number; checkpoint-1 is the last good one; train with a lower" in line
    good = _weights(Path("run/checkpoints/checkpoint-1/model.safetensors"))
    before = _weights(Path("model/model.safetensors"))
    assert all(torch.equal(*pair) for pair in zip(good, before, strict=True))
    ruined = _weights(Path("run/checkpoints/checkpoint-2/model.safetensors"))
    assert max(float(each.abs().max()) for each in ruined) > 1e20
    assert len(Path("run/training.jsonl").read_text().splitlines()) == 2
    again = longrope(*given)
    assert (again.code, again.err) == (2, ran.err), "it goes on, and says the same"


@pytest.mark.usefixtures("here")
def test_the_last_good_checkpoint_stays_where_one_is_kept() -> None:
    given = command("--learning-rate", 1e30, "--warmup", 8, "--save-every", 1, "--keep", 1, "-q")
    ran = longrope(*given)
    assert "checkpoint-1 is the last good one" in ran.err
    assert Path("run/checkpoints/checkpoint-1/longrope.json").exists()
    assert longrope(*command("--keep", 1, out="good")).code == 0
    assert [path.name for path in Path("good/checkpoints").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


@pytest.mark.usefixtures("here")
def test_where_no_checkpoint_is_good_that_is_said() -> None:
    ran = longrope(*command("--learning-rate", 1e30, "-q"))
    assert ran.code == 2
    assert "no good one was saved yet; train with a lower" in ran.err
    assert not list(Path("run").rglob("model.safetensors"))


def _weights(path: Path) -> list[torch.Tensor]:
    return list(load_file(path).values())


def test_a_window_longer_than_memory_is_told_before_the_first_step_with_what_would_fit(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "free_memory", lambda device: 700_000)
    with pytest.raises(UserError) as caught:
        train(here)
    found = str(caught.value)
    assert found.startswith(f"memory: got windows of {TARGET} tokens, of which one takes ")
    fits = int(found.partition("use at most ")[2].split()[0])
    assert 0 < fits < TARGET
    assert not (here / "run" / "training.jsonl").exists()
    losses = train(here, "shorter", length=fits - fits % 8, factors=here / "good.json")
    assert len(losses) == 4


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "ours"], "--recipe: got 'ours'; it is one of longrope-llama2, longrope-mistral, longrope2"),
        (["--steps", 0], "--steps: got 0; it is at least 1"),
        (["--schedule", "zigzag"], "--schedule: got zigzag; it is one of linear, cosine, constant"),
        (["--length", 1024], "sequence: got 1024 tokens; the factor table ends at 192"),
        (["--mixed", 2], "--mixed: got 2.0; it is a share between 0 and 1"),
        (
            ["--short-documents", "texts"],
            "--short-documents: got no --mixed; they are what windows of",
        ),
        (["--lora", 0], "--lora: got 0; a rank is at least 1"),
        (["--save-dtype", "int8"], "--save-dtype: got 'int8'; it is one of float32, bfloat16, float16; choose one"),
        (["--merge"], "--merge: got no --lora; it is a setting of LoRA"),
        (["-f", "none"], "--factors: got none, and no factors.json beside the weights"),
        (["--learning-rate", "inf"], "--learning-rate: got inf; it is above 0 and a number"),
        (["--clip", "nan"], "--clip: got nan; it is above 0 and a number"),
        (["--tracker", "mirror"], "--tracker: got 'mirror'; it is none, all, or some of azure_ml, clearml, "),
        (["--tracker", "tensorboard,wandb"], "--tracker: got wandb, which is not there; a tracker is a package"),
        (["--quantize", "4bit"], "--quantize: got 4bit"),
    ],
)
def test_bad_input_is_one_line(more: list[object], message: str) -> None:
    given = command(*more)
    if more[0] == "-f":
        del given[given.index("-f") : given.index("-f") + 2]
    assert message in refused(*given)


@pytest.mark.usefixtures("here")
def test_other_settings_are_refused_and_nothing_is_lost() -> None:
    assert longrope(*command("-q")).code == 0
    before = contents(Path("run"))
    assert "settings.learning_rate was 0.001, now 0.002" in refused(*command("--learning-rate", 2e-3))
    assert contents(Path("run")) == before
    for name, changed in (
        ("generation_config.json", {"max_length": 7}),
        ("tokenizer_config.json", {"padding_side": "left"}),
    ):
        file = Path("model") / name
        own = file.read_text() if file.exists() else "{}"
        file.write_text(json.dumps(json.loads(own) | changed))
        assert "model.tokenizer_and_generation was" in refused(*command()), "the checkpoint has it, too"
        file.write_text(own)
    assert longrope(*command("-q")).code == 0
    assert contents(Path("run")) == before


def test_without_steps_a_recipe_has_to_say_them(here: Path) -> None:
    with pytest.raises(UserError, match=r"^--steps: got none; a training has a number of steps; give --steps$"):
        train(here, steps=None)
    with pytest.raises(UserError, match=r"^--steps: got none"):
        train(here, steps=None, recipe="longrope2")


def test_adapters_leave_out_what_state_space_layers_hand_to_their_kernels() -> None:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    mixer: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8}
    config = FalconH1Config(vocab_size=64, num_key_value_heads=1, **shape, **mixer)
    adapted = with_lora(FalconH1ForCausalLM(config), LoraSettings(rank=2), seed=0)
    names = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_disk_without_room_for_the_folder_of_checkpoints_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = os.makedirs

    def full(name: str, *arguments: Any, **keywords: Any) -> None:
        if Path(name).name == "checkpoints":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        made(name, *arguments, **keywords)

    with monkeypatch.context() as fault:
        fault.setattr(os, "makedirs", full)
        with pytest.raises(UserError, match=r"^output: got .*run \(No space left on device\);"):
            train(here)
    train(here)
    assert (here / "run" / "DONE").exists()
