"""One owner for a thread: a run holds a lease on the thread that it reads, and only its owner writes to it."""
