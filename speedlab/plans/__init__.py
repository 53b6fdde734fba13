"""Plans as text, the table of techniques, sweeps."""
