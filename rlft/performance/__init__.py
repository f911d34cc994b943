"""Does it fit, and how fast is it: measurements of the code, not of models.

May import everything; nothing imports it.
"""
