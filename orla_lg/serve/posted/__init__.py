"""What is posted to the running server: kept in its store, and applied beside what its configuration file says."""
