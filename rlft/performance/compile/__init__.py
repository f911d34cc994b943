"""Compiles a run's programs for devices that are not here; counts memory, FLOPs, collectives.

The programs are those of training, from the same constructor.

May import everything; of the others accelerator, benchmark and reproduce import it.
"""
