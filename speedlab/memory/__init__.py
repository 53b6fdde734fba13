"""Memory plans: prediction, placement, streaming."""
