"""Several cores on one store: each has a pool of backends, and all find each other."""
