"""Engines with slots: the table, files of saved slots, swaps, fan-out."""
