"""`interpreted/` needs Triton imported under TRITON_INTERPRET=1, all else needs it imported without: two processes.

`TRITON_INTERPRET=1 pytest tests/engines/kernels/interpreted` runs the first, and so does
`test_kernels_in_interpreter.py`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
collect_ignore_glob = [] if find_spec("triton") else ["*.py"]  # there are wheels for Linux only
