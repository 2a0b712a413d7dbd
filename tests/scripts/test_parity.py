"""The same numbers as TRL's own code, in a process of its own: TRL changes the libraries that it is imported beside."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TWICE = f"""
import dataclasses, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import parity
parity.CASES = 2
assert parity.main() == 0
# A bound that is another one on our side alone.
ours = parity.our_loss
parity.LINES = [line for line in parity.LINES if "DAPO" in line.name]
parity.our_loss = lambda line, batch: ours(dataclasses.replace(line, clip=(0.2, 0.27)), batch)
print("CHANGED")
assert parity.main() == 1
"""


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed; it comes with the extra `bench`")
def test_losses_and_advantages_are_those_of_trl_and_a_difference_is_found():
    process = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    same, changed = process.stdout.split("CHANGED")
    assert "DIFFERS" not in same
    assert changed.count("DIFFERS") == 1
    for name in ("GRPO", "Dr. GRPO", "DAPO", "GSPO", "dual clip", "importance cap", "RLOO", "KL 0.3"):
        assert name in same
