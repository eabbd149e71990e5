"""The Orla paper's cache experiment on real engines: a support desk's stages, flushed per request or per workflow."""
