"""The Orla paper's cache experiment on real engines: a support desk's stages, flushed per request or per workflow.

In reading order: ``workflows`` (the texts and the graph), ``engines`` (with their pools), ``arms``, ``results``.
"""
