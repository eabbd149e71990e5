"""``orla-lg top`` and the commands that steer a running process: what they print, and what they ask for."""
