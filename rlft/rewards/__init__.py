"""Rewards: a file for each family, and `user` for those that a user writes.

May import models and what lies below; `rlft.catalog` says which names there are.
"""
