"""Weights → callables: the bundle format, model families, export, and one file per runtime.

Importing this package (or anything in it but ``export`` and ``families``) needs neither torch nor diffusers.
"""

import sys

# Importing openvino sends an event to an analytics service, unless its telemetry package is absent: it has a stub for
# that. Whoever runs this has not been asked, so the package is absent.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
