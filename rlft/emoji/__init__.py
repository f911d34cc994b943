"""The emoji world: a miniature with ground truth, its rewards, how its models were made.

May import all rooms below the catalog; only the catalog and the scripts that
make its models import it.
"""
