"""An engine that is unloaded, as `DELETE /admin/models` does it, leaves a process that signals still reach."""

from __future__ import annotations

import subprocess
import sys

from engines.bundle import Bundle

PROGRAM = """
import gc, os, signal, sys, threading
from pathlib import Path

from engines.base import EngineOptions, load_engine
from engines.bundle import load_bundle

received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
engines = [load_engine(load_bundle(Path(sys.argv[1])), EngineOptions(runtime="openvino"))]


def unload():
    engines.pop().close()
    gc.collect()


thread = threading.Thread(target=unload)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
assert received == [signal.SIGTERM]
"""


def test_sigterm_after_an_engine_was_unloaded_on_another_thread_is_handled(tiny_bundle: Bundle) -> None:
    """It killed the process (see `engines.openvino.core`): a server died instead of draining."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_bundle.root)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


def test_importing_openvino_here_reports_to_nobody() -> None:
    script = (
        "import sys, engines.openvino\n"
        "assert 'openvino.tools.ovc.telemetry_stub' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry.')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
