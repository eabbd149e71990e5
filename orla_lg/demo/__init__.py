"""The demo: a customer support desk, written as a plain LangGraph graph and served by orla_lg.

Read ``graph`` (the application, which knows nothing of orla_lg), then ``run`` (the one line that wraps it).
"""
