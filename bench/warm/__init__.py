"""What warm-ups gain on real engines.

In reading order: ``texts``, ``arms``, ``engines``, then the three situations, ``tool_waits``, ``next_stage`` and
``night``, and ``results`` (tables, curves, the page).
"""
