"""The peak of a forward is that of the tensors that live at once."""

from __future__ import annotations

import pytest
import torch

from dsm_tune.measuring.peak import peak_mib


def test_what_is_freed_makes_room_and_views_take_none() -> None:
    x = torch.ones(1 << 18)  # 1 MiB

    def chain() -> torch.Tensor:
        y = x * 2  # + 1
        z = y + 1  # + 2
        del y
        return (z.view(2, -1)[0] * 3).sum()  # 1 + 0.5

    assert peak_mib(chain, 0, torch.device("cpu")) == pytest.approx(2.0)
    assert peak_mib(chain, x.nbytes, torch.device("cpu")) == pytest.approx(3.0)
