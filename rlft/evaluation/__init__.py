"""Held-out measurements: which images, which metric, with what certainty.

May import diffusion, rewards and what lies below.
"""
