"""`longrope doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli_options import Json, Quiet, Verbose, begin
from longrope.errors import plural


def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a config.json, a Hub id, or tiny.")],
    fix: Annotated[
        Path | None, typer.Option("--fix", metavar="DIR", help="Write a copy with all mended that can be.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """What is wrong with a RoPE configuration, and the mend; exit code 1 when something is an error."""
    begin(verbose, quiet)
    from longrope.console import err, print_json
    from longrope.console_tables import findings_table
    from longrope.doctor.examine import examine, files_of, read_config, write_mended

    given = files_of(model)
    _, config, folder = read_config(given)
    found = examine(config, folder)
    left = write_mended(given, fix) if fix is not None else found
    if as_json:
        settings = {"fix": None if fix is None else str(fix)}
        told = {"command": "doctor", "model": model, "settings": settings, "results": []}
        print_json(told | {"findings": [each.told() for each in found], "left": [each.told() for each in left]})
    elif found:
        err.print(findings_table(found))
    if not quiet and not as_json:
        err.print(_verdict(len(found), None if fix is None else len(left), fix), soft_wrap=True)
    if any(each.severity == "error" for each in left):
        raise typer.Exit(1)


def _verdict(found: int, left: int | None, fix: Path | None) -> str:
    if left is None:
        return plural(found, "finding") if found else "nothing found"
    return f"{plural(found, 'finding')}, {left} left in {fix}"
