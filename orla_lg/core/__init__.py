"""The life of a call. Standard library only; nothing here knows LangChain or HTTP.

The spine, in this order: ``lifecycle`` (the eight steps), ``call`` and ``identity`` (what flows), ``inflight`` and
``services`` (one call under way, and what it needs of its core), ``mapping`` and ``view`` (where it goes),
``scheduler``, ``queues`` and ``policies`` (when), ``steps`` (how it waits), ``workflow`` (runs and workflows),
``record`` (what happened), ``serving`` (all of it made and joined), ``background`` (the one thread that works
unasked), ``bounded``.

The rooms behind it: ``engine`` (what an engine is: backend, capabilities, health, retries), ``cache`` (what an engine
holds), ``placement`` (the backends that a call may go to), ``limits`` (whether it may, and how long it waits),
``memory`` (what stays cached, and the progress of graphs), ``prefetch`` and ``lookahead`` (what lies ahead),
``accounting`` (what follows a record),
``operation`` (what may be changed and seen while calls wait), ``boundary`` (what comes in and goes out).
``backend`` and ``control`` are documented paths for adapters.
"""
