"""What makes a CPU fast: oneDNN, vector instructions, the allocator."""
