"""Named objectives over one recipe: the authors' code to the letter, the ablations of the paper, DMD2.

Each is a few changes of `CDMConfig`; nothing else differs, so that rows of a table compare what they say they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from training.config import CDMConfig

Changes = Mapping[str, Any]
FIXED: Changes = {"schedule": "fixed"}
NO_CDM: Changes = {"weight_cdm": 0.0}

Variant = Literal[
    "cdm", "parity", "dmd2", "decoupled", "dynamic", "no-dm", "no-ca", "ca-only", "dm-only", "cdm-only", "fixed",
    "no-perturbation", "gaussian", "below-anchor", "shared-rollout",
]  # fmt: skip

VARIANTS: Mapping[Variant, Callable[[CDMConfig], Changes]] = {
    # the method, and the authors' code
    "cdm": lambda config: {},
    "parity": lambda config: {"shared_forward": False, "truncated_rollout": False, "shared_rollout": False},
    # the steps from DMD2 to CDM
    "dmd2": lambda config: {**FIXED, **NO_CDM, "weight_ca": 0.0, "dm_guidance": config.guidance + 1},
    "decoupled": lambda config: {**FIXED, **NO_CDM},
    "dynamic": lambda config: NO_CDM,
    # the paper's ablations
    "no-dm": lambda config: {"weight_dm": 0.0},
    "no-ca": lambda config: {"weight_ca": 0.0},
    "ca-only": lambda config: {"weight_dm": 0.0, **NO_CDM},
    "dm-only": lambda config: {"weight_ca": 0.0, **NO_CDM},
    "cdm-only": lambda config: {"weight_ca": 0.0, "weight_dm": 0.0},
    "fixed": lambda config: FIXED,
    "no-perturbation": lambda config: {"off_trajectory": "none"},
    "gaussian": lambda config: {"off_trajectory": "gaussian"},
    # ours
    "below-anchor": lambda config: {"off_below_anchor": True},
    "shared-rollout": lambda config: {"shared_rollout": True},
}
"""`dynamic` is the paper's "w/o CDM", `decoupled` Decoupled DMD, `dmd2` DMD2 without its GAN: DM alone, towards the
teacher at guidance scale g + 1, which is where CA + DM lead. `parity` also shifts anchors: `PARITY_SHIFT`."""

PARITY_SHIFT: Mapping[str, float] = {"emoji": 1.5, "sd3": 3.0, "sd35": 3.0, "longcat": 3.1582}
"""The scheduler shift that the authors' code passes anchors through; LongCat's is e^1.15, that of 1024²."""


def changes(variant: Variant, config: CDMConfig, base: str) -> dict[str, Any]:
    """What `variant` changes in the recipe of `base` (a key of `PARITY_SHIFT`)."""
    changed = dict(VARIANTS[variant](config))
    if variant == "parity":
        changed["anchor_shift"] = PARITY_SHIFT[base]
    return changed
