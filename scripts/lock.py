"""Write constraints.txt: one exact version of every package that any extra needs (`make lock`).

pip itself resolves, in a throw-away environment, without installing. Local versions (`2.13.0+cpu`) lose their local
part, so that the same file takes the CPU build where pip finds one and the CUDA build elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = f"""\
# Exact versions of everything that serving, training and the tests use. Written by `make lock`, resolved on
# Python {sys.version_info[0]}.{sys.version_info[1]}; don't edit.
"""


def resolve() -> dict[str, str]:
    """Version by package for all extras together, by pip's own resolver."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python, report = Path(folder) / "bin" / "python", Path(folder) / "report.json"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        command = [*pip, "--dry-run", "--ignore-installed", "--report", str(report), f"{ROOT}[dev]"]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {item["metadata"]["name"]: item["metadata"]["version"] for item in found}
    del versions["cdm-serve"]
    return {name.lower().replace("_", "-"): version.split("+")[0] for name, version in versions.items()}


def main() -> None:
    """Resolve, then replace the file."""
    lines = [f"{name}=={version}\n" for name, version in sorted(resolve().items())]
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
