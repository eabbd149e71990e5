"""Agents that together need more KV cache than the engine has: the load, its arms live and simulated, the figures.

In reading order: ``load`` (the sessions), ``seen`` (what is measured, and the bound of an infinite cache),
``simulated`` and ``live`` (who runs them), ``figures`` (tables, goals and the drawing).
"""
