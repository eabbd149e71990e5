"""The OpenAI wire.

What its bytes mean (``wire``, ``assembly``), watching them pass (``tap``), where they may go (``home``), what an
engine refuses (``dialect``), carrying them (``client``).
"""
