"""Workflows and prompts saved with the last release go on working: its nodes, inputs, choices and outputs are there."""

from __future__ import annotations

from speedlab_tools.contract import RENEW, breaches, contract_from_info, info_of, read_contract


def test_everything_of_the_last_release_is_still_there(pack, model_files):
    present = {
        node_id: contract_from_info(node_id, info_of(node)) for node_id, node in pack.NODE_CLASS_MAPPINGS.items()
    }
    broken = breaches(read_contract(), present)
    assert not broken, "\n".join([
        "saved workflows would break:", *broken,
        f"Take it back, or where it is meant: {RENEW} with a running ComfyUI, and a line in the changelog.",
    ])  # fmt: skip
