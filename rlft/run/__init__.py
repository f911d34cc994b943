"""What a training run is made of: opened, checked, saved, resumed, stopped.

May import the catalog and what lies below; the loop itself is rlft/train.py.
"""
