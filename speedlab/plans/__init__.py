"""Plans as text, the table of techniques, and the sweep behind the Benchmark node."""
