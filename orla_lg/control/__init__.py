"""Control of a running process through a local socket: the protocol and both of its sides.

Read ``protocol`` (requests and answers), ``state`` (what is shown), ``server`` (in the process), ``client`` (in
another).
No prompt, key or header ever goes through it.
"""
