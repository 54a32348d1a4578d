"""Running the command line as a user does: in a process of its own, or (fast) in this one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from bipdeploy.cli import commands as cli

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SMOKE = RECIPES / "smoke.yaml"
SCRIPT = shutil.which("bipdeploy", path=str(Path(sys.executable).parent)) or "bipdeploy"

_BAR = re.compile(r" \d+/[\d?]+ \d:\d\d:\d\d")  # a progress bar's count and time
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


def bipdeploy(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None,
              **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `bipdeploy ARGUMENTS`; streams are captured as text."""
    return _run([SCRIPT, *map(str, arguments)], cwd, env, options)


def bipdeploy_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As `bipdeploy`, in this process: for commands that would spend seconds on loading torch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (mock.patch.object(sys, "argv", ["bipdeploy", *map(str, arguments)]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def python(code: str, *arguments: object, cwd: Path | None = None,
           env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE ARGUMENTS`; fails where the code does."""
    done = _run([sys.executable, "-c", code, *map(str, arguments)], cwd, env, {})
    assert done.returncode == 0, done.stderr
    return done


def _run(command: list[str], cwd: Path | None, env: dict[str, str] | None,
         options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, check=False,
                          encoding="utf-8", env={**os.environ, **ENVIRONMENT, **(env or {})},
                          **options)


def message(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr that are no progress bars."""
    return [line for line in done.stderr.splitlines() if line.strip() and not _BAR.search(line)]


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """The one line that a failed command shows, which holds all of `words`."""
    lines = message(done)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def leftovers(folder: Path) -> list[Path]:
    """What a stage that failed would leave behind: half-written files and folders."""
    return [p for p in folder.rglob("*") if p.name.endswith((".partial", ".old"))]
