"""The scenarios: what they run, as graphs and as workflow files."""
