"""Fine-tuning by several processes: the losses of one, with FSDP too; what a shard of a window knows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, trainer
from transformers.masking_utils import create_causal_mask

from architectures_small import small_config
from commands import TARGET, Ran, contents, table, unfinish_training
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.model import load_model
from longrope.training.run import finetune, served_table
from longrope.training.settings import Training
from longrope.training.windows import collate_shared
from longrope.training.world import World
from models import ORIGINAL, save

CONFIGURATIONS = Path(__file__).parents[1] / "examples" / "accelerate"
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
mixed_precision: "no"
num_machines: 1
num_processes: 2
main_process_port: 0
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""
STEPS = 6
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHARDED = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml"]
GIVEN: dict[str, Any] = {"length": TARGET, "steps": STEPS, "batch": 4, "learning_rate": 1e-3, "save_every": 2}


@pytest.fixture(scope="module")
def ground(ground: Path) -> Path:
    folder = ground
    (folder / "fsdp.yaml").write_text(FSDP)
    options = LoadOptions(device="cpu", dtype="float32", threads=1)
    where: dict[str, Any] = {
        "documents": [str(folder / "texts")],
        "factors": folder / "good.json",
        "out": folder / "one",
    }
    finetune(str(folder / "model"), options=options, tracker="none", **where, **GIVEN)
    finetune(
        str(folder / "model"), options=options, tracker="none", mixed=0.5, **where | {"out": folder / "mixed"}, **GIVEN
    )
    return folder


@pytest.fixture
def here(ground: Path, tmp_path: Path) -> Path:
    shutil.copytree(ground, tmp_path / "here")
    return tmp_path / "here"


def words(launcher: list[str], *more: object, out: str = "run") -> list[str]:
    given = ["-m", "longrope", "finetune", "model", "--factors", "good.json", "--documents", "texts", "--out", out]
    for name, value in GIVEN.items():
        given += [f"--{name.replace('_', '-')}", str(value)]
    given += ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--tracker", "none"]
    return [*launcher, *given, *map(str, more)]


def launch(here: Path, launcher: list[str], *more: object, out: str = "run") -> Ran:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = words(launcher, *more, out=out)
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=240, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "training.jsonl").read_text().splitlines()]


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == pytest.approx(losses(other), rel=1e-5)
    ours, theirs = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (run, other))
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        # Adam divides by the root of a second moment: where a gradient is next to nothing, its last digits count.
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("launcher", [TORCHRUN, SHARDED], ids=["two-copies", "fsdp"])
def test_two_processes_train_as_one_does(here: Path, launcher: list[str]) -> None:
    ran = launch(here, launcher, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["losses"] == losses(here / "run"), "one JSON document, of the first process"
    assert_same(here / "run", here / "one")
    state = here / "run" / "checkpoints" / f"checkpoint-{STEPS}"
    assert (state / "optimizer_0").is_dir() == (launcher is SHARDED), "FSDP keeps its state in shards"


@pytest.mark.parametrize("launcher", [TORCHRUN, SHARDED], ids=["two-copies", "fsdp"])
def test_mixed_windows_are_the_same_for_two_processes(here: Path, launcher: list[str]) -> None:
    ran = launch(here, launcher, "--mixed", 0.5)
    assert ran.code == 0, ran.err
    assert_same(here / "run", here / "mixed")


@pytest.mark.parametrize(("family", "launcher"), [("ernie4_5_moe", TORCHRUN), ("gemma3", SHARDED)])
def test_classes_with_parts_that_take_no_part_train_in_two_processes(
    family: str, launcher: list[str], here: Path
) -> None:
    """Ernie 4.5 chooses experts by biases that no gradient reaches, Gemma 3 names layers of a tower that it has not."""
    torch.manual_seed(0)
    own: Any = AutoModelForCausalLM
    save(own.from_config(small_config(family)), here / "model")
    shape = load_model(str(here / "model"), LoadOptions(device="cpu", dtype="float32", threads=1)).rope.shape
    rows = (unscaled(shape.pairs, ORIGINAL), unscaled(shape.pairs, TARGET))
    FactorTable(shape.rope_theta, shape.rotary_dim, ORIGINAL, rows).save(here / "good.json")
    assert launch(here, [sys.executable], out="alone").code == 0
    ran = launch(here, launcher)
    assert ran.code == 0, ran.err
    assert losses(here / "run") == pytest.approx(losses(here / "alone"), rel=1e-4)


def test_shards_in_bfloat16_have_the_losses_of_one_process(here: Path) -> None:
    """Gradients of several passes a step are summed, tokens counted and losses told in float32 there, too."""
    more = ["--dtype", "autocast", "--mixed", 0.5, "--batch", 8]
    alone = launch(here, [sys.executable], *more, out="alone")
    assert alone.code == 0, alone.err
    ran = launch(here, SHARDED, *more)
    assert ran.code == 0, ran.err
    ours, theirs = losses(here / "run"), losses(here / "alone")
    assert ours == pytest.approx(theirs, rel=1e-3), "gathered weights are bfloat16"
    assert any(torch.tensor(each).bfloat16().item() != each for each in ours)


def test_two_processes_that_are_killed_go_on_from_their_shards(here: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words(SHARDED), cwd=here, env=environment, start_new_session=True)
    mark = here / "run" / "checkpoints" / "checkpoint-2" / "longrope.json"
    until = time.monotonic() + 120
    while not mark.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert mark.exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ran = launch(here, SHARDED)
    assert ran.code == 0, ran.err
    assert_same(here / "run", here / "one")
    again = launch(here, SHARDED, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["losses"] == losses(here / "run"), "a finished run is read"


def test_a_training_goes_on_with_the_kind_of_launcher_that_it_began_with(here: Path) -> None:
    """What one process wrote is no shards, and shards are not whole: neither is damaged, and nothing is removed."""
    alone = [sys.executable]
    for launcher, other, held in ((alone, SHARDED, "whole state"), (SHARDED, alone, "shards (FSDP)")):
        assert launch(here, launcher, out=held).code == 0
        unfinish_training(here / held)
        before = contents(here / held)
        ran = launch(here, other, out=held)
        told = [line for line in ran.err.splitlines() if line.startswith("longrope: ")]
        assert ran.code != 0
        assert told[0].startswith(
            f"longrope: checkpoint: got {held}/checkpoints/checkpoint-{STEPS}, which holds {held}, in"
        )
        assert told[0].endswith("; start it with the launcher and configuration that it began with")
        assert contents(here / held) == before
        assert launch(here, launcher, out=held).code == 0
        assert_same(here / held, here / "one")


def test_shards_that_a_full_disk_refuses_are_told_in_a_line(here: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 20; exec "$@"', "sh", *SHARDED]
    ran = launch(here, limited)
    told = [line for line in ran.err.splitlines() if line.startswith("longrope: ")]
    assert ran.code != 0
    assert told, ran.err
    assert all(line.startswith("longrope: output: got run (") for line in told), told
    assert "CheckpointException" not in ran.err
    ran = launch(here, SHARDED)
    assert ran.code == 0, ran.err
    assert_same(here / "run", here / "one")


def test_a_shard_of_a_window_needs_no_mask_of_its_pairs(here: Path) -> None:
    """Its positions leap from its first piece to its second, which alone looks like packed documents."""
    loaded = load_model(str(here / "model"), LoadOptions(device="cpu", dtype="float32", attention="sdpa"))
    windows = [{name: torch.arange(TARGET) % 200 for name in ("input_ids", "labels")}]
    batch = collate_shared(windows)
    pieces = torch.arange(TARGET)[None].chunk(4, dim=1)
    shard = torch.cat([pieces[0], pieces[3]], dim=1)
    given: dict[str, Any] = {"config": loaded.model.config, "inputs_embeds": torch.zeros(1, shard.shape[1], 8)}
    given |= {"position_ids": shard, "cache": None}
    masks = [create_causal_mask(attention_mask=mask, **given) for mask in (None, batch["attention_mask"][:, shard[0]])]
    assert masks[0] is not None
    assert masks[1] is None
    causal: Any = trainer.is_attention_mask_causal  # type: ignore[attr-defined]
    assert causal(batch["attention_mask"]), "Trainer refuses others"


def test_adapters_of_shards_are_merged(here: Path) -> None:
    alone = launch(here, [sys.executable], "--lora", 4, "--merge", out="alone")
    assert alone.code == 0, alone.err
    ran = launch(here, SHARDED, "--lora", 4, "--merge")
    assert ran.code == 0, ran.err
    assert_same(here / "run", here / "alone")


ROOM = """
import os, sys
from longrope.training import arguments
own = arguments.free_memory
arguments.free_memory = lambda device: own(device) if os.environ["RANK"] == "0" else 2 * 18 * 10**5
from longrope.__main__ import main
main()
"""


def test_processes_with_unequal_memory_have_the_windows_of_one(here: Path) -> None:
    """Each alone would have chosen how many run together, and others than those of the step would have been read."""
    (here / "unequal.py").write_text(ROOM)
    command = words(TORCHRUN, "--batch", 8)
    command[command.index("longrope") - 1 : command.index("longrope") + 1] = ["unequal.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    alone = launch(here, [sys.executable], "--batch", 8, out="alone")
    assert alone.code == 0, alone.err
    assert_same(here / "run", here / "alone")


def test_bad_input_of_several_processes_is_told_once(here: Path) -> None:
    ran = launch(here, TORCHRUN, "--batch", 3)
    told = [line for line in ran.err.splitlines() if line.startswith("longrope: ")]
    assert told == [
        "longrope: --batch: got 3; 2 processes share a batch evenly; give a multiple of 2",
    ], ran.err
    assert ran.code != 0
    assert not (here / "run").exists()


def test_a_shard_of_a_window_has_the_angles_that_it_has_in_the_whole(here: Path) -> None:
    """The regime is that of the whole window, too: shards in its middle are shorter than a table's first row."""
    loaded = load_model(str(here / "model"), LoadOptions(device="cpu", dtype="float32"))
    long = table().rows[-1]
    both = replace(table(), rows=(unscaled(len(long.rescale), TARGET // 2), long))
    served = served_table(both, Training(length=TARGET), ORIGINAL)
    assert served.rows == (long,)
    rows: list[FactorTable | RopeFactors] = [
        served,
        table().rows[-1],
        RopeFactors(TARGET, tuple(1.0 + 0.5 * pair for pair in range(8)), start_tokens=12, attention_factor=1.2),
    ]
    processes, whole = 4, torch.arange(TARGET)[None]
    pieces = whole.chunk(2 * processes, dim=1)
    for row in rows:
        with loaded.patch() as patch:
            patch.install(row)
            rotary = patch._places[0][3]
            x = torch.zeros(1, TARGET, 1)
            cos, sin = rotary(x, whole)
            for rank in range(processes):  # one piece from either end, as torch's context parallelism deals them out
                shard = torch.cat([pieces[rank], pieces[2 * processes - 1 - rank]], dim=1)
                mine = rotary(x[:, : shard.shape[1]], shard)
                assert torch.equal(mine[0], cos[:, shard[0]])
                assert torch.equal(mine[1], sin[:, shard[0]])


@pytest.mark.parametrize(
    ("world", "given", "message"),
    [
        (World(size=8), {"batch": 12}, "--batch: got 12; 8 processes share a batch evenly; give a multiple of 8"),
        (
            World(size=8, window_size=8),
            {"batch": 1, "length": 40},
            "--length: got 40 tokens; 8 processes share a window",
        ),
        (World(size=6, window_size=4), {"batch": 1}, "processes: got 6 processes; 4 of them share a window"),
        (World(size=8, window_size=8), {"mixed": True}, "--mixed: got 8 processes to a window; attention of a packed"),
        (
            World(size=8, window_size=8),
            {"attention": "eager"},
            "--attention: got 'eager'; context parallelism is torch's, of its own attention; leave it out",
        ),
    ],
)
def test_what_processes_cannot_share_is_told(world: World, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        world.check(**({"batch": 8, "length": 4096, "mixed": False} | given))
    assert str(told.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "processes", "window_size", "windows"),
    [("1-gpu", 1, 1, 1), ("8-gpus", 8, 1, 8), ("8-gpus-one-window", 8, 8, 1), ("64-gpus", 64, 8, 8)],
)
def test_the_configurations_are_what_they_say(
    name: str, processes: int, window_size: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import ParallelismConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = CONFIGURATIONS / f"{name}.yaml"
    assert "finetune MODEL" in path.read_text()
    described = yaml.safe_load(path.read_text())
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for part in ("fsdp_config", "parallelism_config"):  # accelerate reads over what it does not know in these
        assert set(described.get(part, {})) <= set(known)
    more = ["--machine_rank", "0", "--main_process_ip", "first"] if processes > 8 else []
    given = launch_command_parser().parse_args(["--config_file", str(path), *more, "script.py"])
    with monkeypatch.context() as context:  # it looks for as many GPUs as it is to use
        context.setattr(torch.cuda, "is_available", lambda: True)
        context.setattr(torch.cuda, "device_count", lambda: 8)
        arguments, *_ = _validate_launch_command(given)
    assert (arguments.num_processes, arguments.mixed_precision) == (processes, "bf16")
    environment = prepare_multi_gpu_env(arguments) if processes > 1 else {}
    for key in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", *(key for key in environment if key.startswith("PARALLELISM"))):
        if key in environment:
            monkeypatch.setenv(key, environment[key])
    monkeypatch.setenv(
        "ACCELERATE_USE_PARALLELISM_CONFIG", environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false")
    )
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    world = World.told()
    assert (world.size, world.window_size, world.windows_at_once) == (processes, window_size, windows)
    assert world.sharded == (processes > 1)
    world.check(batch=32, length=131072, mixed=False)
    if window_size > 1:
        assert ParallelismConfig().total_size == processes
        assert environment["FSDP_VERSION"] == "2"


_FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_one_process_has_nothing_to_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _FSDP2.items():
        monkeypatch.setenv(name, value)
    assert World.told() == World()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert World.told() == World(sharded=True), "accelerate has launched it, and shards"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "processes: got tensor parallelism over 2 processes; weights are sharded by FSDP, windows by context",
        ),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "4"},
            "processes: got sequence parallelism over 4 processes; it is DeepSpeed's, which is not used; share",
        ),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "processes: got fsdp_version 1; weights are sharded by version 2; set it so in the configuration",
        ),
        (
            {"WORLD_SIZE": "2", **_FSDP2, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
            "processes: got fsdp_state_dict_type FULL_STATE_DICT; a training goes on from shards: SHARDED_STATE_DICT;",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "processes: got DeepSpeed; weights are sharded by FSDP, whose checkpoints are written whole here",
        ),
    ],
)
def test_what_is_not_ours_to_shard_with_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as told:
        World.told()
    assert str(told.value).startswith(message)
