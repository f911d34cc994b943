"""Networks in Flax, of policies and of rewards.

May import parallel, config, storage and types; `cpu/` has what only CPUs need, `files/` reads and
writes weights.
"""
