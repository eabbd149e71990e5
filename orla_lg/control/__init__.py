"""The door into a running process: a local socket, what is said through it, and both of its sides.

Read ``protocol`` (what is said), ``state`` (what is shown), ``server`` (in the process), ``client`` (in another).
No prompt, key or header ever goes through it.
"""
