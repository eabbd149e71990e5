"""The parts of ``bench/slots``: the arms' turns, and what they showed."""
