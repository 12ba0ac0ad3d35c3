"""Runs a test file's own `main` under Triton's interpreter, which is chosen before a kernel is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

INFERENCE = Path(__file__).resolve().parents[1] / "inference"
needs_interpreter = pytest.mark.skipif(triton.__version__ < "3.7", reason="older interpreters fail with numpy 2.5")


def interpret(file: str, *arguments: str) -> str:
    """The last word that `python file arguments` prints; it must end well."""
    paths = [str(INFERENCE), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run([sys.executable, file, *arguments], env=env, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.split()[-1]
