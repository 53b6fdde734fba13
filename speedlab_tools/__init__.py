"""What a shell runs. It imports `speedlab`; nothing in there imports it."""
