"""Files that survive a crash: atomic writes, checkpoints, pictures.

May import parallel and types only.
"""
