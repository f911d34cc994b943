"""How a model learns from scored images: one file for each algorithm, pure functions of arrays.

May import diffusion, rewards and what lies below; knows no task, no file and no flag.
"""
