"""The small example graph of each node that its help page shows."""

from __future__ import annotations

import pytest

from speedlab_tools.contract import read_contract

from .conftest import PICTURES

pytestmark = pytest.mark.browser

# What feeds a socket of a type, and what takes an output of it, in the smallest graph that makes sense.
EXAMPLE = """(type) => {
  const graph = app.rootGraph ?? app.graph;
  graph.clear();
  const feeds = {MODEL: "SpeedLabCheckpointLoader", CLIP: "SpeedLabCheckpointLoader", VAE: "SpeedLabCheckpointLoader",
    CONDITIONING: "SpeedLabTextEncode", LATENT: "EmptyLatentImage", IMAGE: "SpeedLabVAEDecode",
    SPEEDLAB_PROFILE: "SpeedLabProfileSampler"};
  const takes = {MODEL: "SpeedLabProfileSampler", CLIP: "SpeedLabTextEncode", IMAGE: "PreviewImage",
    CONDITIONING: "SpeedLabProfileSampler", LATENT: "SpeedLabVAEDecode", SPEEDLAB_PROFILE: "SpeedLabProfileReport",
    VAE: "SpeedLabVAEDecode"};
  const columns = [[], [], []];
  const add = (kind, column) => {
    const node = LiteGraph.createNode(kind);
    graph.add(node);
    // Room for results, empty before a run, would make all else too small to read.
    const face = node.widgets?.find((widget) => widget.name === "speedlab_text");
    if (face) node.removeWidget(face);
    columns[column].push(node);
    return node;
  };
  const socket = (list, kind) => (list ?? []).findIndex((slot) => slot.type === kind && !slot.widget);
  const main = add(type, 1);
  const fed = {};
  main.inputs.forEach((input, slot) => {
    const kind = feeds[input.type];
    if (!kind || input.widget) return;
    // Two conditionings or two images come from two nodes, a model and a CLIP from one.
    const key = ["CONDITIONING", "IMAGE", "LATENT"].includes(input.type) ? kind + slot : kind;
    if (kind === type) return;
    fed[key] ??= add(kind, 0);
    fed[key].connect(socket(fed[key].outputs, input.type), main, slot);
  });
  const taken = {};
  main.outputs.forEach((output, slot) => {
    const kind = takes[output.type];
    if (!kind || kind === type || (Object.keys(taken).length >= 2 && !taken[kind])) return;
    taken[kind] ??= add(kind, 2);
    main.connect(slot, taken[kind], socket(taken[kind].inputs, output.type));
  });
  let x = 0;
  for (const column of columns.filter((nodes) => nodes.length)) {
    let y = 0, width = 0;
    for (const node of column) {
      const size = node.computeSize();
      node.setSize([Math.max(size[0], 230), size[1]]);
      node.pos = [x, y];
      y += node.size[1] + 60;
      width = Math.max(width, node.size[0]);
    }
    x += width + 70;
  }
  const nodes = columns.flat();
  const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]));
  const scale = Math.min(1, 1150 / right, 640 / (bottom + 40));
  const view = app.canvas.canvas.getBoundingClientRect();
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [(140 - view.left) / scale, (190 - view.top) / scale];
  app.canvas.selectNodes?.([]);
  app.canvas.deselectAll?.();
  app.canvas.setDirty(true, true);
  const alone = (i) => feeds[i.type] && !i.widget && i.link == null && feeds[i.type] !== type;
  return {unlinked: main.inputs.filter(alone).map((i) => i.name),
          clip: {x: 120, y: 190 - 50 * scale, width: right * scale + 40, height: (bottom + 70) * scale}};
}"""


@pytest.mark.full
def test_every_node_has_its_example_graph(open_canvas, request):
    """All its sockets find a partner; the image is taken with SPEEDLAB_PICTURES=1, on the pinned frontend."""
    if "newest" in request.node.name:
        canvas = open_canvas()
        assert canvas.evaluate(EXAMPLE, "SpeedLabProfileSampler")["unlinked"] == []
        return
    canvas = open_canvas()
    nodes = canvas.evaluate(
        "() => Object.keys(LiteGraph.registered_node_types).filter((t) => t.startsWith('SpeedLab'))"
    )
    assert set(nodes) >= read_contract().keys()
    for node_id in sorted(nodes):
        made = canvas.evaluate(EXAMPLE, node_id)
        assert made["unlinked"] == [], node_id
        if not PICTURES:
            continue
        canvas.page.wait_for_timeout(350)
        canvas.shot(node_id, "js/docs/images", clip=made["clip"])
