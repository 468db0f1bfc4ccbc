"""A longer context window for a RoPE language model: LongRoPE (arXiv 2402.13753), searched, measured and exported.

The public names are loaded when they are used: importing longrope imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longrope.api import apply as apply
    from longrope.api import load as load
    from longrope.compare import compare as compare
    from longrope.errors import UserError as UserError
    from longrope.evaluate.run import evaluate as evaluate
    from longrope.export.transformers import export_model as export  # noqa: F401
    from longrope.factors import FactorTable as FactorTable
    from longrope.factors import RopeFactors as RopeFactors
    from longrope.search.driver import search as search

__version__ = "0.1.0"

_PUBLIC = {
    "FactorTable": "longrope.factors:FactorTable",
    "RopeFactors": "longrope.factors:RopeFactors",
    "UserError": "longrope.errors:UserError",
    "apply": "longrope.api:apply",
    "compare": "longrope.compare:compare",
    "evaluate": "longrope.evaluate.run:evaluate",
    "export": "longrope.export.transformers:export_model",
    "load": "longrope.api:load",
    "search": "longrope.search.driver:search",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'longrope' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
