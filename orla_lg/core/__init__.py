"""The life of a call, one file per step. Standard library only; nothing here knows LangChain or HTTP.

Read in this order: ``serving`` (the eight steps on a page), ``call`` (what flows), ``identity`` and
``workflow`` (who calls), ``mapping`` (where), ``queues`` and ``policies`` (when), ``memory`` and
``slots`` (what stays cached), ``dispatch`` (one attempt, and whether to try again), ``record`` (what
happened), ``backend`` and ``control`` (what an engine is to us, and what only some can), ``background``
(the one thread that works unasked).
"""
