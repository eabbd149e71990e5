"""The LangGraph side: who calls (``context``, ``events``), and the ways in (``wrap``, ``chat_model``, ``saver``)."""
