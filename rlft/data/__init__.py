"""Prompts and pairs of images with captions, from files, and the order in which they are drawn.

May import types, config and storage.
"""
