"""DeepCache: deep features of the UNet are kept for some steps (arXiv 2312.00858)."""
