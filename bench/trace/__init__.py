"""A recorded trace of one run, drawn: what LangSmith gets from a wrapped graph."""
