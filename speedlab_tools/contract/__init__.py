"""What saved workflows may rely on, and whether a release keeps it."""
