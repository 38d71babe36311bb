"""`cdm-bench build`: an export watched from outside, engines built and loaded in fresh processes, bytes counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.build import SETTINGS_ERRORS, goal, largest_component, phase_of
from benchmarks.child_memory import Watched, run_watched
from benchmarks.main import main
from engines.bundle import load_bundle
