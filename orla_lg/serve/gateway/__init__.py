"""The gateway: OpenAI's and Anthropic's APIs over a hosted core, for everything that is no LangGraph graph."""
