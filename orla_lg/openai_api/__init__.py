"""The OpenAI wire: what its bytes mean (``wire``), watching them pass (``tap``), carrying them (``client``)."""
