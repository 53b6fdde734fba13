"""Stock nodes and the best plan side by side."""
