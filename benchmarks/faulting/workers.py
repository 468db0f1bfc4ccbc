"""A Ray worker killed in the middle of a search, and a whole node of a cluster lost: the search ends as ever."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from faulting.child import PATIENCE
from faulting.ground import Undisturbed
from faulting.tally import LOST, TRACEBACK, WRONG, Case, Tally

_SEARCH = "search hybrid"
_COMMAND = [sys.executable, "-c", "from longrope.cli import main; main()"]
_SAME = ("factors.json", "metrics.json", "config.json")


def cases(made: Mapping[str, Undisturbed], seed: int, workers: int = 4, nodes: int = 2) -> list[Case]:
    """Workers and nodes that are lost at a random line of the search's results; none where Ray is not installed."""
    if _SEARCH not in made or importlib.util.find_spec("ray") is None:
        return []
    found = []
    for lose, times, what in ((worker_lost, workers, "a worker lost"), (node_lost, nodes, "a node lost")):
        for index in range(times):
            rng = np.random.default_rng((seed, index))
            found.append(Case(_SEARCH, "workers", f"{what} {index}", partial(lose, made[_SEARCH], rng)))
    return found


def worker_lost(undisturbed: Undisturbed, rng: np.random.Generator, tally: Tally) -> None:
    """kill -9 of one of two local workers."""

    def kill(process: subprocess.Popen[str]) -> None:
        workers = [each for each in psutil.Process(process.pid).children(recursive=True) if _is_worker(each)]
        workers[int(rng.integers(len(workers)))].kill()
        tally.count("workers lost")

    _searched(undisturbed, "2", rng, kill, tally)


def node_lost(undisturbed: Undisturbed, rng: np.random.Generator, tally: Tally) -> None:
    """A cluster of three nodes, of which the two others work; one of these ends without a word."""
    with _cluster() as (cluster, nodes):

        def lose(process: subprocess.Popen[str]) -> None:
            cluster.remove_node(nodes[int(rng.integers(len(nodes)))], allow_graceful=False)
            tally.count("nodes lost")

        _searched(undisturbed, f"ray:{cluster.address}", rng, lose, tally)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::_Worker")
    except psutil.Error:
        return False


@contextmanager
def _cluster() -> Iterator[tuple[Any, list[Any]]]:
    """Ray's own way of several nodes on one machine: processes of their own for each, which are killed."""
    for name in ("LD_PRELOAD", "LONGROPE_FAULTS_SO"):
        os.environ.pop(name, None)
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # short: it holds sockets
        store = {"object_store_memory": 10**8}
        cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": folder, **store},
        )
        try:
            yield cluster, [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
        finally:
            cluster.shutdown()


def _searched(
    undisturbed: Undisturbed,
    workers: str,
    rng: np.random.Generator,
    lose: Callable[[subprocess.Popen[str]], None],
    tally: Tally,
) -> None:
    """A search on workers, of which something is lost at some line; its results beside those of one process."""
    folder, place = undisturbed.fresh(), undisturbed.command.makes[0]
    lines = folder / place / "evaluations.jsonl"
    total = (undisturbed.made / place / "evaluations.jsonl").read_bytes().count(b"\n")
    at = int(rng.integers(1, total * 2 // 3))
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    words = [*_COMMAND, *map(str, undisturbed.command.arguments), "--workers", workers]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder, env=environment, **pipes) as process:
        end = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < end:
            if lines.exists() and lines.read_bytes().count(b"\n") >= at:
                lose(process)
                break
            time.sleep(0.002)
        try:
            _, said = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            tally.trouble(LOST, "the search does not go on without what was lost")
            return
    if process.returncode != 0 or "Traceback" in said:
        tally.trouble(TRACEBACK, f"exit {process.returncode}: {said.strip()[-500:]}")
        return
    left = {name: value for name, value in undisturbed.left.items() if Path(name).name in _SAME}
    differing = [name for name in undisturbed.differs(folder) if name in left]
    if differing:
        tally.trouble(WRONG, f"other than in one process: {', '.join(differing)}")
