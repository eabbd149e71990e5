"""What lies ahead in a graph, and what its runs usually take."""
