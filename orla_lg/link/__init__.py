"""The core in another process: what crosses between them, and the side that calls (``Orla.remote``)."""
