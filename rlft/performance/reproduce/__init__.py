"""Does it work: the tables of the paper, trained and measured by one command.

May import everything; nothing imports it.
"""
