"""Every check of this repository, on the installed package: format, lint, types, and tests with doctests and notebooks.

All of them run even where one fails. Each starts in an empty directory, so that it finds the package that pip installed
and not the folder `pnem` of this repository.
"""

import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = str(ROOT / "pyproject.toml")
# A process for each hardware thread, at most 8: each takes up to 2 GB.
AT_ONCE = ["--numprocesses", "logical", "--maxprocesses", "8", "--dist", "worksteal"]
CHECKS = {
    "format": ["ruff", "format", "--check", str(ROOT)],
    "lint": ["ruff", "check", "--output-format", "concise", str(ROOT)],
    "types": ["mypy", "--config-file", SETTINGS, "--cache-dir", str(ROOT / ".mypy_cache"), "-p", "pnem"],
    "tests": ["pytest", "-c", SETTINGS, "--rootdir", str(ROOT), *AT_ONCE, "--durations=10", str(ROOT / "tests")],
}


def main() -> int:
    spec = find_spec("pnem")
    if spec is None or spec.origin is None or (ROOT / "pnem") in Path(spec.origin).parents:
        print("pnem is not installed, or is editable: run pip install -c constraints.txt '.[test]' first")
        return 2
    # The tests' tensors are so small that threads would only wait for each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    lines, failed = [], 0
    for name, arguments in CHECKS.items():
        print(f"{name}: {' '.join(arguments)}", flush=True)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as empty:
            result = subprocess.run([sys.executable, "-m", *arguments], cwd=empty, env=environment)
        failed += result.returncode != 0
        lines.append(f"{'FAILED' if result.returncode else 'ok':8}{name:8}{time.perf_counter() - start:6.0f} s")
    print(*lines, f"{len(CHECKS) - failed} passed, {failed} failed", sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
