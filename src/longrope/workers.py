"""Where tasks on a model are done: in this process, or by Ray workers on this machine or on a cluster."""

from __future__ import annotations

import logging
import math
import pickle
import socket
import textwrap
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from longrope.checkpoint import TINY, LoadOptions
from longrope.errors import UserError
from longrope.model import LoadedModel, load_model
from longrope.ray_cluster import Cluster, Place, check_listens, import_ray, parse_workers

logger = logging.getLogger(__name__)

_DEATHS = 3
"""So many workers may die of one task, and so many in a row while they load the model."""
_START_SECONDS = 300.0
"""How long a cluster may take to give the first worker a process; loading the model is not counted."""


_TaskT = TypeVar("_TaskT")
_OutcomeT = TypeVar("_OutcomeT")
_TaskIn = TypeVar("_TaskIn", contravariant=True)
_OutcomeOut = TypeVar("_OutcomeOut", covariant=True)


class Doer(Protocol[_TaskIn, _OutcomeOut]):
    """Does tasks on a model that it may change; `close` puts that back."""

    def __call__(self, task: _TaskIn) -> _OutcomeOut:
        """Do a task. Raises UserError for what the user can mend."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...


# What makes a doer of a model; picklable, because each worker is sent it.
Make = Callable[[LoadedModel], Doer[_TaskT, _OutcomeT]]


class Workers(Protocol[_TaskIn, _OutcomeOut]):
    """Something that does tasks, and a context manager. count: how many can go on at once."""

    @property
    def count(self) -> int: ...  # noqa: D102

    def run(self, tasks: Sequence[_TaskIn]) -> Iterator[tuple[int, _OutcomeOut]]:
        """Do tasks in any order: (index into tasks, outcome) as each ends."""
        ...

    def __enter__(self) -> Workers[_TaskIn, _OutcomeOut]: ...

    def __exit__(self, *exception: object) -> None: ...


class InProcess(Generic[_TaskT, _OutcomeT]):
    """Does tasks in this process, one after the other."""

    count = 1

    def __init__(self, loaded: LoadedModel, make: Make[_TaskT, _OutcomeT]) -> None:
        self._doer = make(loaded)

    def run(self, tasks: Sequence[_TaskT]) -> Iterator[tuple[int, _OutcomeT]]:
        """Do the tasks in their order; yields (index into tasks, outcome) as each ends."""
        for index, task in enumerate(tasks):
            yield index, self._doer(task)

    def __enter__(self) -> InProcess[_TaskT, _OutcomeT]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._doer.close()


def options_for(workers: str | None, options: LoadOptions) -> LoadOptions:
    """How the model is to be loaded for these workers: with them, one thread an evaluation unless threads are given.

    Raises UserError, before a model is loaded, for workers that cannot be: malformed, without Ray, or at an address
    where nothing listens.
    """
    if workers is None:
        return options
    place = parse_workers(workers)
    import_ray()
    if place.address not in (None, "auto"):
        check_listens(str(place.address))
    if options.device.startswith("cuda:"):
        rule = "each worker is given a GPU of its own"
        do = "use --device cuda; CUDA_VISIBLE_DEVICES says which GPUs there are"
        raise UserError("--device", got=f"{options.device!r} with --workers {workers}", rule=rule, do=do)
    return options if options.threads is not None else replace(options, threads=1)


def open_workers(workers: str | None, loaded: LoadedModel, make: Make[_TaskT, _OutcomeT]) -> Workers[_TaskT, _OutcomeT]:
    """The workers that --workers asks for, ready to do tasks as `make` does them; to be used as a context.

    None is this process; `N` that many local Ray workers; `ray` or `ray:HOST:PORT` those of a cluster that runs.
    Raises UserError for a cluster that does not answer, and for workers that cannot load the model or load another.
    """
    if workers is None:
        return InProcess(loaded, make)
    return RayWorkers(parse_workers(workers), loaded, make)


class _Worker:
    """Lives in a process of Ray's: loads the model once and does one task after the other."""

    def ping(self) -> None:
        """Answer."""

    def load(self, job: _Job, make: Make[Any, Any]) -> None:
        """Load the model. Raises UserError when it cannot be loaded here, or is another one than the driver's."""
        host = socket.gethostname()
        try:
            loaded = load_model(job.model, replace(job.options))  # replace: checked again, on this machine
        except torch.OutOfMemoryError:
            rule, do = "every worker holds the model", "use fewer --workers, --device balanced or --quantize 4bit"
            raise UserError("--workers", got=f"no memory for one on {host}", rule=rule, do=do) from None
        except UserError as error:
            raise error.changed(what=f"{error.what} of a worker on {host}") from None
        if loaded.fingerprint != job.fingerprint:
            raise UserError(
                f"model of a worker on {host}",
                got=f"another checkpoint, or another version of transformers, at {job.model}",
                rule="all workers search on the same model",
                do="give every machine the same files and packages",
            )
        assert torch.get_num_threads() == job.options.threads, "results are equal for equal threads"
        loaded.batch_tokens, loaded.memory_share = job.batch_tokens, job.memory_share
        if job.sliding_window is not None:
            loaded.widen_window(job.sliding_window)
        self._doer = make(loaded)

    def run(self, task: Any) -> Any:
        """Do a task."""
        return self._doer(task)


@dataclass(frozen=True)
class _Job:
    """What a worker needs in order to hold the driver's model, as the driver has it now."""

    model: str
    options: LoadOptions
    fingerprint: str
    batch_tokens: int
    sliding_window: int | None
    memory_share: float = 1.0

    @classmethod
    def of(cls, loaded: LoadedModel) -> _Job:
        options = loaded.options
        is_folder = loaded.name != TINY and Path(loaded.name).is_dir()
        return cls(
            model=str(Path(loaded.name).resolve()) if is_folder else loaded.name,
            options=replace(options, device=options.placement, threads=options.threads or 1),
            fingerprint=loaded.fingerprint,
            batch_tokens=loaded.batch_tokens,
            sliding_window=getattr(loaded.model.config.get_text_config(), "sliding_window", None),
        )


def share_out(
    nodes: Sequence[Mapping[str, float]], wanted: int | None, *, cuda: bool, spread: bool, threads: int
) -> tuple[int, float]:
    """(workers, GPUs of each) for machines with these resources (`CPU`, `GPU`).

    wanted: how many workers; None for as many as there is room for. cuda: whether they use GPUs; then CPUs do not
    count. spread: whether a model lies on several GPUs, which are of one machine. Raises UserError when there is no
    room.
    """
    gpus = [int(node.get("GPU", 0)) for node in nodes if node.get("GPU", 0) >= 1]
    each = 0.0
    if not cuda:
        count = wanted or sum(int(node.get("CPU", 0)) // threads for node in nodes)
        if not count:
            rule, do = "a worker takes as many as it has threads", "use fewer --threads, or start it with more CPUs"
            raise UserError("--workers", got=f"a cluster without {threads} CPUs on one machine", rule=rule, do=do)
        return count, each
    if not gpus:
        rule, do = "a worker on CUDA takes one", "start it with `ray start --num-gpus`, or use --device cpu"
        raise UserError("--workers", got="a cluster without GPUs", rule=rule, do=do)
    if spread:
        per = min(gpus) if wanted is None else sum(gpus) // wanted
        if not per:
            rule = f"there are {sum(gpus)} GPUs, and a model spread over several takes at least one"
            raise UserError("--workers", got=wanted, rule=rule, do=f"ask for at most {sum(gpus)}")
        return wanted or sum(gpu // per for gpu in gpus), float(per)
    count = wanted or sum(gpus)
    return count, 1 / math.ceil(count / sum(gpus))


@contextmanager
def _set_aside(loaded: LoadedModel) -> Iterator[None]:
    """This process's copy of the model in host memory, so that a worker has its GPU; quantized ones cannot move."""
    device = loaded.device
    if loaded.options.quantize is None:
        loaded.model.to("cpu")  # type: ignore[arg-type]
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        if loaded.options.quantize is None:
            loaded.model.to(device)  # type: ignore[arg-type]


class RayWorkers(Generic[_TaskT, _OutcomeT]):
    """Ray actors that hold the model, each doing one task at a time.

    A worker that dies is replaced and its task done again by whichever is free.
    """

    def __init__(self, place: Place, loaded: LoadedModel, make: Make[_TaskT, _OutcomeT]) -> None:
        self._ray = import_ray()
        self._job = _Job.of(loaded)
        cuda, spread = loaded.device.type == "cuda", self._job.options.device in ("balanced", "sequential")
        threads = self._job.options.threads or 1
        gpus = torch.cuda.device_count() if cuda else 0
        stored = len(pickle.dumps(make))
        self._cluster = Cluster(self._ray, place, (place.count or 0) * threads, gpus, stored)
        self._idle: list[Any] = []
        self._soon: dict[Any, tuple[Any, str]] = {}  # what will say that a worker has started, loaded, or is free
        self._busy: dict[Any, tuple[Any, int]] = {}  # a task's outcome to be, who does it, and its index
        self._failures = 0  # of loading, in a row
        self._aside = ExitStack()
        if cuda and not spread:
            self._aside.enter_context(_set_aside(loaded))
        try:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self.count, each = share_out(nodes, place.count, cuda=cuda, spread=spread, threads=threads)
            together = 1 / each if 0 < each < 1 else 1 if cuda else math.ceil(self.count / len(nodes))
            self._job = replace(self._job, memory_share=1 / together)
            if not cuda and any(node.get("GPU") for node in nodes):
                logger.warning("the cluster's GPUs are not used, because this process runs the model on a CPU")
            # max_restarts=0: a worker is replaced here, where the model can be loaded into the new one.
            resources = {"num_cpus": 0 if cuda else threads, "num_gpus": each, "max_restarts": 0}
            self._actor = self._ray.remote(**resources)(_Worker)
            self._make = self._ray.put(make)
            for _ in range(self.count):
                self._start()
            while not self._idle:  # a model that cannot be loaded is told before the search begins
                self._step()
        except BaseException:
            self.close()
            raise
        logger.debug("%d workers, %g GPUs each", self.count, each)

    def run(self, tasks: Sequence[_TaskT]) -> Iterator[tuple[int, _OutcomeT]]:
        """Do the tasks in any order; yields (index into tasks, outcome) as each ends.

        Raises a UserError of a task as it is, and one when workers keep dying. Left early, what is still being done is
        dropped.
        """
        waiting, deaths = deque(range(len(tasks))), Counter[int]()
        # Those that died since they were last heard of must not be charged to a task.
        self._soon |= {worker.ping.remote(): (worker, "free") for worker in self._idle}
        self._idle = []
        try:
            while waiting or self._busy:
                outcomes = self._step(waiting, deaths)
                self._hand_out(tasks, waiting)  # before the caller takes its time
                yield from outcomes
        finally:
            self._soon |= {ref: (worker, "free") for ref, (worker, _) in self._busy.items()}
            self._busy = {}

    def _hand_out(self, tasks: Sequence[_TaskT], waiting: deque[int]) -> None:
        while waiting and self._idle:
            worker, index = self._idle.pop(), waiting.popleft()
            self._busy[worker.run.remote(tasks[index])] = worker, index

    def _start(self) -> None:
        worker = self._actor.remote()
        self._soon[worker.ping.remote()] = worker, "started"

    def _step(
        self, waiting: deque[int] | None = None, deaths: Counter[int] | None = None
    ) -> list[tuple[int, _OutcomeT]]:
        """Wait for something to happen, and take note of it; the outcomes that came."""
        outcomes, refs = [], [*self._busy, *self._soon]
        only_started = not self._busy and all(stage == "started" for _, stage in self._soon.values())
        ended, _ = self._ray.wait(refs, num_returns=1, timeout=_START_SECONDS if only_started else None)
        if not ended:
            raise _no_worker(f"the cluster had no room for one in {_START_SECONDS:.0f} seconds")
        for ref in ended:
            task = self._busy.pop(ref, None)
            worker, stage = self._soon.pop(ref) if task is None else (task[0], "done")
            result, death = self._take(ref)
            if death is not None:
                self._died(worker, stage, death)
                if task is not None:
                    assert waiting is not None, "tasks are done by run"
                    assert deaths is not None, "tasks are done by run"
                    deaths[task[1]] += 1
                    waiting.appendleft(task[1])
                    if deaths[task[1]] == _DEATHS:
                        raise _deadly(death)
            elif stage == "started":
                self._soon[worker.load.remote(self._job, self._make)] = worker, "loaded"
            else:
                self._failures = 0
                self._idle.append(worker)
                if task is not None:
                    outcomes.append((task[1], result))
        return outcomes

    def _take(self, ref: Any) -> tuple[Any, str | None]:
        """What a worker answered, or how it died. Raises what the worker raised."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref), None
        except errors.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, UserError) else error) from None
        except errors.RayError as error:  # of the worker, its node, or the memory that Ray watches over
            return None, textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__

    def _died(self, worker: Any, stage: str, death: str) -> None:
        """Start another worker, unless several could not load the model; raise UserError when none is left."""
        logger.info("a worker died: %s", death)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker)  # it may only have been out of reach
        self._failures += stage in ("started", "loaded")
        if self._failures < _DEATHS:
            self._start()
        elif not (self._idle or self._busy or self._soon):
            raise _no_worker(death)

    def close(self) -> None:
        """End the workers, and Ray if it was started here; a cluster goes on."""
        workers = [*self._idle, *(worker for worker, _ in (*self._soon.values(), *self._busy.values()))]
        self._idle, self._soon, self._busy = [], {}, {}
        for worker in workers:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker)
        self._cluster.close()
        self._aside.close()

    def __enter__(self) -> RayWorkers[_TaskT, _OutcomeT]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _no_worker(why: str) -> UserError:
    rule, do = "at least one worker starts and loads the model", "use fewer workers, or see that each has the memory"
    return UserError("--workers", got=f"no worker ({why})", rule=rule, do=do)


def _deadly(why: str) -> UserError:
    rule, do = "a worker lives to end it", "see that each has the memory, with fewer workers; the same command goes on"
    return UserError("--workers", got=f"{_DEATHS} workers that died of one evaluation ({why})", rule=rule, do=do)
