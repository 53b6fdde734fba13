"""Routes, the live feed and the run library: what a browser sees."""
