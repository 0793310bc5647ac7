"""Figures, as ratios against peers in one run. Nothing in the tests depends on time."""
