"""How a model learns from scored images: one file for each algorithm, pure functions of arrays.

May import diffusion, rewards and what lies below; knows tasks and flags as settings alone, and no
file.
"""
