"""Scores a batch: one reward or several together, on devices or in threads of the host.

May import what reads the names of rewards, and what lies below rewards.
"""
