"""Does it fit, how fast is it, and does it reproduce the paper: what is measured by whole runs.

May import everything; nothing imports it.
"""
