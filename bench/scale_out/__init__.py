"""Several cores and replicas: what a call's wait grows by, and what a core takes of a CPU for it."""
