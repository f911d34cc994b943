"""Everything that reads or writes weights: layouts, formats, the hub.

May import the networks.
"""
