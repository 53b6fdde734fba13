"""Forecasting the denoised latent of some steps from the steps before, in place of evaluating the model."""
