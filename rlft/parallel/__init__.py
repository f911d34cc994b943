"""One computation over many devices and processes: shards, collectives, parts of a batch.

May import config and types only.
"""
