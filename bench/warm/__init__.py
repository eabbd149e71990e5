"""What warm-ups gain on real engines: the parts of ``bench/warm``.

In reading order: ``yard`` (the texts), ``arms`` (who decides, and what is seen of a call), ``places`` (the engines),
then the three situations, ``tool_waits``, ``next_stage`` and ``night``, and ``figures`` (tables, curves, the page).
"""
