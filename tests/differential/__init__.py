"""Whether a wrapped graph is ever worse than the bare one, on whatever a server may answer.

``script`` says what a server answers, ``render`` makes bytes of it, ``server`` sends them, ``strategies`` draws
scripts, ``runs`` makes a case's call bare, wrapped and through ``ChatOrla``, ``judging`` compares, ``bench`` holds
what is shared.
"""
