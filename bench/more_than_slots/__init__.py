"""The parts of ``bench/slots.py``: the arms' turns, and what they showed."""
