"""A long run under faults: the engine, the graph, the load, the account of every call, and the checks."""
