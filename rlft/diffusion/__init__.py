"""The policy: a network with its reverse process, sampled with log-probabilities.

May import models and what lies below; knows no reward.
"""
