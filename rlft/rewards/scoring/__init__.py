"""Scores a batch: one reward or several together, on devices or in threads of the host.

May import rewards' grammar and parallel.
"""
