"""The API of the first Orla daemon, as ``pyorla`` speaks it."""
