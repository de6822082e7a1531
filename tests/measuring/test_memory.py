"""Memory that is freed stays with the process that asked for that."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from dsm_tune.measuring.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
x = torch.ones(8, 1 << 20)
for _ in range(3):
    torch.nn.functional.gelu(x * 2).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.nn.functional.gelu(x * 2).sum()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_forward_that_repeats_faults_no_page_in_once_freed_memory_is_kept() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", CODE, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 20
    assert faults("plain") > 1000  # or the test would show nothing
