"""How well rlft learns, beside TRL: the same model, prompts, reward and guidance.

May import everything; nothing imports it.
"""
