"""What Trainer is told of a training: trackers, devices, schedules, memory, the papers' recipes; packed documents."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.big_modeling import _attach_context_parallel_hooks
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Lfm2Config,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    integrations,
)

from architectures_small import small_config
from commands import SHAPE, TARGET, contents, longrope, refused, table, unfinish_training, write_checkpoint
from longrope.checkpoint import LoadOptions
from longrope.documents import hold_out, read_sources
from longrope.errors import UserError
from longrope.factors import FactorTable, unscaled
from longrope.memory import Kept
from longrope.model import NO_TARGET, load_model
from longrope.patch import EXTENDED_LAYERS, has_local_layers
from longrope.training import arguments
from longrope.training.apart import check_shareable, documents_are_apart
from longrope.training.arguments import on_one_device, room_for_windows, windows_at_once
from longrope.training.lora import LoraSettings, with_lora
from longrope.training.loss import chunked_loss, loss_bytes, mean_of
from longrope.training.recipes import RECIPES
from longrope.training.run import finetune
from longrope.training.settings import Training
from longrope.training.state import mark_whole, windows_of_a_pass
from longrope.training.windows import LongWindows, MixedWindows
from longrope.training.world import World
from models import ARCHITECTURES, ORIGINAL, build, save

FLOAT32 = LoadOptions(device="cpu", dtype="float32", threads=1)


def train(model: str = "model", out: str = "run", **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"steps": 3, "batch": 2, "learning_rate": 1e-3, "tracker": "none", "documents": ["texts"]}
    given |= {"length": TARGET, "factors": "good.json", "options": FLOAT32}
    return finetune(model, out=out, **(given | more))


# Trackers


@pytest.mark.usefixtures("here")
def test_losses_are_events_of_tensorboard_unless_another_tracker_is_asked_for() -> None:
    given = ["--length", TARGET, "-f", "good.json", "-d", "texts", "--steps", 3, "--batch", 2, "--dtype", "float32"]
    ran = longrope("finetune", "model", *given, "--out", "run", "--json")
    assert ran.code == 0, ran.err
    (events,) = Path("run").rglob("events.out.tfevents.*")
    assert events.is_relative_to("run/checkpoints/runs")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert [each.value for each in found.Scalars("train/loss")] == pytest.approx(ran.document["losses"], rel=1e-6)
    judged = ["--lengths", TARGET, "-d", "texts", "--windows", 1]
    assert longrope("evaluate", "perplexity", "run/checkpoint", *judged).code == 0, "a whole run"


@pytest.mark.usefixtures("here")
def test_what_trainer_knows_as_a_tracker_sees_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered as the package of one would register it; beside TensorBoard, with a comma."""
    seen: list[float] = []

    class Own(TrainerCallback):
        def on_log(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **more: Any
        ) -> None:
            seen.extend([logs["loss"]] if "loss" in logs else [])

    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(known, "own", Own)
    for module in (arguments, integrations.integration_utils):
        monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: ["tensorboard", "own"])
    losses = train(tracker="own,tensorboard")["losses"]
    assert seen == losses
    assert list(Path("run").rglob("events.out.tfevents.*"))


# Devices and schedules


def test_one_process_trains_on_one_device_however_many_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    told = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3)
    assert told.train_batch_size == 12, "what Trainer would do"
    assert on_one_device(told).train_batch_size == 3


def test_another_device_than_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer would move the model to the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"give cuda, and CUDA_VISIBLE_DEVICES=1 before the command$"):
        World().placed(LoadOptions(device="cuda:1"))
    assert World().placed(LoadOptions(device="cuda:0")).device == "cuda:0"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [0, 0.5, 1, 0.5]),
        ("cosine", 0, [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
    ],
)
def test_learning_rates_are_those_of_the_schedule_with_its_warm_up(
    schedule: str, warmup: int, rates: list[float]
) -> None:
    from longrope.files import read_lines

    train(steps=4, schedule=schedule, warmup=warmup)
    found = [line["learning_rate"] for line in read_lines(Path("run/training.jsonl"))]
    assert found == pytest.approx([1e-3 * rate for rate in rates])


def test_recipes_are_what_the_papers_say() -> None:
    """LongRoPE, section 4.1 (LLaMA2 and Mistral); LongRoPE2, section 4.1."""
    told = {name: (each.learning_rate, each.schedule, each.batch, each.steps) for name, each in RECIPES.items()}
    assert told == {
        "longrope-llama2": (2e-5, "linear", 32, 400),
        "longrope-mistral": (1e-6, "constant", 64, 400),
        "longrope2": (2e-5, "cosine", 64, None),
    }


# Lengths and factors


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("length", [ORIGINAL // 2, ORIGINAL])
def test_a_training_within_the_original_length_ends_in_a_checkpoint(length: int) -> None:
    """Under a table as searches write it, whose first row is that of the original length."""
    last = table().rows[-1]
    short = unscaled(len(last.rescale), ORIGINAL)
    FactorTable(500.0, SHAPE.rotary_dim, ORIGINAL, (short, last)).save("good.json")
    train(length=length)
    made = load_model("run/checkpoint", FLOAT32)
    assert [row.up_to for row in made.meaning.rows] == [ORIGINAL]
    stock: Any = AutoModelForCausalLM.from_pretrained("run/checkpoint", dtype=torch.float32)
    ids = torch.arange(ORIGINAL)[None]
    with torch.no_grad():
        assert torch.allclose(made.model(ids).logits, stock(ids).logits, atol=1e-5)


@pytest.mark.usefixtures("here")
def test_factors_none_leaves_out_those_of_the_checkpoint() -> None:
    train()
    given = ["--length", TARGET, "-d", "texts", "--steps", 1, "--dtype", "float32", "--out", "again"]
    told = refused("finetune", "run/checkpoint", *given, "--factors", "none")
    assert told.startswith("--factors: got none, and no factors.json beside the weights")
    assert longrope("finetune", "run/checkpoint", *given, "--batch", 1, "--tracker", "none").code == 0


# What is trained whole beside adapters


def test_norms_and_embeddings_beside_adapters_are_trained_in_float32(ground: Path) -> None:
    """In bfloat16 a step of the papers' learning rate would be rounded away."""
    loaded = load_model(str(ground / "model"), LoadOptions(device="cpu", dtype="bfloat16", threads=1))
    made = with_lora(loaded.model, LoraSettings(rank=2, embeddings=True, norms=True), seed=0)
    trained = {name: each for name, each in made.named_parameters() if each.requires_grad}
    assert {each.dtype for each in trained.values()} == {torch.float32}
    assert {"embed_tokens", "norm", "lora_A"} <= {part for name in trained for part in name.split(".")}
    assert {each.dtype for each in made.parameters() if not each.requires_grad} == {torch.bfloat16}


def test_beside_adapters_of_a_quantized_base_what_is_not_quantized_is_in_float32(ground: Path) -> None:
    """As PEFT prepares a base of few bits, which this one stands for: those need CUDA."""
    loaded = load_model(str(ground / "model"), LoadOptions(device="cpu", dtype="bfloat16", threads=1))
    made = with_lora(loaded.model, LoraSettings(rank=2), seed=0, quantized=True)
    assert {each.dtype for each in made.parameters()} == {torch.float32}
    trained = {name.split(".")[-3] for name, each in made.named_parameters() if each.requires_grad}
    assert trained == {"lora_A", "lora_B"}


@pytest.mark.usefixtures("here")
def test_norms_of_a_half_precision_base_move_by_small_steps() -> None:
    options = LoadOptions(device="cpu", dtype="bfloat16", threads=1)
    train(lora=2, norms=True, merge=True, learning_rate=2e-5, steps=1, options=options)
    kept = {name: each for name, each in load_model("model", FLOAT32).model.named_parameters() if "norm" in name}
    from safetensors.torch import load_file

    made = load_file("run/checkpoint/model.safetensors")
    moved = [float((made[name].float() - each).abs().max()) for name, each in kept.items()]
    assert min(moved) == pytest.approx(2e-5, rel=0.1), "Adam's first step is the learning rate"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_weights_are_trained_in_float32_whatever_the_dtype(
    dtype: str, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In half precision nearly all of them would stay where they were."""
    caplog.set_level("INFO")
    options = LoadOptions(device="cpu", dtype=dtype, threads=1)
    train(learning_rate=2e-5, steps=1, options=options)
    assert f"--dtype {dtype}: weights are trained in float32, and multiplied in bfloat16" in caplog.messages
    before = load_model("model", FLOAT32).model.state_dict()
    after = load_file(here / "run" / "checkpoint" / "model.safetensors")
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in after])
    # Those of bytes that no text has stay where they are.
    assert float((moved > 1e-5).float().mean()) > 0.7, "Adam's first step is the learning rate"


def test_all_weights_of_a_model_given_in_half_precision_are_trained_in_whole(here: Path) -> None:
    loaded = load_model(str(here / "model"), LoadOptions(device="cpu", dtype="bfloat16", threads=1))
    losses = train(cast(Any, loaded), options=None)["losses"]
    assert losses == train(str(here / "model"), "named", options=replace(FLOAT32, dtype="autocast"))["losses"]
    assert load_file(here / "run" / "checkpoint" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_what_is_held_out_is_held_out_of_short_documents_too(here: Path) -> None:
    searched, unseen = hold_out(read_sources(["texts"]))
    train(hold_out=True, mixed=0.5, short_documents=["texts"])
    read = json.loads((here / "run" / "config.json").read_text())["documents"]["train"]
    assert {each["sha256"] for each in read} == {each.sha256 for each in searched}
    rows = [json.dumps({"text": each.text}) + "\n" for each in unseen]
    Path("held.jsonl").write_text("".join(rows))
    train(out="others", hold_out=True, mixed=0.5, short_documents=["held.jsonl", "texts"])
    read = json.loads((here / "others" / "config.json").read_text())["documents"]["train"]
    assert not {each["sha256"] for each in read} & {each.sha256 for each in unseen}
    expected = (
        "^--short-documents: got only documents that are held out; what --hold-out leaves out of --documents is not"
    )
    with pytest.raises(UserError, match=expected):
        train(out="held", hold_out=True, mixed=0.5, short_documents=["held.jsonl"])


def test_a_model_that_is_given_is_trained_with_its_own_table_and_tokenizer(here: Path) -> None:
    loaded = load_model(str(here / "model"), FLOAT32)
    loaded.table = table()
    losses = train(cast(Any, loaded), options=None, factors=None, steps=1)["losses"]
    assert losses == train(str(here / "model"), "named", steps=1)["losses"]


def test_parts_of_what_a_single_document_holds_out_are_no_short_documents_either(here: Path) -> None:
    chapters = [f"Chapter {number}. " + f"So goes the tale of {number}. " * 20 for number in range(8)]
    Path("book.txt").write_text("\n".join(chapters))
    Path("chapters.jsonl").write_text("".join(json.dumps({"text": each + "\n"}) + "\n" for each in chapters))
    train(documents=["book.txt"], short_documents=["chapters.jsonl"], mixed=0.5, hold_out=True, steps=1)
    read = json.loads((here / "run" / "config.json").read_text())["documents"]["train"]
    _, (held,) = hold_out(read_sources(["book.txt"]))
    parts = [each for each in read_sources(["chapters.jsonl"]) if each.text.strip() in held.text]
    assert len(parts) == 2
    assert not {each["sha256"] for each in read} & {each.sha256 for each in parts}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"lora": 2, "dtype": "float16"},
            "--dtype: got float16; the gradient of one token among those of a step rounds",
        ),
        (
            {"lora": 2, "save_dtype": "float16"},
            "--save-dtype: got float16 without --merge; it is of the checkpoint with merged adapters; give --merge",
        ),
        ({"learning_rate": 1e300}, "--learning-rate: got 1e+300; it is above 0 and a number of float32; give another"),
        (
            {"seed": 2**32},
            "--seed: got 4294967296; it is from 0 to below 2^32 where something is trained; take another",
        ),
    ],
)
def test_what_no_gradient_and_no_generator_takes_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        train(options=None, device="cpu", **given)
    assert not Path("run").exists()


def test_a_mean_is_where_trainer_wants_it_whatever_devices_a_model_is_on() -> None:
    with FakeTensorMode():
        total, count = torch.ones((), device="cuda:1"), torch.ones((), dtype=torch.int64, device="cuda:0")
        assert mean_of(total, count, count.device).device == count.device
    assert float(mean_of(torch.tensor(6.0), 4, torch.device("cpu"))) == 1.5


@pytest.mark.usefixtures("here")
def test_a_tracker_that_fails_is_no_damaged_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = train(save_every=1)["losses"]
    unfinish_training(Path("run"))
    shutil.rmtree("run/checkpoints/checkpoint-3")

    class Unreachable(TrainerCallback):
        def on_train_begin(self, *given: Any, **more: Any) -> None:
            raise RuntimeError("the tracker cannot be reached")

    monkeypatch.setitem(integrations.integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Unreachable)
    with pytest.raises(RuntimeError, match="the tracker cannot be reached"):
        train(save_every=1, tracker="tensorboard")
    assert train(save_every=1)["losses"] == losses, "nothing was lost"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("lora", "folder"), [(None, "checkpoint"), (2, "adapter")])
def test_a_finished_training_without_what_it_made_is_told(lora: int | None, folder: str) -> None:
    whole = train(lora=lora)
    weights = contents(Path("run") / folder)
    shutil.rmtree(Path("run") / folder)
    with pytest.raises(
        UserError, match=f"^run: got run, finished, without its {folder}/; that is what it made; put it"
    ):
        train(lora=lora)
    Path("run/DONE").unlink()
    assert train(lora=lora) == whole
    assert contents(Path("run") / folder) == weights


@pytest.mark.usefixtures("here")
def test_a_file_that_is_named_like_a_checkpoint_is_none() -> None:
    losses = train(save_every=1)["losses"]
    unfinish_training(Path("run"))
    Path("run/checkpoints/checkpoint-9").write_text("a stray file")
    assert train(save_every=1)["losses"] == losses


@pytest.mark.usefixtures("here")
def test_a_checkpoint_that_is_a_link_to_another_disk_stays_one() -> None:
    losses = train(save_every=1)["losses"]
    unfinish_training(Path("run"))
    Path("elsewhere").mkdir()
    Path("run/checkpoint").symlink_to(Path("elsewhere").resolve())
    assert train(save_every=1)["losses"] == losses
    assert Path("run/checkpoint").is_symlink()
    assert FactorTable.load("elsewhere/factors.json").rows == table().rows[-1:]


@pytest.mark.usefixtures("here")
def test_mixed_windows_of_any_length_are_estimated() -> None:
    assert len(train(length=ORIGINAL * 2 + 4, mixed=0.5, steps=1)["losses"]) == 1


def test_tied_embeddings_are_trained_as_one_whatever_they_are_called() -> None:
    """Falcon's are word_embeddings, which PEFT does not tie by that name."""
    model: Any = build("falcon", tie_word_embeddings=True)
    made = with_lora(model, LoraSettings(2, embeddings=True), 0)
    trained = [name for name, each in made.named_parameters() if each.requires_grad and "embeddings" in name]
    assert len(trained) == 1
    assert made.get_base_model().lm_head.weight is made.get_base_model().transformer.word_embeddings.weight


def test_linear_layers_without_adapters_are_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    own: Any = AutoModelForCausalLM
    dots = own.from_config(small_config("dots1"))
    with caplog.at_level("INFO"):
        with_lora(dots, LoraSettings(2), 0)
    assert "no adapters on 6 linear layers, such as model.layers.0.mlp.down_proj" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        with_lora(build("llama"), LoraSettings(2), 0)
    assert "no adapters" not in caplog.text


# Memory


def test_logits_that_are_gone_before_the_backward_pass_are_not_counted_as_kept(tmp_path: Path) -> None:
    estimates = []
    for vocabulary in (300, 30000):
        made = save(build("llama", vocab_size=vocabulary), tmp_path / str(vocabulary))
        loaded = load_model(str(made), FLOAT32)
        loaded.model.requires_grad_(True)
        with chunked_loss(loaded.model):
            estimates.append(arguments._kept(loaded, loaded.model, TARGET, half=False))
    assert estimates[1].linear == pytest.approx(estimates[0].linear, rel=0.01)


def test_weights_that_autocast_keeps_in_the_forward_pass_are_counted_where_layers_are_computed_twice(
    here: Path,
) -> None:
    loaded = load_model(str(here / "model"), FLOAT32)
    loaded.model.requires_grad_(True)
    copies = 2 * sum(each.numel() for name, each in loaded.model.named_parameters() if "proj" in name)
    given = Training(length=TARGET, gradient_checkpointing=True)
    beside = loss_bytes(loaded.model.config.vocab_size, "cpu", TARGET)
    with loaded.patch() as patch:
        patch.install(table().rows[-1])
        expected = "^memory: got windows of 192 tokens, of which one takes "
        with pytest.raises(UserError, match=expected):
            windows_at_once(loaded, loaded.model, given, [1], beside + copies, half=True)


@pytest.mark.usefixtures("here")
def test_fewer_windows_are_run_together_where_more_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(out="all", batch=4)["losses"]
    loaded = load_model("model", FLOAT32)
    sizes = {}
    for free in (10**9, 18 * 10**5):
        monkeypatch.setattr(arguments, "free_memory", lambda device, free=free: free)
        with loaded.patch() as patch:
            patch.install(table().rows[-1])
            loaded.model.requires_grad_(True)
            room = room_for_windows(loaded, loaded.model, World())
            given = Training(length=TARGET)
            with chunked_loss(loaded.model):
                sizes[free], _ = windows_at_once(loaded, loaded.model, given, [4, 2, 1], room, half=False)
    assert sizes[10**9] == 4
    assert sizes[18 * 10**5] < 4
    assert train(out="few", batch=4)["losses"] == pytest.approx(expected, rel=1e-5)


def test_fewer_windows_at_once_come_before_layers_computed_twice_but_not_where_a_training_goes_on(here: Path) -> None:
    loaded = load_model(str(here / "model"), FLOAT32)
    given = Training(length=TARGET)
    with loaded.patch() as patch:
        patch.install(table().rows[-1])
        loaded.model.requires_grad_(True)
        with chunked_loss(loaded.model):
            one = arguments._kept(loaded, loaded.model, TARGET, half=False)(TARGET)
        one += loss_bytes(loaded.model.config.vocab_size, "cpu", TARGET)

        def found(room: float, **more: Any) -> tuple[int, bool]:
            with chunked_loss(loaded.model):
                return windows_at_once(loaded, loaded.model, given, [4, 2, 1], room, half=False, **more)

        assert found(4 * one / 0.59) == (4, False)
        assert found(4 * one / 0.61) == (2, False)
        assert found(4 * one / 0.61, preferred=[4]) == (4, True), "as it began, so that its rounding is the same"
        assert found(one / 0.61)[1]


def test_processes_beside_each_other_share_memory_and_keep_gradients_twice(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one CPU they have the same memory; sums of gradients lie in buffers of their own (DDP's buckets)."""
    loaded = load_model(str(here / "model"), FLOAT32)
    loaded.model.requires_grad_(True)
    weights = sum(each.numel() for each in loaded.model.parameters())
    monkeypatch.setattr(arguments, "free_memory", lambda device: 8 * 2**30)
    assert room_for_windows(loaded, loaded.model, World()) == 8 * 2**30 - 12 * weights
    with monkeypatch.context() as two:
        two.setattr(World, "least", lambda self, value: value)
        assert room_for_windows(loaded, loaded.model, World(size=4, local_size=2)) == 4 * 2**30 - 16 * weights


@pytest.mark.parametrize("room", [18 * 10**5, 10**9], ids=["less", "more"])
def test_a_training_goes_on_with_as_many_windows_together_as_it_began_with_while_they_fit(
    room: int, here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = 10**9 if room < 10**9 else 18 * 10**5
    monkeypatch.setattr(arguments, "free_memory", lambda device: other)
    whole = train(batch=4, save_every=1)["losses"]
    shutil.rmtree(here / "run" / "checkpoints" / "checkpoint-3")
    unfinish_training(here / "run")
    began = windows_of_a_pass(here / "run" / "checkpoints" / "checkpoint-2")
    monkeypatch.setattr(arguments, "free_memory", lambda device: room)
    caplog.set_level("INFO")
    assert train(batch=4, save_every=1)["losses"] == pytest.approx(whole, rel=1e-5)
    told = [message for message in caplog.messages if "windows run together, where" in message]
    if room == 10**9:
        assert began is not None
        assert (began < 4, told) == (True, [])
    else:
        assert began == 4
        assert len(told) == 1
        assert re.fullmatch("[12] windows run together, where 4 did before: losses may differ in rounding", told[0])


def kept_by(name: str, given: Training, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """What the estimate is made of; of mixed windows what rows of short documents keep."""
    found: list[Kept] = []
    measured = Kept.measured

    def watched(*arguments: Any) -> Kept:
        found.append(measured(*arguments))
        return found[-1]

    monkeypatch.setattr(Kept, "measured", watched)
    loaded = load_model(str(write_checkpoint(folder / "model", name)), FLOAT32)
    with loaded.patch() as patch:
        patch.install(unscaled(loaded.rope.shape.pairs, given.length))
        loaded.model.requires_grad_(True)
        windows_at_once(loaded, loaded.model, given, [1], 2**30, half=False)
    return found[-1]


@pytest.mark.parametrize(
    ("name", "given", "masks"),
    [
        ("llama", Training(length=TARGET), False),
        ("llama", Training(length=TARGET, mixed=0.5), True),
        ("gemma3", Training(length=TARGET), True),  # of a local layer that reaches less far than a window is long
    ],
)
def test_masks_of_all_pairs_are_counted(
    name: str, given: Training, masks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is kept, in float32: a window of 128k would take 64 GiB."""
    kept = kept_by(name, given, tmp_path, monkeypatch)
    assert (kept.quadratic > 3) == masks, kept


def test_a_vocabulary_of_few_words_is_measured_too(tmp_path: Path) -> None:
    loaded = load_model(str(write_checkpoint(tmp_path / "model")), FLOAT32)
    loaded.model.resize_token_embeddings(60)
    with loaded.patch() as patch:
        patch.install(table())
        assert documents_are_apart(loaded)
        given = Training(length=TARGET)
        assert windows_at_once(loaded, loaded.model, given, [1], 2**30, half=False) == (1, False)


# Packed documents


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_are_apart(name: str, tmp_path: Path) -> None:
    """GPT-OSS asks for its masks without positions."""
    write_checkpoint(tmp_path / "model", name)
    assert documents_are_apart(load_model(str(tmp_path / "model"), FLOAT32)) == (name != "gpt_oss")


_MIXED = {
    "bamba": BambaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=ORIGINAL, attn_layer_indices=[1], mamba_n_heads=4,
        mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8,
    ),
    "lfm2": Lfm2Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=ORIGINAL, layer_types=["conv", "full_attention"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*_MIXED, "gpt_oss"])
def test_a_model_whose_documents_are_not_apart_trains_on_one_a_row(
    name: str, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A state or a convolution would reach back into the document before."""
    torch.manual_seed(0)
    own: Any = AutoModelForCausalLM
    save(own.from_config(_MIXED[name]) if name in _MIXED else build(name), here / "carries")
    loaded = load_model("carries", FLOAT32)
    assert not documents_are_apart(loaded)
    shape = loaded.rope.shape
    rows = (unscaled(shape.pairs, ORIGINAL), unscaled(shape.pairs, TARGET))
    FactorTable(shape.rope_theta, shape.rotary_dim, ORIGINAL, rows).save("own.json")
    with caplog.at_level("INFO"):
        [found] = train("carries", factors="own.json", mixed=0.999, batch=1, steps=1)["losses"]
    assert "each is a row of its own" in caplog.text
    documents = read_sources(["texts"], share="search", tokenizer=loaded.tokenizer)
    long = LongWindows(documents, loaded.tokenizer, length=TARGET, count=1, seed=0)
    made = MixedWindows(long, documents, loaded.tokenizer, short_length=ORIGINAL, share=0.999, apart=False)
    total, count = 0.0, 0
    for ids, labels in zip(made[0]["input_ids"], made[0]["labels"], strict=True):
        end = int((labels != NO_TARGET).nonzero()[-1]) + 1
        with torch.no_grad():
            total += float(loaded.model(input_ids=ids[None, :end], labels=labels[None, :end]).loss) * (end - 1)
        count += end - 1
    assert found == pytest.approx(total / count, rel=1e-4)


# What a checkpoint has


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "phimoe"])
def test_a_model_that_is_published_under_other_names_goes_on_with_all_of_its_weights(name: str, here: Path) -> None:
    """Experts lie together in the class and apart in the files that transformers writes; a base's would be read."""
    write_checkpoint(here / "other", name)
    shape = load_model("other", FLOAT32).rope.shape
    rows = (unscaled(shape.pairs, ORIGINAL), unscaled(shape.pairs, TARGET))
    FactorTable(shape.rope_theta, shape.rotary_dim, ORIGINAL, rows).save("other.json")
    given: dict[str, Any] = {"model": "other", "factors": "other.json", "steps": 4, "save_every": 1, "keep": 9}
    whole = train(**given)["losses"]
    weights = load_file("run/checkpoint/model.safetensors")
    unfinish_training(Path("run"))
    for step in (3, 4):
        shutil.rmtree(f"run/checkpoints/checkpoint-{step}")
    assert train(**given)["losses"] == whole
    again = load_file("run/checkpoint/model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)


@pytest.mark.usefixtures("here")
def test_a_checkpoint_with_weights_under_other_names_is_not_gone_on_with() -> None:
    given: dict[str, Any] = {"steps": 2, "save_every": 1}
    train(**given)
    unfinish_training(Path("run"))
    shutil.rmtree("run/checkpoints/checkpoint-2")
    path = Path("run/checkpoints/checkpoint-1")
    weights = load_file(path / "model.safetensors")
    weights["model.other.weight"] = weights.pop("model.norm.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    mark_whole(path, json.loads((path / "longrope.json").read_text())["of"])
    with pytest.raises(
        UserError, match=r"^checkpoint: got run/checkpoints/checkpoint-1: weights under other names than"
    ):
        train(**given)


def test_a_loss_that_a_class_adds_is_refused() -> None:
    model: Any = cast(Any, AutoModelForCausalLM).from_config(_MIXED["bamba"])
    model.config.z_loss_coefficient = 0.01
    with (
        pytest.raises(UserError, match=r"^model: got z_loss_coefficient in its config; .* set it to 0$"),
        chunked_loss(model),
    ):
        pass


# Processes that share a window


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shared_window_is_refused_before_it_trains_exactly_where_accelerate_would_or_should(
    name: str, tmp_path: Path
) -> None:
    """accelerate refuses any sliding window, also one that is as wide as the window of tokens, as Mistral's is made."""
    write_checkpoint(tmp_path / "model", name)
    loaded = load_model(str(tmp_path / "model"), FLOAT32)
    config, ids = loaded.model.config.get_text_config(), torch.arange(ORIGINAL)[None]
    window = getattr(config, "sliding_window", None)
    if name == "gpt_oss" or (has_local_layers(config) and set(config.layer_types) != {EXTENDED_LAYERS}):
        rule = "; processes share a window where every layer attends to all of it; use FSDP without"
        with pytest.raises(UserError, match=rule):
            check_shareable(loaded)
        return
    if name in ("gpt_neox", "falcon"):
        with pytest.raises(
            UserError, match="whose attention has another name; accelerate shares layers named self_attn"
        ):
            check_shareable(loaded)
        return
    check_shareable(loaded)
    with loaded.patch() as patch:
        patch.widen_window(TARGET)
        whole = loaded.model(input_ids=ids).logits
    with loaded.patch() as patch:
        patch.widen_window(TARGET, shared=True)
        assert torch.equal(loaded.model(input_ids=ids).logits, whole)
        _attach_context_parallel_hooks(loaded.model)
    assert getattr(config, "sliding_window", None) == window


@pytest.mark.parametrize(("name", "told"), [("bamba", "with layers of linear_att"), ("lfm2", "with layers of conv")])
def test_states_and_convolutions_do_not_share_a_window(name: str, told: str, tmp_path: Path) -> None:
    save(cast(Any, AutoModelForCausalLM).from_config(_MIXED[name]), tmp_path / "carries")
    with pytest.raises(UserError, match=told):
        check_shareable(load_model(str(tmp_path / "carries"), FLOAT32))


def test_flash_attention_is_looked_at_in_half_precision_and_refused_in_float32(here: Path) -> None:
    loaded = load_model(str(here / "model"), LoadOptions(device="cpu", dtype="autocast"))
    with loaded.looking():
        assert not torch.is_autocast_enabled("cpu")
    with replace(loaded, options=replace(loaded.options, attention="flash_attention_2")).looking():
        assert torch.is_autocast_enabled("cpu")
    words = ["--length", TARGET, "-f", "good.json", "-d", "texts", "--attention", "flash_attention_2"]
    assert refused("finetune", "model", *words, "--dtype", "float32") == (
        "--attention: got 'flash_attention_2' in float32; flash attention has kernels for half precision; "
        "give --dtype autocast or bfloat16"
    )
