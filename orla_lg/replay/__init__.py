"""``orla-lg replay``: recorded traffic in virtual time, under the setting that it had and under others.

``reading`` and ``public`` read records and public traces; ``workload`` makes of them calls that follow one another;
``calibration`` finds the engine's numbers in them; ``simulation`` plays them through the real core before a simulated
engine; ``figures`` holds what came of it against what happened; ``report`` shows it, ``command`` is the command line.
"""
