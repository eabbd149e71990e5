"""Agents that together need more KV cache than the engine has.

In reading order: ``workflows`` (the sessions), ``arms``, ``simulated`` and ``live`` (one arm's turn), ``results``
(tables, goals and the drawing).
"""
