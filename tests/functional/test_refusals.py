"""What the functions refuse, each with the value, what is allowed and, where there is one, the remedy."""

import math
import re

import pytest
import torch

from repair_lightning import functional as fn

MASK = torch.ones(3, 4, dtype=torch.bool)
STATES, SHARDS = torch.ones(3, 4, 5), torch.zeros(1, 6, 5)
ONE, NAN = torch.ones(1), math.nan

REFUSED = {
    "mask_ratio must be in (0, 1], got 1.3": lambda: fn.bernoulli_mask((2,), 1.3, torch.Generator()),
    "values must have shape (2,), one per open": lambda: fn.unpack_values(torch.zeros(3), MASK[0, :2]),
    "margins.edit must be positive and finite, got nan": lambda: fn.Margins(2.0, math.nan, 10.0),
    "pool must be one of last, mean, max, got 'best'": lambda: fn.activation_scores(STATES, SHARDS, MASK, "best"),
    "thresholds must be positive, got [1.0, -1.0]": lambda: fn.decide(torch.ones(1, 2), torch.tensor([1.0, -1.0])),
    "false_fire_rate must be in [0, 1), got 1.0": lambda: fn.calibrate_threshold(ONE, ONE, 1.0),
    "positive scores must be finite and at least 0, got [nan]": lambda: fn.calibrate_threshold(ONE * NAN, ONE, 0.1),
    "weights must be finite and at least 0, got [-1.0]": lambda: fn.ties_merge(torch.ones(1, 4), -ONE),
    "deltas must be finite, got inf or NaN in shards [0]": lambda: fn.ties_merge(NAN * torch.ones(1, 4), ONE),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        REFUSED[message]()
