"""The gated delta rule: a decaying state whose writes replace what was stored under a key."""

from pallas_kernels.gated_delta_rule.api import explain, gated_delta_rule

__all__ = ["explain", "gated_delta_rule"]
