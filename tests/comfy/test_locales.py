"""The translations name every node, input and output that is registered, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from speedlab_tools import locales

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh")
CJK = re.compile("[\u4e00-\u9fff]")
# Characters that the frontend's translation library reads as syntax: placeholders, links, plurals.
MESSAGE_SYNTAX = re.compile(r"[{}@|]")

Leaves = dict[str, str]


def inputs_of(cls: Any) -> dict[str, Any]:
    types = cls.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def node_defs(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def locale_file(language: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def scripts() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "js").rglob("*.js")))


def leaves(tree: dict[str, Any], prefix: str = "") -> Leaves:
    """Every text under its dotted key."""
    found: Leaves = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_english_is_what_the_node_classes_say(pack: ModuleType, model_files: Path) -> None:
    written = locales.file_text(locales.english(pack.NODE_CLASS_MAPPINGS, pack.NODE_DISPLAY_NAME_MAPPINGS))
    assert locales.ENGLISH.read_text(encoding="utf-8") == written, "python -m speedlab_tools locales writes it anew"


def test_chinese_has_every_text_in_the_order_of_the_english_ones() -> None:
    assert list(leaves(node_defs("zh"))) == list(leaves(node_defs("en")))


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_filled_and_plain(language: str) -> None:
    for key, text in leaves(node_defs(language)).items():
        assert text.strip() == text != "", key
        assert not MESSAGE_SYNTAX.search(text), f"{key} holds a character that the frontend reads as syntax: {text}"


def test_chinese_is_translated() -> None:
    texts, original = leaves(node_defs("zh")), leaves(node_defs("en"))
    for key, text in texts.items():
        if key.endswith((".description", ".tooltip")):
            assert text != original[key], f"{key} is still English"
            assert CJK.search(text), f"{key} holds no Chinese: {text}"


def test_display_names_keep_the_packs_name() -> None:
    for language in LANGUAGES:
        for node_id, entry in node_defs(language).items():
            assert entry["display_name"].endswith(" (SpeedLab)"), (language, node_id)


def test_display_names_are_distinct() -> None:
    for language in LANGUAGES:
        names = [entry["display_name"] for entry in node_defs(language).values()]
        assert len(names) == len(set(names)), language


def test_comfyui_serves_the_translations(comfy: ModuleType, tmp_path: Path) -> None:
    """ComfyUI's own collector, in a fresh process as its server is, finds the files in a pack folder of any name."""
    shutil.copytree(ROOT / "locales", tmp_path / "a-pack" / "locales")
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(comfy.__path__[0]).parent)!r})
import folder_paths
folder_paths.folder_names_and_paths["custom_nodes"] = ([{str(tmp_path)!r}], set())
from app.custom_node_manager import CustomNodeManager
print(json.dumps(CustomNodeManager().build_translations()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    collected = json.loads(done.stdout.splitlines()[-1])
    for language in LANGUAGES:
        assert collected[language]["nodeDefs"] == node_defs(language)
        for name in ("settings", "commands"):
            assert collected[language][name] == locale_file(language, name)
        assert collected[language]["speedlab"] == locale_file(language, "main")["speedlab"]


def test_every_node_has_a_chinese_help_page(pack: ModuleType, model_files: Path) -> None:
    """A page names each input twice: as it is called in files, and as the canvas shows it in Chinese."""
    labels = node_defs("zh")
    for node_id, cls in pack.NODE_CLASS_MAPPINGS.items():
        page = ROOT / "js" / "docs" / node_id / "zh.md"
        assert page.is_file(), f"{page.relative_to(ROOT)} is missing"
        text = page.read_text(encoding="utf-8")
        assert CJK.search(text), page
        for name in inputs_of(cls):
            assert f"`{name}`" in text, f"{node_id}/zh.md does not mention {name}"
            label = labels[node_id]["inputs"][name]["name"]
            assert label in text, f"{node_id}/zh.md does not mention {label}, the Chinese name of {name}"


def test_chinese_help_pages_have_the_tables_of_the_english_ones(pack: ModuleType) -> None:
    def shape(text: str) -> tuple[int, int, int]:
        lines = text.splitlines()
        tables = sum(line.startswith("|--") for line in lines)
        headings = sum(line.startswith("#") for line in lines)
        return tables, headings, sum(line.startswith("```") for line in lines)

    for node_id in pack.NODE_CLASS_MAPPINGS:
        docs = ROOT / "js" / "docs"
        original = (docs / f"{node_id}.md").read_text(encoding="utf-8")
        translated = (docs / node_id / "zh.md").read_text(encoding="utf-8")
        assert shape(translated) == shape(original), node_id


def test_no_help_page_is_left_of_a_removed_node(pack: ModuleType) -> None:
    docs, known = ROOT / "js" / "docs", set(pack.NODE_CLASS_MAPPINGS)
    pages = {page.stem for page in docs.glob("*.md")} | {page.parent.name for page in docs.glob("*/*.md")}
    assert pages <= known, sorted(pages - known)


def test_every_node_has_a_picture_of_an_example_graph_on_its_help_page(pack: ModuleType) -> None:
    docs = ROOT / "js" / "docs"
    for node_id in pack.NODE_CLASS_MAPPINGS:
        picture = docs / "images" / f"{node_id}.png"
        how = "SPEEDLAB_PICTURES=1 python run.py test tests/browser/test_pictures.py -k pinned makes it"
        assert picture.is_file(), f"{picture.relative_to(ROOT)} is missing: {how}"
        assert picture.stat().st_size < 150_000, picture
        for page in (docs / f"{node_id}.md", docs / node_id / "zh.md"):
            assert f"](images/{node_id}.png)" in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize("name", ["main", "settings", "commands"])
def test_both_languages_have_the_same_words_with_the_same_placeholders(name: str) -> None:
    texts, original = leaves(locale_file("zh", name)), leaves(locale_file("en", name))
    assert list(texts) == list(original)
    for key, text in texts.items():
        assert text.strip() == text != "", key
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", original[key])), key
        if original[key] != "SpeedLab":
            assert CJK.search(text), f"{key} holds no Chinese: {text}"


def test_the_scripts_words_are_those_of_the_files() -> None:
    words, script = locale_file("en", "main")["speedlab"], scripts()
    used = set(re.findall(r'\bt\("(\w+)"', script))
    built = tuple(re.findall(r"\bt\(`(\w+_)\$\{", script))
    assert used <= words.keys(), sorted(used - words.keys())
    named = set(re.findall(r'"(\w+)"', script))
    unused = [key for key in words if key not in used | named and not key.startswith(built)]
    assert unused == []


def test_settings_and_commands_say_in_english_what_the_script_says() -> None:
    script = scripts()
    for name, prefix in (("settings", "SpeedLab."), ("commands", "SpeedLab.")):
        for key, entry in locale_file("en", name).items():
            assert f'"{prefix}{key.partition("_")[2]}"' in script, key
            for text in entry.values():
                assert json.dumps(text) in script, text


def test_the_extension_is_small_and_asks_nobody_else() -> None:
    script = scripts()
    assert len(script.encode()) < 80_000
    places = re.findall(r"https?://[^\s\"'`]+", script)
    assert set(places) <= {"http://www.w3.org/2000/svg"}, places
    style = (ROOT / "js" / "speedlab.css").read_text(encoding="utf-8")
    assert "url(" not in style and "@import" not in style
