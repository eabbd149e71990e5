"""The life of a call, one file per step. Standard library only; nothing here knows LangChain or HTTP.

Read in this order: ``serving`` and ``attempts`` (the eight steps), ``call`` (what flows), ``identity`` and
``workflow`` (who calls), ``mapping`` (where), ``limits``, ``budgets`` and ``spending`` (whether it may),
``admission``, ``claims``, ``residency`` and ``capacity`` (whether its cache fits), ``queues`` and ``policies``
(when), ``foresight``, ``outlook``, ``estimates`` and ``forecast`` (what lies ahead), ``memory``, ``slots`` and
``fanout`` (what stays cached, and who waits for it), ``desk`` and ``health`` (one backend's), ``dispatch``
(whether to try again), ``record`` (what happened), ``steering`` and ``waiting`` (what may be changed and seen
while calls wait), ``backend`` and ``control`` (what an engine is to us, and what only some can), ``background``
(the one thread that works unasked).
"""
