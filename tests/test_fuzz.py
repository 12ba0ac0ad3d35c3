"""fuzz.py for a minute. FUZZ_SECONDS=3600 in the environment for an hour."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))


@pytest.mark.timeout(SECONDS + 300)
def test_commands_end_well_on_damaged_folders():
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, script, "--seconds", str(SECONDS)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) cases: (\d+) with exit code 0, (\d+) with 2, 0 failed", done.stdout)
    cases, good, refused = map(int, found.groups())
    assert cases > SECONDS and good and refused
