"""Gateways that hold no state: the doors of HTTP before a core elsewhere (``orla-lg serve --gateway``)."""
