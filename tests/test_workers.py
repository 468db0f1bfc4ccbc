"""Workers on real Ray: what they compute, and what becomes of a search when they, or the cluster, do not answer."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from commands import write_documents
from longrope import ray_cluster
from longrope.checkpoint import LoadOptions, _check_quantize
from longrope.errors import UserError
from longrope.factors import RopeFactors
from longrope.model import LoadedModel, load_model
from longrope.ray_cluster import parse_workers
from longrope.search.driver import SearchWindows, search, search_windows
from longrope.search.loop import Progress
from longrope.search.objective import Evaluator
from longrope.search.settings import SearchSettings
from longrope.search.tasks import Outcome, Task
from longrope.windows import Window
from longrope.workers import Workers, open_workers, options_for, share_out
from models import ORIGINAL, build, save, tokens

OPTIONS = LoadOptions(device="cpu", threads=1)
LENGTH = 4 * ORIGINAL
OUT_OF_MEMORY, DEADLY = 72, 80  # tokens, for the model of `with_faults`


def windows(*lengths: int) -> list[Window]:
    return [Window("d", "0", 0, tokens(length, seed=index)[0].numpy()) for index, length in enumerate(lengths)]


def tasks(count: int, gradient: bool = False) -> list[Task]:
    rows = [RopeFactors(up_to=LENGTH, rescale=tuple(1 + 0.1 * i * n for i in range(8))) for n in range(count)]
    return [Task(row, (0, 2) if n % 2 else (0, 1, 2), gradient) for n, row in enumerate(rows)]


def numbers(outcomes: Sequence[Outcome]) -> list[Any]:
    """All of them but the seconds: equal when every bit is."""
    return [(each.losses, each.tokens, each.gradient, each.recomputed) for each in outcomes]


def in_order(workers: Workers[Task, Outcome], wanted: Sequence[Task]) -> list[Any]:
    found = dict(workers.run(wanted))
    assert sorted(found) == list(range(len(wanted)))
    return numbers([found[index] for index in range(len(wanted))])


def here(loaded: LoadedModel, spans: Sequence[Window], wanted: Sequence[Task]) -> list[Any]:
    with open_workers(None, loaded, partial(Evaluator, windows=spans)) as workers:
        assert workers.count == 1
        return in_order(workers, wanted)


def processes(of: psutil.Process, name: str) -> list[psutil.Process]:
    return [each for each in of.children(recursive=True) if " ".join(each.cmdline()).startswith(name)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a cluster of two CPUs that `ray start` started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # short: it holds sockets
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        ray += ["--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=100000000"]
        env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
        with subprocess.Popen(ray, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True) as head:
            assert head.stdout is not None
            for line in head.stdout:
                if "Ray runtime started" in line:
                    break
            yield f"127.0.0.1:{port}"
            assert head.poll() is None, "the cluster went on while tests used it"
            head.terminate()
            head.stdout.read()


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model with a sliding window, widened as a search widens it."""
    loaded = load_model(str(save(build("mistral"), tmp_path_factory.mktemp("models") / "mistral")), OPTIONS)
    loaded.widen_window(LENGTH)
    return loaded


def test_two_workers_compute_what_one_process_does_and_again_when_one_is_killed(
    mistral: LoadedModel, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    spans, wanted = windows(LENGTH, LENGTH, LENGTH), [*tasks(5), *tasks(3, gradient=True)]
    reference = here(mistral, spans, wanted)
    handler = signal.getsignal(signal.SIGTERM)
    caplog.set_level(logging.INFO, logger="longrope")
    with open_workers("2", mistral, partial(Evaluator, windows=spans)) as workers:
        assert workers.count == 2
        assert in_order(workers, wanted) == reference
        assert "died" not in caplog.text
        found: dict[int, Outcome] = {}
        # One that computes: on a busy machine the other one may still be starting, and is not missed. It is looked up
        # first, and there is a lot to do, so that not all is done before it is killed.
        victim = max(processes(psutil.Process(), "ray::_Worker"), key=lambda each: sum(each.cpu_times()[:2]))
        for index, outcome in workers.run(wanted * 10):
            if not found:
                victim.kill()
            found[index] = outcome
        assert numbers([found[index] for index in range(len(wanted) * 10)]) == reference * 10
        assert "a worker died: The actor died" in caplog.text
        for _ in workers.run(wanted):  # left early, as at the end of a budget
            break
        assert in_order(workers, wanted[:2]) == reference[:2]
        started = psutil.Process().children(recursive=True)
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "".join(capfd.readouterr()) == ""


def test_a_search_with_two_workers_of_which_one_is_killed_writes_the_same_factors(
    mistral: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_documents(tmp_path / "texts", count=6)
    caplog.set_level(logging.INFO, logger="longrope")
    settings: dict[str, Any] = {"to": LENGTH, "documents": [str(tmp_path / "texts")], "windows": 3}
    settings |= {"gradient_windows": 6, "start_tokens": "search"}
    search(mistral.name, out=tmp_path / "here", threads=1, device="cpu", **settings)
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        if not killed and "descent" in progress.origin:
            (first, *_) = processes(psutil.Process(), "ray::_Worker")
            killed.append(first.pid)
            first.kill()

    search(mistral.name, out=tmp_path / "two", workers=2, device="cpu", on_progress=kill_one, **settings)
    assert killed
    assert "a worker died" in caplog.text
    for name in ("config.json", "factors.json"):
        written = [json.loads((tmp_path / run / name).read_text()) for run in ("here", "two")]
        for each in written:
            each.pop("ignored", None)  # the command line
        assert written[0] == written[1], name

    def told(run: str) -> list[Any]:
        lines = [json.loads(line) for line in (tmp_path / run / "evaluations.jsonl").read_text().splitlines()]
        return sorted((line["key"], line["losses"], line.get("gradient")) for line in lines)

    assert told("here") == told("two")


def test_a_loaded_model_is_not_searched_with_options_or_threads_that_it_has_not(mistral: LoadedModel) -> None:
    with pytest.raises(UserError, match="options: got dtype; a model that is loaded keeps its own options; give them"):
        search(mistral, to=LENGTH, documents=["texts"], dtype="float32")
    free = replace(mistral, options=LoadOptions(device="cpu"))
    with pytest.raises(UserError, match=r"--workers: got a model loaded without --threads; .*threads=1"):
        search_windows(free, SearchSettings(to=LENGTH), SearchWindows(windows(LENGTH)), workers="2")


def test_a_cluster_is_used_and_left_running(
    mistral: LoadedModel, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(mistral.name)
    monkeypatch.chdir(folder.parent)  # a relative name means the same to workers, which live elsewhere
    loaded = load_model(folder.name, options_for(f"ray:{cluster}", LoadOptions(device="cpu")))
    spans = windows(LENGTH, LENGTH, LENGTH)
    reference = here(loaded, spans, tasks(4))
    assert reference != here(mistral, spans, tasks(4)), "the window is not widened here"
    with open_workers(f"ray:{cluster}", loaded, partial(Evaluator, windows=spans)) as workers:
        assert workers.count == 2
        assert in_order(workers, tasks(4)) == reference
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    save(build("mistral", rms_norm_eps=1e-3), folder)
    with pytest.raises(UserError) as caught, open_workers("ray", loaded, partial(Evaluator, windows=spans)):
        pass
    assert str(caught.value).startswith(f"model of a worker on {socket.gethostname()}: got another checkpoint")


FAULTS = f"""
import os, torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(self.fail, with_kwargs=True)

    def fail(self, module, args, kwargs):
        if kwargs["input_ids"].shape[1] == {DEADLY}:
            os.kill(os.getpid(), 9)
        if kwargs["input_ids"].shape[1] == {OUT_OF_MEMORY}:
            raise torch.OutOfMemoryError
"""


def with_faults(folder: Path) -> Path:
    """A checkpoint whose own code runs out of memory at one length, and kills its process at another."""
    save(build("llama"), folder)
    described = json.loads((folder / "config.json").read_text())
    described["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    described |= {"model_type": "own", "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "own.py").write_text(FAULTS)
    return folder


def test_errors_of_a_task_are_told_here_and_a_task_that_kills_every_worker_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    options = LoadOptions(device="cpu", dtype="float32", threads=1, trust_remote_code=True)
    loaded = load_model(str(with_faults(tmp_path / "own")), options)
    spans = windows(ORIGINAL, OUT_OF_MEMORY, DEADLY)
    good, too_long, deadly = (Task(RopeFactors(up_to=LENGTH, rescale=(2.0,) * 8), (index,)) for index in range(3))
    with pytest.raises(UserError) as expected:
        here(loaded, spans, [too_long])
    assert "use at most 36 tokens" in str(expected.value)
    with open_workers(f"ray:{cluster}", loaded, partial(Evaluator, windows=spans)) as workers:
        with pytest.raises(UserError) as caught:
            in_order(workers, [good, too_long])
        assert (type(caught.value), str(caught.value)) == (UserError, str(expected.value))
        with pytest.raises(UserError) as caught:
            in_order(workers, [good, deadly])
    assert str(caught.value).startswith("--workers: got 3 workers that died of one evaluation (")
    assert "a worker lives to end it; see that each has the memory" in str(caught.value)


def test_a_driver_that_is_interrupted_leaves_no_process(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    script = (
        "import sys, numpy as np\n"
        "from longrope.console import end_at_once_on_signals\n"
        "from longrope.checkpoint import LoadOptions\n"
        "from longrope.model import load_model\n"
        "from longrope.windows import Window\n"
        "from functools import partial\n"
        "from longrope.search.objective import Evaluator\n"
        "from longrope.workers import open_workers, options_for\n"
        "from transformers.utils import logging; logging.disable_progress_bar()\n"
        "end_at_once_on_signals()\n"
        f"loaded = load_model({str(folder)!r}, options_for('1', LoadOptions(device='cpu')))\n"
        "with open_workers('1', loaded, partial(Evaluator, windows=[Window('d', '0', 0, np.arange(9))])):\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    # A home of its own: here Ray starts as it does for a user, and says nothing of the token that it makes.
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], env=env, text=True, **pipes) as driver:
        assert driver.stdout is not None
        assert driver.stderr is not None
        assert driver.stdout.readline() == "ready\n"
        started = psutil.Process(driver.pid).children(recursive=True)
        assert processes(psutil.Process(driver.pid), "ray::")
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=10) == 130
        assert psutil.wait_procs(started, timeout=15)[1] == []
        assert driver.stderr.read() == "longrope: interrupted\n"


def refusal(workers: str, options: LoadOptions = OPTIONS) -> str:
    with pytest.raises(UserError) as caught:
        options_for(workers, options)
    return str(caught.value)


@pytest.mark.parametrize("given", ["0", "-1", "abc", "1.5", "", "ray:", "ray:host", "ray:host:0", "ray:host:port"])
def test_malformed_workers_are_refused(given: str) -> None:
    assert refusal(given).startswith(f"--workers: got {given!r}; it is a number of at least 1, ray, or ray:HOST:PORT")


def test_what_may_be_asked_for() -> None:
    asked = [parse_workers(given) for given in ("3", "ray", "ray:10.0.0.1:6379", "ray:[::1]:6379")]
    assert [(place.count, place.address) for place in asked] == [
        (3, None),
        (None, "auto"),
        (None, "10.0.0.1:6379"),
        (None, "[::1]:6379"),
    ]


def test_an_evaluation_has_one_thread_with_workers_unless_told_otherwise() -> None:
    assert options_for(None, LoadOptions()).threads is None
    assert options_for("2", LoadOptions()).threads == 1
    assert options_for("2", LoadOptions(threads=3)).threads == 3


def test_an_address_where_nothing_listens_is_refused_before_a_model_is_loaded() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and never listens
        port = closed.getsockname()[1]
        message = refusal(f"ray:127.0.0.1:{port}")
    assert message.startswith(f"--workers: got no Ray cluster at 127.0.0.1:{port} (")
    assert "start one with `ray start --head`" in message


def test_an_address_that_is_not_rays_is_refused(mistral: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrope.ray_cluster._CONNECT_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError) as caught:
            open_workers(f"ray:{address}", mistral, partial(Evaluator, windows=windows(LENGTH)))
    assert f"got no Ray cluster at {address} (nothing heard in 3 seconds)" in str(caught.value)


def test_without_ray_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python marks what cannot be imported
    message = refusal("2")
    assert message.startswith("--workers: got no Ray here (")
    assert message.endswith('workers are Ray\'s; install it with: pip install "longrope[ray]"')


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray forgets processes of its own
def test_a_ray_that_does_not_start_is_one_line_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = psutil.Process().children(recursive=True)
    monkeypatch.setattr(ray_cluster, "_OBJECT_STORE", 1)  # bytes, fewer than it takes
    with pytest.raises(
        UserError, match=r"^--workers: got no start of Ray \(.+\); it starts; run the same command again"
    ):
        ray_cluster.Cluster(ray_cluster.import_ray(), parse_workers("1"), cpus=1, gpus=0, stored=0)
    assert not ray_cluster.import_ray().is_initialized()
    assert (
        psutil.wait_procs([each for each in psutil.Process().children(recursive=True) if each not in before])[1] == []
    )


@pytest.mark.parametrize(
    ("nodes", "wanted", "cuda", "spread", "threads", "expected"),
    [
        ([(8, 0), (3, 0)], None, False, False, 2, (5, 0.0)),  # a worker lies on one machine
        ([(2, 0)], 4, False, False, 1, (4, 0.0)),
        ([(1, 8), (1, 4)], None, True, False, 4, (12, 1.0)),
        ([(1, 8)], 4, True, False, 1, (4, 1.0)),
        ([(1, 2)], 3, True, False, 1, (3, 0.5)),  # two share a GPU
        ([(1, 8)], 3, True, True, 1, (3, 2.0)),
        ([(1, 8), (1, 4)], None, True, True, 1, (3, 4.0)),
    ],
)
def test_workers_share_out_what_machines_have(
    nodes: list[tuple[int, int]],
    wanted: int | None,
    cuda: bool,
    spread: bool,
    threads: int,
    expected: tuple[int, float],
) -> None:
    resources = [{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus} for cpus, gpus in nodes]
    assert share_out(resources, wanted, cuda=cuda, spread=spread, threads=threads) == expected


@pytest.mark.parametrize(
    ("node", "wanted", "cuda", "message"),
    [
        ({"CPU": 2}, None, False, "got a cluster without 4 CPUs on one machine"),
        ({"CPU": 8}, None, True, "got a cluster without GPUs"),
        ({"CPU": 8, "GPU": 2}, 3, True, "got 3; there are 2 GPUs"),
    ],
)
def test_workers_that_find_no_room_are_refused(
    node: dict[str, float], wanted: int | None, cuda: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        share_out([node], wanted, cuda=cuda, spread=True, threads=4)


def test_a_users_error_comes_back_from_another_process_as_it_was() -> None:
    error = UserError("--to", got=np.int64(3), rule="it is more", do="give more")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.what, again.do) == (UserError, str(error), "--to", "give more")


def test_quantized_bases_are_for_cuda() -> None:
    with pytest.raises(UserError, match="--quantize: got '3bit'; it is one of 8bit, 4bit"):
        LoadOptions(device="cpu", quantize="3bit")
    with pytest.raises(UserError, match="--quantize: got 4bit without CUDA; bitsandbytes quantizes on CUDA"):
        LoadOptions(device="cpu", quantize="4bit")


def test_without_bitsandbytes_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with pytest.raises(UserError, match=r'install it with: pip install "longrope\[quantize\]"'):
        _check_quantize("8bit", on_cuda=True)
