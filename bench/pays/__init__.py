"""Whether a mechanism pays: its claim against a core without it, on the same load, in virtual time."""
