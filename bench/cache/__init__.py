"""The Orla paper's cache experiment on real engines: a support desk's stages, flushed per request or per workflow.

In reading order: ``desk`` (the texts and the graph), ``places`` (the engines and their pools), ``turns`` (the arms),
``figures`` (tables, curves, the page). What is seen of calls, and how turns are kept, is ``under_pressure``'s.
"""
