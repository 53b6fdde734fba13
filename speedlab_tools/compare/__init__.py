"""Two tables of results: ratio and verdict."""
