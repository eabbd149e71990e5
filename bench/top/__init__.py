"""The picture of ``orla-lg top``."""
