"""The LangGraph side: identity (``context``, ``events``), and the ways in (``wrap``, ``chat_model``, ``saver``)."""
