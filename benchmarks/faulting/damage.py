"""Files cut short, emptied, and with a bit turned, in every place a run reads: refused, repaired, or not needed.

Of our own runs a file must never be read as something else than what was written. Of a model, documents and factors
that come from outside, a bit turned inside a number is just another number: there no more is asked than a clear end.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from faulting.child import Child, Ran, run
from faulting.commands import RUNS
from faulting.ground import Undisturbed
from faulting.shim import KILL_BEFORE, Fault
from faulting.tally import TRACEBACK, WRONG, Case, Tally, is_clean, one_line, told

_MEASURED = ("--lengths", "96", "-d", "texts", "--windows", 1, "--dtype", "float32", "--threads", 1, "-q")
_OUTSIDE = ("model", "good.json", "plan.toml", "texts")
_GROWING = (".jsonl",)
_STATE = "/checkpoints/"


@dataclass(frozen=True)
class Damage:
    """What is done to a file: its new bytes."""

    name: str
    data: bytes


def damages(data: bytes, rng: np.random.Generator, flips: int) -> Iterator[Damage]:
    """Emptied, cut at two places, and with one bit turned at random places."""
    if not data:
        return
    yield Damage("emptied", b"")
    if len(data) > 2:
        yield Damage("cut", data[: int(rng.integers(1, len(data) - 1))])
        yield Damage("cut by a byte", data[:-1])
    for _ in range(flips):
        at, bit = int(rng.integers(len(data))), int(rng.integers(8))
        yield Damage(f"bit {bit} of byte {at} turned", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])


def cases(made: Mapping[str, Undisturbed], seed: int, flips: int = 2, every: int = 1) -> list[Case]:
    """A case a file; every: only each so-many-th of them, for a short version."""
    found = []
    for place, (name, undisturbed) in enumerate(made.items()):
        is_run = undisturbed.command in RUNS
        wanted = [("finished", path) for path in _files(undisturbed) if is_run]
        wanted += [("going on", path) for path in [*_files(undisturbed), *_outside(undisturbed)] if is_run]
        wanted += [("read", path) for path in _outside(undisturbed)]
        if name.startswith("export") or name == "doctor --fix":
            wanted += [("exported", path) for path in _files(undisturbed)]
        if name == "report":
            wanted += [("reported", path) for path in _reported(undisturbed)]
        for index, (state, path) in list(enumerate(wanted))[::every]:
            rng = np.random.default_rng((seed, place, index))
            run_case = partial(damaged, undisturbed, state, path, rng, flips)
            found.append(Case(name, "damage", f"{state}, {path}", run_case))
    return found


def _files(undisturbed: Undisturbed) -> list[str]:
    """Files that a command makes, but for those that only people read."""
    names = []
    for made in undisturbed.command.makes:
        path = undisturbed.made / made
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        names += [str(each.relative_to(undisturbed.made)) for each in inside if each.is_file()]
    return [name for name in names if Path(name).name not in (".lock", "README.md", "report.html")]


def _outside(undisturbed: Undisturbed) -> list[str]:
    """Files from outside that a command reads."""
    words = [str(word) for word in undisturbed.command.arguments]
    names: list[str] = []
    for name in (each for each in _OUTSIDE if each in words):
        path = undisturbed.ground / name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        names += [str(each.relative_to(undisturbed.ground)) for each in inside if each.is_file()]
    return names


def _reported(undisturbed: Undisturbed) -> list[str]:
    folder = undisturbed.ground / "hybrid"
    return [f"hybrid/{path.name}" for path in sorted(folder.iterdir()) if path.is_file() and path.name != ".lock"]


def _readers(undisturbed: Undisturbed, state: str, path: str) -> list[tuple[object, ...]]:
    """Command lines that read a file in a state: the same command again, and what is made of its results."""
    command, place = undisturbed.command, undisturbed.command.makes[0]
    if state == "exported":
        verified = ("verify", place, "--against", "model", "-q")
        return (
            [verified] if command.name.endswith("gguf") else [verified, ("evaluate", "perplexity", place, *_MEASURED)]
        )
    found = [command.arguments]
    if state in ("finished", "going on") and path.startswith(f"{place}/"):
        found.append(("report", place, "--out", "page.html", "-q"))
    if state == "finished" and command.name.startswith("search") and path.endswith(("factors.json", "DONE")):
        found.append(("evaluate", "perplexity", "model", "-f", place, *_MEASURED))
    if state == "finished" and path.startswith(f"{place}/checkpoint/"):
        found.append(("evaluate", "perplexity", f"{place}/checkpoint", *_MEASURED))
        found.append(("export", f"{place}/checkpoint", "--window", "long", "--out", "again", "-q"))
    return found


def damaged(
    undisturbed: Undisturbed, state: str, path: str, rng: np.random.Generator, flips: int, tally: Tally
) -> None:
    """All damages of one file, each read by all that reads it."""
    start = _in_state(undisturbed, state)
    if start is None or not (start / path).is_file():
        return
    data = (start / path).read_bytes()
    for number, reader in enumerate(_readers(undisturbed, state, path)):
        whole = _copied(start, f"whole-{number}")
        expected = run(reader, whole)
        for damage in damages(data, rng, flips):
            folder = _copied(start, "here")
            (folder / path).write_bytes(damage.data)
            ran = run(reader, folder)
            said = f"{damage.name}; {' '.join(map(str, reader[:3]))}: {told(ran)}"
            _judge(undisturbed, _Read(state, path, number == 0, whole, folder, expected, ran, damage), said, tally)
            shutil.rmtree(folder)
        shutil.rmtree(whole)


@dataclass(frozen=True)
class _Read:
    """What a reader made of a damaged file, beside what it makes of the whole one; same: it is the same command."""

    state: str
    path: str
    same: bool
    whole: Path
    folder: Path
    expected: Ran
    ran: Ran
    damage: Damage


def _judge(undisturbed: Undisturbed, read: _Read, said: str, tally: Tally) -> None:
    tally.count("damaged files")
    ran, expected = read.ran, read.expected
    if one_line(ran):
        tally.count("refused")
        return
    ours = read.state in ("finished", "going on") and not read.path.startswith(_OUTSIDE)
    if not ours:
        # `verify` ends with 1 where something is not as it should be.
        told_so = ran.code == 1 and expected.code == 0 and read.state == "exported" and is_clean(ran)
        if told_so and "longrope: " not in ran.err:
            tally.count("refused")
        elif ran.code not in (0, expected.code) or not is_clean(ran) or (ran.code == 1 and "longrope: " in ran.err):
            tally.trouble(TRACEBACK, said)
        elif read.state == "going on" and undisturbed.differs(read.folder) and not read.path.endswith(".safetensors"):
            tally.trouble(WRONG, f"of another {read.path} it ended otherwise; {said}")
        else:
            tally.count("taken as it is")
        return
    if ran.code != expected.code or not is_clean(ran):
        tally.trouble(TRACEBACK, said)
        return
    differing = _differing(undisturbed, read)
    if not differing:
        tally.count("repaired or not needed")
    elif differing == ["page.html"] and _page_names(read):
        tally.count("refused")  # in a line of the page: what it has of other files is still shown
    elif read.state == "going on" and not read.same and read.path.endswith(_GROWING):
        tally.count("repaired or not needed")  # lines that are not there (any more) are those of an earlier moment
    else:
        tally.trouble(WRONG, f"{', '.join(differing[:4])} other than undisturbed; {said}")


def _differing(undisturbed: Undisturbed, read: _Read) -> list[str]:
    """What a reader that found nothing wrong has said or made otherwise than of the whole file."""
    if not read.same:
        names = [name for name in ("page.html", "again/factors.json") if _bytes(read.whole, name) is not None]
        found = [name for name in names if _bytes(read.whole, name) != _bytes(read.folder, name)]
        return found + (["what it says"] if _said(read.expected) != _said(read.ran) else [])
    differing = undisturbed.differs(read.folder)
    if read.state == "finished" or _STATE in read.path:
        # Which it need not have read: of a training that has a later one, too, which is checked before it is used.
        differing = [name for name in differing if name != read.path]
    if read.state == "finished":
        # A state that is needed no more, and the seal itself: it can only refuse too much.
        return differing + (["what it says"] if _said(read.expected) != _said(read.ran) else [])
    return differing


def _page_names(read: _Read) -> bool:
    """Whether the page says of the damaged file, by its path, what it does not say of the whole one."""
    name = read.path.encode()
    return name in (_bytes(read.folder, "page.html") or b"") and name not in (_bytes(read.whole, "page.html") or b"")


def _said(ran: Ran) -> tuple[str, str]:
    return ran.out, ran.err.replace("whole-0", "here").replace("whole-1", "here").replace("whole-2", "here")


def _bytes(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if (folder / name).is_file() else None


def _in_state(undisturbed: Undisturbed, state: str) -> Path | None:
    """A folder in which a command has ended, was killed about two thirds through, or has not begun."""
    if state in ("finished", "exported"):
        return undisturbed.finished("start")
    start = undisturbed.fresh("start")
    if state == "going on":
        at = 2 * len(undisturbed.operations) // 3
        if not at:
            return None  # without the library of faults
        Child(undisturbed.command.arguments, start, Fault(start, KILL_BEFORE, at)).ended()
    return start


def _copied(start: Path, name: str) -> Path:
    folder = Path(name).resolve()
    shutil.copytree(start, folder, symlinks=True)
    return folder
