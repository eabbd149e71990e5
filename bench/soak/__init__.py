"""Parts of ``soak.py``: the engine, the graph, the load, the account of every call, and the figures at the end."""
