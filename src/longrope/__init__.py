"""A longer context window for a RoPE language model: LongRoPE (arXiv 2402.13753), searched, measured and exported.

The public names are loaded when they are used: importing longrope imports neither torch nor transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longrope.api import apply as apply
    from longrope.api import load as load
    from longrope.compare import compare as compare
    from longrope.doctor.run import doctor as doctor
    from longrope.errors import UserError as UserError
    from longrope.evaluate.run import evaluate as evaluate
    from longrope.export.run import export as export
    from longrope.export.verify import verify as verify
    from longrope.extension.run import extend as extend
    from longrope.factors import FactorTable as FactorTable
    from longrope.factors import RopeFactors as RopeFactors
    from longrope.planning.run import plan as plan
    from longrope.search.driver import search as search
    from longrope.training.run import finetune as finetune

__version__ = "0.1.0"

_PUBLIC = {
    "FactorTable": "longrope.factors:FactorTable",
    "RopeFactors": "longrope.factors:RopeFactors",
    "UserError": "longrope.errors:UserError",
    "apply": "longrope.api:apply",
    "compare": "longrope.compare:compare",
    "doctor": "longrope.doctor.run:doctor",
    "evaluate": "longrope.evaluate.run:evaluate",
    "export": "longrope.export.run:export",
    "extend": "longrope.extension.run:extend",
    "finetune": "longrope.training.run:finetune",
    "load": "longrope.api:load",
    "plan": "longrope.planning.run:plan",
    "search": "longrope.search.driver:search",
    "verify": "longrope.export.verify:verify",
}
__all__ = ["__version__", *_PUBLIC]


class _Package(ModuleType):
    """The package: a public name is what _PUBLIC says, also once a module of that name (search, export) is imported."""

    def __getattribute__(self, name: str) -> Any:
        if name not in _PUBLIC:
            return super().__getattribute__(name)
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(module), attribute)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
