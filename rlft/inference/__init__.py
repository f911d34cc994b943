"""What a trained model is good for: load it, draw with it, measure it, export it.

May import the catalog and what lies below.
"""
