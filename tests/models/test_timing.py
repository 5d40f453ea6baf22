from __future__ import annotations

import time

from torch import nn

from optimum_rmtkd.models.timing import BLOCK, compare_latency


class Sleeper(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.calls = seconds, []

    def forward(self, log):
        assert not self.training
        log.append(self)
        time.sleep(self.seconds)


def test_ratio_and_interleaving():
    slow, quick, log = Sleeper(0.02), Sleeper(0.002), []
    latency = compare_latency(slow, quick, {"log": log}, repeats=3)
    block = 1 + BLOCK  # the first pass of a block is not measured
    assert log == ([slow] * block + [quick] * block) * 4
    assert 0.02 <= latency.before < 0.2 and latency.after < latency.before
    assert 2 < latency.ratio <= 10.5
