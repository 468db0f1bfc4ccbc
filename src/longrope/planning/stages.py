"""Every stage of a plan on a machine: how it is laid out, its peak memory, FLOPs and hours, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from longrope.lengths import format_length
from longrope.planning import memory
from longrope.planning.flops import window_flops
from longrope.planning.machines import GPUS_A_NODE, Machine
from longrope.planning.memory import CHUNK, Parts, Spread
from longrope.planning.precision import precision_of
from longrope.planning.shape import ModelShape
from longrope.planning.speed import Rates, seconds

if TYPE_CHECKING:
    from longrope.extension.costs import Cost, Work

UTILISATION = {"forward": 0.40, "gradient": 0.35, "train": 0.35, "prefill": 0.30}
"""Share of a GPU's peak that each kind of work is taken to reach. Assumed, not measured."""
_BATCH_TOKENS = 8192  # short windows are run together up to so many, as longrope.model has it
_KEEP_SEARCH, _KEEP_TRAINING = 0.4, 0.6  # of what is free, activations up to which layers are not computed twice


@dataclass(frozen=True)
class Settings:
    """How stages are computed. lora: rank of adapters in every fine-tuning, None is what the plan says.

    utilisation: of a GPU's peak, None is `UTILISATION`. rates: of a CPU, measured.
    """

    dtype: str = "auto"
    lora: int | None = None
    quantize: str | None = None
    utilisation: float | None = None
    rates: Rates | None = None


@dataclass(frozen=True)
class StageCost:
    """What a stage takes. memory: bytes of one device by their parts; hours: None where nobody said how fast it is.

    layout: over how many devices, and how. advice: what would make it fit, where it does not.
    """

    stage: str
    length: int
    token_passes: int
    flops: float
    memory: Mapping[str, float]
    hours: float | None
    fits: bool
    layout: str
    advice: str = ""
    made_of: str = ""

    @property
    def peak(self) -> float:
        """Bytes of one device."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """As a result of --json: value is the peak."""
        told = {"method": self.stage, "length": self.length, "value": round(self.peak), "tokens": self.token_passes}
        parts = {name: round(value) for name, value in self.memory.items() if round(value)}
        told |= {"ci": None, "flops": self.flops, "memory": parts, "hours": self.hours, "fits": self.fits}
        return told | {"layout": self.layout, "advice": self.advice, "made_of": self.made_of}


@dataclass(frozen=True)
class _Layout:
    """One way to do a stage: the parts of its peak, how it is said, and for its time what it needs."""

    parts: Parts
    told: str
    groups: int = 1
    again: frozenset[str] = field(default_factory=frozenset)
    loads: float = 0.0

    @property
    def peak(self) -> float:
        return max(sum(self.parts.values()), self.loads)


def stage_costs(shape: ModelShape, costs: Sequence[Cost], machine: Machine, settings: Settings) -> list[StageCost]:
    """Every stage, and at the end a prompt of the longest length."""
    found = [_trained(shape, cost, machine, settings) if cost.batch else _run(shape, cost, machine, settings)
             for cost in costs]  # fmt: skip
    return [*found, _prefill(shape, max(cost.length for cost in costs), machine, settings)]


def _rates(machine: Machine, settings: Settings, kind: str) -> Rates | None:
    if settings.rates is not None:
        return settings.rates
    if machine.peak is None:
        return None
    return Rates.of_peak(machine.peak, settings.utilisation or UTILISATION[kind])


def _devices(machine: Machine) -> Iterator[int]:
    """GPUs that one process of a search may spread a model over: those of its own machine."""
    count = 1
    while count <= min(machine.count, GPUS_A_NODE):
        yield count
        count *= 2


def _run(shape: ModelShape, cost: Cost, machine: Machine, settings: Settings) -> StageCost:
    """A search or a measurement: models over as few GPUs as hold one, as many of them as there is room for."""
    layouts = [_search_layout(shape, cost.work, machine, settings, devices) for devices in _devices(machine)]
    chosen = next((each for each in layouts if each.peak <= machine.bytes_each), layouts[-1])
    fits = chosen.peak <= machine.bytes_each
    p = precision_of(settings.dtype, cuda=machine.kind == "cuda")
    flops, took = 0.0, 0.0
    for each in cost.work:
        again = each.kind in chosen.again
        flops += each.windows * window_flops(shape, each.length, each.kind, again=again).total
        if (rates := _rates(machine, settings, each.kind)) is not None:
            together = _together(each)
            passes = -(-each.windows // together)
            one = seconds(shape, p, each.length, rates, each.kind, windows=together, again=again)
            took += passes * one / min(chosen.groups, max(1, each.at_once // together))
    hours = None if _rates(machine, settings, "forward") is None else took / 3600
    advice = "" if fits else _advice_to_search(shape, cost, machine, settings)
    told = chosen.told if cost.work[0].at_once > 1 or "GPUs" in chosen.told else chosen.told.split("; workers")[0]
    return StageCost(
        cost.stage, cost.length, cost.token_passes, flops, chosen.parts, hours, fits, told, advice, cost.made_of
    )


def _together(work: Work) -> int:
    """Windows of one pass."""
    return max(1, min(work.windows, _BATCH_TOKENS // work.length)) if work.kind == "forward" else 1


def _search_layout(
    shape: ModelShape, work: Sequence[Work], machine: Machine, settings: Settings, devices: int
) -> _Layout:
    """A model over so many GPUs, its windows whole or by chunks, its layers computed once or twice."""
    p, kind, spread = precision_of(settings.dtype, cuda=machine.kind == "cuda"), machine.kind, Spread(devices)
    bits = settings.quantize
    free = machine.bytes_each - memory.weight_bytes(shape, p, bits) / devices
    again, phases, words = set[str](), list[Parts](), list[str]()
    for each in work:
        if each.kind == "forward":
            parts = memory.forward(shape, p, each.length * _together(each), kind, spread, quantize=bits)
            if sum(parts.values()) > machine.bytes_each and each.length > CHUNK:
                parts = memory.by_chunks(shape, p, each.length, kind, spread, quantize=bits)
                words.append(f"windows by chunks of {CHUNK}")
        else:
            keeps = memory.whole_kept(shape, p, "gradient", each.length) / devices
            parts = memory.gradient(shape, p, each.length, kind, spread, again=False, quantize=bits)
            if keeps > _KEEP_SEARCH * free or sum(parts.values()) > machine.bytes_each:
                again.add("gradient")
                parts = memory.gradient(shape, p, each.length, kind, spread, again=True, quantize=bits)
                words.append("layers computed twice")
        phases.append(parts)
    groups = max(1, machine.count // devices)
    if devices > 1:
        words.insert(0, f"a model over {devices} GPUs (--device balanced)")
    if groups > 1 and (used := min(groups, max(each.at_once for each in work))) > 1:
        words.append(f"workers: {used}")
    told = "; ".join(dict.fromkeys(words)) or "one device"
    return _Layout(memory.fullest(*phases), told, groups, frozenset(again))


def _advice_to_search(shape: ModelShape, cost: Cost, machine: Machine, settings: Settings) -> str:
    """What would make a search fit: more GPUs in its machine, no gradient, or a shorter length to search at."""
    work, found = cost.work, list[str]()
    for devices in (1, 2, 4, GPUS_A_NODE):
        larger = Machine(machine.name, devices, machine.bytes_each, machine.peak, machine.kind)
        more = devices > machine.count and machine.kind == "cuda"
        if more and _search_layout(shape, work, larger, settings, devices).peak <= machine.bytes_each:
            found.append(f"{devices} such GPUs with --device balanced")
            break
    length = max(each.length for each in work)
    devices = min(machine.count, GPUS_A_NODE)
    plain = [each for each in work if each.kind == "forward"]
    ways = [_search_layout(shape, plain, machine, settings, each) for each in _devices(machine)]
    without = len(plain) < len(work) and any(way.peak <= machine.bytes_each for way in ways)
    found += ['method = "evolution" in the stage, which takes no gradient'] if without else []
    # A shorter search is decided at the target by losses alone, and is an extension, too.
    decided = _search_layout(shape, plain, machine, settings, devices).peak <= machine.bytes_each
    while decided and cost.begins and length // 2 > cost.begins:
        length //= 2
        short = [replace(each, length=min(length, each.length)) for each in work]
        if _search_layout(shape, short, machine, settings, devices).peak <= machine.bytes_each:
            found.append(f'search_length = "{format_length(length)}" in the stage')
            break
    return ", or ".join(found) or "GPUs with more memory"


def _train_layouts(shape: ModelShape, cost: Cost, machine: Machine, settings: Settings, rank: int) -> Iterator[_Layout]:
    """Ways to train, simplest first: copies, shards (FSDP), shards with a window over several (context parallelism)."""
    cuda, count = machine.kind == "cuda", machine.count
    p = precision_of(settings.dtype, cuda=cuda, trained=rank == 0)
    whole = memory.weight_bytes(shape, p, settings.quantize)
    options = [(False, 1)]
    if count > 1 and settings.quantize is None:  # quantized weights are not sharded
        options += [(True, 2**power) for power in range(count.bit_length())]
    for sharded, window in options:
        groups = count // window
        if count % window or cost.batch % groups or window > count:
            continue
        spread = Spread(count if sharded else 1, window, sharded)
        keeps = memory.whole_kept(shape, p, "lora" if rank else "train", cost.length / window, rank)
        free = machine.bytes_each - sum(
            memory.train(shape, p, 1, machine.kind, spread, again=True, rank=rank, quantize=settings.quantize).values()
        )
        again = sharded or keeps > _KEEP_TRAINING * free
        parts = memory.train(
            shape, p, cost.length, machine.kind, spread, again=again, rank=rank, quantize=settings.quantize
        )
        words = [f"LoRA of rank {rank}" if rank else "all weights"]
        if sharded:
            words.append(f"FSDP over {count}")
        elif count > 1:
            words.append(f"{count} copies")
        if window > 1:
            words.append(f"a window over {window} (context parallelism)")
        words += ["layers computed twice"] if again else []
        yield _Layout(parts, "; ".join(words), groups, frozenset({"train"} if again else ()), whole if sharded else 0.0)


def _trained(shape: ModelShape, cost: Cost, machine: Machine, settings: Settings) -> StageCost:
    rank = settings.lora or cost.adapters
    layouts = list(_train_layouts(shape, cost, machine, settings, rank))
    if not layouts:
        told = f"{machine.count} devices cannot share a batch of {cost.batch}"
        return StageCost(
            cost.stage, cost.length, cost.token_passes, 0.0, {}, None, False, told, "another number of them"
        )
    chosen = next(
        (each for each in layouts if each.peak <= machine.bytes_each), min(layouts, key=lambda each: each.peak)
    )
    fits, again = chosen.peak <= machine.bytes_each, "train" in chosen.again
    kind, windows = "lora" if rank else "train", sum(each.windows for each in cost.work)
    flops = windows * window_flops(shape, cost.length, kind, rank=rank, again=again).total
    hours = None
    if (rates := _rates(machine, settings, "train")) is not None:
        p = precision_of(settings.dtype, cuda=machine.kind == "cuda", trained=rank == 0)
        one = seconds(shape, p, cost.length, rates, kind, rank=rank, again=again)
        hours = windows * one / machine.count / 3600
    parts = dict(chosen.parts)
    if chosen.loads > sum(parts.values()):  # each process reads all weights into its device before they are sharded
        parts = {"loading": chosen.loads}
    advice = "" if fits else _advice_to_train(shape, cost, machine, settings, rank, chosen)
    return StageCost(
        cost.stage, cost.length, cost.token_passes, flops, parts, hours, fits, chosen.told, advice, cost.made_of
    )


def _advice_to_train(
    shape: ModelShape, cost: Cost, machine: Machine, settings: Settings, rank: int, chosen: _Layout
) -> str:
    """What would make a training fit."""
    found = []
    if machine.kind == "cuda" and chosen.loads <= machine.bytes_each:
        for count in (2, 4, 8, 16, 32, 64, 128, 256):
            larger = Machine(machine.name, count, machine.bytes_each, machine.peak)
            ways = _train_layouts(shape, cost, larger, settings, rank)
            if count > machine.count and (way := next((w for w in ways if w.peak <= machine.bytes_each), None)):
                found.append(f"{count} such GPUs ({way.told.partition('; ')[2]})")
                break
    if not rank:
        ways = _train_layouts(shape, cost, machine, settings, 16)
        if way := next((each for each in ways if each.peak <= machine.bytes_each), None):
            found.append(f"--lora 16 ({way.told.partition('; ')[2] or 'one device'})")
    if chosen.loads > machine.bytes_each:
        found.append("GPUs that hold all weights, which each process reads before they are sharded")
    return ", or ".join(found) or "a shorter length, or GPUs with more memory"


def _prefill(shape: ModelShape, length: int, machine: Machine, settings: Settings) -> StageCost:
    """One prompt of so many tokens in `generate`, by chunks into a cache."""
    p = precision_of(settings.dtype, cuda=machine.kind == "cuda")

    def on(devices: int, cached: float = 1.0) -> _Layout:
        spread, bits = Spread(devices), settings.quantize
        parts = memory.by_chunks(shape, p, length, machine.kind, spread, scored=False, cached=cached, quantize=bits)
        told = "one device" if devices == 1 else f"a model over {devices} GPUs (--device balanced)"
        return _Layout(parts, told)

    layouts = [on(devices) for devices in _devices(machine)]
    chosen = next((each for each in layouts if each.peak <= machine.bytes_each), layouts[-1])
    fits = chosen.peak <= machine.bytes_each
    rates = _rates(machine, settings, "prefill")
    hours = None if rates is None else seconds(shape, p, length, rates, scored=False) / 3600
    advice = ""
    if not fits:
        found = []
        two = min(1.0, 2 / max(1, shape.attending))  # layers whose keys are on the device at once
        offloaded = any(on(devices, two).peak <= machine.bytes_each for devices in _devices(machine))
        if machine.kind == "cuda" and offloaded:
            found.append("--cache offloaded")
        if any(on(devices, 1 / p.compute).peak <= machine.bytes_each for devices in _devices(machine)):
            found.append("--cache quantized")
        more = [n for n in (2, 4, 8) if n > machine.count and on(n).peak <= machine.bytes_each]
        found += [f"{more[0]} such GPUs with --device balanced"] if machine.kind == "cuda" and more else []
        advice = ", or ".join(found) or "GPUs with more memory"
    flops = window_flops(shape, length, scored=False).total
    stage = f"prompt-{format_length(length)}"
    return StageCost(
        stage, length, length, flops, chosen.parts, hours, fits, chosen.told, advice, "one prompt by chunks"
    )
