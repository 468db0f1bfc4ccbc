"""Files with the wording of prompts: TOML with placeholders in braces."""

from __future__ import annotations

import tomllib
from pathlib import Path
from string import Formatter
from typing import Any

from longrope.errors import UserError
from longrope.files import LARGEST, check_regular


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file. Raises UserError for one that cannot be read, and for what is not TOML in UTF-8."""
    check_regular(path, "template", LARGEST)
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        got, rule = f"{path}, which cannot be read", error.strerror or type(error).__name__
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML, or lists in lists
        got, rule = f"{path}, which is not TOML", str(error)
    raise UserError("template", got=got, rule=rule, do="give a TOML file, as in the documentation")


def placeholders(text: str) -> list[str]:
    """What stands in braces, as it is written. Raises ValueError for a brace that belongs to none."""
    return [
        f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
        for _, name, spec, conversion in Formatter().parse(text)
        if name is not None
    ]
