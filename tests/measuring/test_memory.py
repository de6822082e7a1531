"""Memory that is freed stays with the process that asked for that."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# The heap may still grow in one forward or another until its pieces lie well, so that a mean would
# depend on where the system happened to put it; what each forward pays is the median.
CODE = """
import resource, statistics, sys
import torch
from dsm_tune.measuring.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
x = torch.ones(8, 1 << 20)
faults = []
for _ in range(41):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.nn.functional.gelu(x * 2).sum()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_forward_that_repeats_faults_no_page_in_once_freed_memory_is_kept() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", CODE, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") == 0
    assert faults("plain") > 1000  # or the test would show nothing
