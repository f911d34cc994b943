"""The emoji world: a miniature with ground truth, its rewards, how its models were made.

May import all rooms below the catalog; nothing but the catalog imports it.
"""
