"""The life of a call, and rooms behind it. Standard library only; nothing here knows LangChain or HTTP.

The files of this package itself are the spine: what a call passes. Read them in this order: ``lifecycle`` (the
eight steps), ``call`` and ``identity`` (what flows through them), ``mapping`` (where a call runs),
``scheduler``, ``queues`` and ``policies`` (when), ``inflight`` and ``services`` (the grant, until the response has
ended, and what a call needs of its core), ``record`` (what is kept of it), ``workflow`` (runs, and what happens to
them), ``steps`` and ``background`` (how it waits, and what works meanwhile), ``serving`` (one core: its parts made
and joined).

The packages are rooms; each answers one kind of question, and its ``__init__`` says which: ``boundary``,
``engine``, ``lookahead``, ``guard``, ``memory``, ``limits``, ``cache`` (the wall, with ``prefix`` and ``slots``
behind it), ``prefetch``, and, on the spine instead of behind it, ``placement``, ``accounting``, ``operation``. A room
imports what is below it and the values of the spine. ``backend`` and ``control`` are documented paths into
``engine``.
"""
