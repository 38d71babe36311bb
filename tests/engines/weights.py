"""A bundle with the student's own folder in it, as `cdm-export --weights` leaves it, without exporting again."""

from __future__ import annotations

import shutil
from pathlib import Path

from engines.bundle import Bundle, load_bundle, write_manifest
from engines.export.export import copy_model


def with_weights(bundle: Bundle, student: Path, out: Path) -> Bundle:
    """A copy of `bundle` at `out`, and `student` in it."""
    shutil.copytree(bundle.root, out)
    write_manifest(out, bundle.manifest.model_copy(update={"model": copy_model(student, out)}))
    return load_bundle(out)
