"""A model that is loaded: what its configuration says, and whether it rotates as that says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from longrope.configs import rope_config, table_from_config
from longrope.doctor.examine import SEVERITIES, Finding, examine
from longrope.errors import UserError
from longrope.patch import ScaledRotary, rotary_modules, stock_frequencies
from longrope.rope import inverse_frequencies

_TOLERANCE = 1e-2  # of frequencies that were rounded to half precision


def examine_model(model: PreTrainedModel) -> list[Finding]:
    """All findings about a loaded model, errors first: of its configuration, and `set-after-load`.

    A scaling that is written to `model.config` once the model is built does nothing, or half of what it says:
    transformers computes its frequencies when it builds a model.
    """
    config: Any = model.config.get_text_config()
    described = config.to_dict()
    found = examine(described)
    try:
        own, theta = table_from_config(described).rows[0], rope_config(described).rope_theta
    except UserError:
        return found  # which the findings say
    expected = inverse_frequencies(theta, torch.tensor(own.rescale))
    for _, _, stock in rotary_modules(model):
        if isinstance(stock, ScaledRotary):
            continue
        frequencies, scaling, _ = stock_frequencies(stock)
        alike = frequencies.shape == expected.shape
        if not alike or not torch.allclose(frequencies.float().cpu(), expected, rtol=_TOLERANCE, atol=0):
            what = "the model rotates by other frequencies than its configuration says"
        elif abs(scaling - own.attention_factor) > _TOLERANCE:
            what = f"the attention factor is {scaling:.4g} and that of the configuration {own.attention_factor:.4g}"
        else:
            continue
        do = "change the configuration before the model is built, or use longrope.apply"
        found.append(Finding("set-after-load", "error", what + ": it was changed after the model was built", do, False))
        break
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
