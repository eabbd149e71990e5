"""More workflows than slots on a real llama.cpp: ``workflows`` (load and engine), ``results``."""
