"""Cores on Ray: actors that host servers, placed and restarted by Ray; it carries no call and decides none.

A core on Ray is the very same server on a thread of an actor's process, reached by the same socket. What keeps it
single is its lease in the store (``serve.store.lease``), and no idea that Ray has of which node is alive.
"""
