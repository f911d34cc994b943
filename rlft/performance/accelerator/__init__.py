"""What the device that is here does with the trainer: correctness, speed, memory, kernels.

`experiments/accelerator.py` runs its parts, each in a process of its own.

May import everything; nothing imports it.
"""
