"""One computation over many devices and processes: shards, collectives, parts of a batch.

May import types only.
"""
