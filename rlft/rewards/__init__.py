"""Rewards: a file for each family, and `user` for those that a user writes.

May import models, parallel and config; `rlft.catalog` says which names there are.
"""
