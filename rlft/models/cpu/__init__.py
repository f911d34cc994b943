"""Forms of operations that only CPUs need: same numbers, other loops.

Accelerators never run them.
"""
