"""LongRoPE's results on a small model, stage by stage: the whole method, honestly measured.

    python benchmarks/reproduce.py --stages benchmarks/plans/miniature.toml --documents CORPUS

CORPUS has the folders train, validation and test. What is done is kept in benchmarks/state and not done again: stop it
at any time, and give the same command. Results go to benchmarks/results, figures with their limits first.

In pieces on machines that are lent for minutes, what is done carried from one to the next:

    python benchmarks/reproduce.py --stages benchmarks/plans/full-length.toml --documents CORPUS --state runs/repro \\
        --minutes 3 --unpack PACK --pack PACK-2
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from common import RESULTS, Figure, machine, print_table, today, versions, write_results
from longrope.errors import UserError
from longrope.extension.plan import read_plan
from longrope.files import read_lines, read_object
from longrope.runs import LOSSES, STAGES
from reproduction.core import CORE
from reproduction.packing import pack, unpack
from reproduction.setting import SETTINGS, Setting, quick_plan
from reproduction.state import OutOfTimeError, State
from reproduction.tables import STAGES_OF, TABLES

STATE = Path(__file__).parent / "state"
PARTS = CORE | TABLES
logger = logging.getLogger("reproduce")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=Path, required=True, help="a plan; its name says which model: miniature.toml")
    parser.add_argument("--documents", type=Path, required=True, help="a folder with train, validation and test")
    parser.add_argument("--parts", default="core", help=f"core, all, or some of {', '.join(PARTS)}")
    parser.add_argument("--state", type=Path, default=STATE, help="where what is done is kept")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin no training, stage or measurement after so many, but one"
    )
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="first make the state of what --pack wrote")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="at the end write the state as a few small files")
    parser.add_argument("--quick", action="store_true", help="a thousandth of the size: a check of the script")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    try:
        return reproduce(args)
    except UserError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2


def reproduce(args: argparse.Namespace) -> int:
    """What the command does, as far as its time goes; the exit code. Raises UserError for bad input."""
    wanted = list({"core": CORE, "all": PARTS}.get(args.parts, args.parts.split(",")))
    if unknown := [part for part in wanted if part not in PARTS]:
        rule = f"it is one of {', '.join(['core', 'all', *PARTS])}"
        raise UserError("--parts", got=repr(unknown[0]), rule=rule, do="choose one of them")
    if args.stages.stem not in SETTINGS:
        rule = f"it is named {' or '.join(f'{name}.toml' for name in SETTINGS)}"
        raise UserError("--stages", got=args.stages, rule=rule, do="give a plan of that name")
    name = f"{args.stages.stem}-quick" if args.quick else args.stages.stem
    size = SETTINGS[args.stages.stem].quick() if args.quick else SETTINGS[args.stages.stem]
    plan = read_plan(args.stages, size.length)
    plan = quick_plan(plan) if args.quick else plan
    setting = Setting.of(size, plan, args.documents, args.state / name, args.device, args.threads)
    out, folder, packed = args.out.resolve(), setting.state.resolve(), args.pack and args.pack.resolve()
    if args.unpack:
        unpack(args.unpack, folder)

    def keep() -> None:
        """Pack the state: what ends the process, a machine's time for one, costs no more than what is going on."""
        if packed:
            pack(folder, packed)

    keep()  # refuses a folder before anything is paid for
    with setting.at_home() as here:
        state = State(here.state, here.made_of(), args.minutes, keep)
        try:
            make(here, state, wanted)
        finally:
            keep()
        return write(name, here, state, out)


def make(setting: Setting, state: State, wanted: list[str]) -> None:
    """Make the parts that are not done, as far as the time goes."""
    for part in wanted:
        if state.has(part):
            logger.info("%s is done", part)
            continue
        logger.info("%s begins", part)
        start = time.monotonic()
        try:
            PARTS[part](setting, state)
        except OutOfTimeError:
            state.pause(part, time.monotonic() - start)
            logger.info("%s and what follows wait for the next call", part)
            break
        state.finish(part, time.monotonic() - start, made(setting))


def still(part: str, recorded: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a recorded part is of what the document is of: model, documents, and the stages that it is made of."""
    kinds = STAGES_OF.get(part)

    def of(told: dict[str, Any]) -> list[Any]:
        stages = [stage for stage in told.get("stages", []) if kinds is None or stage["do"] in kinds]
        return [stages, *(told.get(key) for key in ("benchmark", "seed", "model", "documents"))]

    return of(recorded) == of(document)


def made(setting: Setting) -> dict[str, Any]:
    """When, where and in which precision something was made."""
    told: dict[str, Any] = {"date": today(), "threads": setting.threads, "machine": machine(), "versions": versions()}
    return told | {"dtype": setting.options.resolved().dtype}


def write(name: str, setting: Setting, state: State, out: Path) -> int:
    """The table and the JSON of all parts that are done; the exit code, 1 when a figure misses its limit.

    Parts of the same model, stages and documents that the JSON has already, from another machine or day, stay in it.
    """
    path = out / f"{name}.json"
    document: dict[str, Any] = {"benchmark": name, "seed": setting.seed, "model": setting.size.told()}
    document |= {"stages": [stage.to_dict() for stage in setting.plan.stages], "documents": setting.hashes()}
    recorded = read_object(path, "results") if path.exists() else {}
    parts: dict[str, Any] = {
        name: part for name, part in recorded.get("parts", {}).items() if still(name, recorded, document)
    }
    for part in PARTS:
        if state.has(part):
            parts[part] = {"minutes": round(state.seconds(part) / 60, 1), **state.made(part)}
            figures = [Figure(**each).to_dict() for each in state.figures(part)]
            parts[part] |= {"figures": figures, "tables": state.tables(part)}
    trained = [setting.run / stage.name / LOSSES for stage in setting.plan.stages if stage.do == "finetune"]
    if "stages" in parts and all(file.exists() for file in trained):
        parts["stages"]["losses"] = {file.parent.name: [line["loss"] for line in read_lines(file)] for file in trained}
    if state.has("stages"):
        lines = read_lines(setting.run / STAGES)
        parts["stages"]["seconds"] = {line["stage"]: line["seconds"] for line in lines}
        if resumed := [line["stage"] for line in lines if line.get("resumed")]:
            parts["stages"]["resumed"] = resumed  # their seconds are those since then
    document["parts"] = {part: parts[part] for part in PARTS if part in parts}
    told = [Figure.from_dict(figure) for part in document["parts"].values() for figure in part["figures"]]
    print_table(name, told)
    write_results(path, document)
    return 0 if all(figure.ok for figure in told) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
