"""The doctor, as `longrope.doctor` in Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope.doctor.examine import Finding, examine, files_of, read_config, write_mended
from longrope.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def doctor(model: str | Path | Mapping[str, Any] | PreTrainedModel, *, fix: str | Path | None = None) -> list[Finding]:
    """What is wrong with a RoPE configuration, errors first; each finding says what, and what to do about it.

    model: a folder, a config.json, a Hub id or `tiny`; a parsed configuration; or a model that is loaded, of which it
    is also seen whether it rotates as its configuration says. fix: a new folder for a copy of the files with everything
    mended that can be; then what is left in it is returned. Reads no weights. Raises UserError for a model that is not
    there, and for a `fix` that is not a new folder or is asked for what is no file.
    """
    if isinstance(model, str | Path):
        given = files_of(str(model))
        if fix is not None:
            return write_mended(given, fix)
        _, config, folder = read_config(given)
        return examine(config, folder)
    if fix is not None:
        rule = "a copy is made of files"
        raise UserError("fix", got=f"a {type(model).__name__}", rule=rule, do="give the folder or its config.json")
    if isinstance(model, Mapping):
        return examine(model)
    from longrope.doctor.loaded import examine_model  # with torch

    return examine_model(model)
