"""The drawn world of the demo checkpoint: scenes with captions, and the examiner that reads them from pixels."""
