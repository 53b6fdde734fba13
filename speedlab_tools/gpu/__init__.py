"""`run.py gpu`: one suite of measurements for a bare machine with a GPU, resumed over several calls.

`plan` says what is measured, the `measure_*` files how, `report` keeps and prints the rows. Nothing here is
part of the pack in ComfyUI.
"""
