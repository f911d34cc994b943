"""How fast rlft is, beside what one would use instead.

One run measures all sides in turns.

May import everything; of the others only accelerator imports it.
"""
