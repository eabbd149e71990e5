"""``orla-lg serve``: what the link and the gateway add, beside LiteLLM's proxy, and whether memory stays flat."""
