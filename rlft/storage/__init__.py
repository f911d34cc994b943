"""Files that survive a crash: atomic writes, checkpoints, pictures.

May import types only.
"""
