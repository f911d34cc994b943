"""What a run shows: curves, tables, grids of samples, one page.

May import evaluation's results and what lies below.
"""
