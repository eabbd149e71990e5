"""The core in a process of its own: its doors, its keys, what outlives it (``orla-lg serve``, extra ``serve``)."""
