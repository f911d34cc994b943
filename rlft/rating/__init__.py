"""People compare pictures: what they are shown, the page, their votes, and what these say.

May import the catalog, what draws (inference), and what lies below.
"""
