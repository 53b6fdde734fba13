"""Reports of what was measured."""

from __future__ import annotations

from ..speedlab.common.core import missing_input, output_directory
from ..speedlab.measure import report
from ..speedlab.measure.context import NodeContext
from ..speedlab.measure.store import RunStore
from ..speedlab.sampling.complete import complete
from ..speedlab.web import browser

_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID", "dynprompt": "DYNPROMPT"}


class ProfileReport:
    """Write a profile to JSON and CSV, with charts and a table."""

    NODE_ID = "SpeedLabProfileReport"
    DISPLAY_NAME = "Profile Report (SpeedLab)"
    CATEGORY = "SpeedLab/measure"
    SEARCH_ALIASES = ["profile", "profiler", "timer", "fps", "it/s", "statistics", "vram usage"]
    DESCRIPTION = (
        "Completes a profile with decoding and the finished images, saves it as JSON, adds a row to "
        "output/speedlab/results.csv and saves the images in output/speedlab/images. Connect the images so that "
        "decoding is measured."
    )
    RETURN_TYPES = ("IMAGE", "STRING", "IMAGE", "STRING")
    RETURN_NAMES = ("images", "report", "chart", "json_path")
    OUTPUT_TOOLTIPS = (
        "The images, unchanged.",
        "The whole profile as a table.",
        "Charts of step times, phases, memory and, where they were measured, kernels, as a batch of images.",
        "Where the JSON of this run lies.",
    )
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {"profile": ("SPEEDLAB_PROFILE", {"tooltip": "The profile of a SpeedLab sampler."})},
            "optional": {
                "images": ("IMAGE", {"tooltip": "The decoded images: passed through, saved, and decoding counted."})
            },
            "hidden": _HIDDEN,
        }

    def report(
        self, profile: object, images: object = None, prompt: object = None, extra_pnginfo: object = None,
        unique_id: object = None, dynprompt: object = None,
    ) -> dict:  # fmt: skip
        context = NodeContext.of(prompt, extra_pnginfo, unique_id, dynprompt)
        # Four images take a second to draw, so that happens only where the chart is used.
        completed = complete(profile, images, context, context.is_output_used(self.RETURN_NAMES.index("chart")))
        record = completed.record
        text = report.report_text(record)
        path = RunStore(output_directory()).json_path(record.run_id)
        passed = images
        if images is None:
            passed = missing_input("Profile Report passes on the images connected to it, and none are.")
        return {
            "ui": {
                "text": [text],
                "images": browser.browser_images(record),
                "speedlab": [browser.browser_summary(record, context)],
            },
            "result": (passed, text, completed.chart, str(path)),
        }


NODES = (ProfileReport,)
