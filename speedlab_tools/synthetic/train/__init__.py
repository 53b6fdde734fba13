"""Trains the model that draws, from nothing: `python -m speedlab_tools.synthetic.train`."""
