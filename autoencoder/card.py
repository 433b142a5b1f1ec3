"""Model cards: the hub's front matter, Markdown by section, and what of a run may stand in public. Torch-free."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from autoencoder.runtime.config_file import to_yaml

HUB_ID = "PATH_OR_HUB_ID"
"""Stands in a card's code for the place that it is loaded from, until that has a name."""
TAG = "firststage"


@dataclass(frozen=True)
class Card:
    """A README.md of a model repository."""

    front: Mapping[str, Any]
    """Front matter, which the hub reads."""
    sections: Mapping[str, str]
    """Markdown by heading; what stands before the first one, the title, is under the empty heading."""

    @classmethod
    def parse(cls, text: str) -> "Card":
        """The card that a file holds; front matter that is no mapping counts as none."""
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            front = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError:
            front = None
        sections, heading, fenced = {"": list[str]()}, "", False
        for line in text[match.end() if match else 0 :].splitlines():
            fenced ^= line.startswith("```")
            if line.startswith("## ") and not fenced:
                heading = line.removeprefix("## ").strip()
                sections.setdefault(heading, [])
            else:
                sections[heading].append(line)
        return cls(front if isinstance(front, dict) else {}, {name: "\n".join(lines).strip() for name, lines in sections.items()})

    def text(self) -> str:
        """The file."""
        front = yaml.safe_dump(dict(self.front), sort_keys=False, allow_unicode=True, width=140)
        body = [text if not heading else f"## {heading}\n\n{text}" for heading, text in self.sections.items()]
        return f"---\n{front}---\n\n" + "\n\n".join(body) + "\n"

    def with_front(self, **values: Any) -> "Card":
        """With these entries of the front matter; None leaves one as it is."""
        return replace(self, front={**self.front, **{key: value for key, value in values.items() if value is not None}})

    def without_front(self, name: str) -> "Card":
        """Without this entry of the front matter."""
        return replace(self, front={key: value for key, value in self.front.items() if key != name})

    def with_section(self, heading: str, text: str | None, *, before: Sequence[str] = ()) -> "Card":
        """With this section, in its place where there is one, else before the first that there is of `before`; None takes it away."""
        if text is None:
            return replace(self, sections={name: its for name, its in self.sections.items() if name != heading})
        if heading in self.sections:
            return replace(self, sections={**self.sections, heading: text})
        names = list(self.sections)
        place = next((names.index(name) for name in before if name in names), len(names))
        items = list(self.sections.items())
        return replace(self, sections=dict([*items[:place], (heading, text), *items[place:]]))

    def loaded_from(self, place: str, before: str = HUB_ID) -> "Card":
        """With `place` for HUB_ID, and in its code for `before`, the place that an earlier export has put there."""
        old, new = f'from_pretrained("{before}"', f'from_pretrained("{place}"'
        return replace(self, sections={name: text.replace(HUB_ID, place).replace(old, new) for name, text in self.sections.items()})


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def provenance_section(told: Mapping[str, Any]) -> str:
    """Everything that another person needs to get it again, folded away."""
    return f"<details><summary>As JSON</summary>\n\n```json\n{json.dumps(told, indent=1, ensure_ascii=False)}\n```\n\n</details>"


def settings_section(settings: Mapping[str, Any]) -> str:
    """All settings as YAML, folded away, without a path of this machine."""
    return f"<details><summary>All settings</summary>\n\n```yaml\n{to_yaml(without_paths(settings)).rstrip()}\n```\n\n</details>"


def without_paths(value: Any) -> Any:
    """Settings with the last part of every path alone, and without the arguments of classes of the user's own."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items() if key != "init_args"}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    return public_name(value) if isinstance(value, str) else value


def public_name(name: str) -> str:
    """What may be said of a source or a model: the demo's and hub names as they are, of anything else the last part of the path."""
    if name.startswith(("http://", "https://")):
        # What follows may be a signature that lets others in.
        name = name.partition("?")[0]
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?( \(\w+\))?", name) or os.sep not in name else Path(name.rstrip(os.sep)).name


def hub_dataset(name: str, fingerprint: str) -> str | None:
    """The data set on the hub that a source of this name is a split of; None for the demo and for files.

    A folder may be called as a split is; only sources of the library `datasets` have its short fingerprints.
    """
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?) \((\w+)\)", name)
    return match[1] if match and match[1] != "demo" and len(fingerprint) < 64 else None
