"""ComfyUI access, errors, dtypes, tables: what every layer stands on."""
