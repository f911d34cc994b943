"""What a user can set: the parts of a run's settings, flags made from them, their stored form.

May import types only.
"""
