"""What a tap recorded, or an `Eavesdropper` captured, as exchanges: what a node was sent, and what it answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fedleak import tensorfile
from fedleak.audit.tap import FORMAT
from fedleak.capture import CaptureStore, Observation
from fedleak.errors import UsageError

MASKED = "masked"
"""In the key under which SecAgg+ sends a masked update."""


@dataclass(frozen=True)
class Exchange:
    """One message to one node and its reply, where one of them carries a model.

    Attributes:
        round: from 1.
        node: its id.
        client: its number, from 0, in the order of the ids.
        sent, reply: names as the app gave them -> tensor, as it was.
        config: what the message told the node beside the model.
        clear: what the reply told beside its arrays, by record: numbers and words, and the lengths of bytes.
        masked: whether the update came masked, as under secure aggregation.
        error: why there is no update.
        message: id of the message.
    """

    round: int
    node: str
    client: int
    sent: Mapping[str, Tensor]
    reply: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    clear: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    masked: bool = False
    error: str | None = None
    message: str = ""

    @cached_property
    def examples(self) -> int | None:
        """How many examples the node says that it trained on."""
        for record in self.clear.values():
            for key, value in record.items():
                if key.replace("_", "-") == "num-examples" and isinstance(value, int | float) and value > 0:
                    return round(value)
        return None

    @cached_property
    def lr(self) -> float | None:
        """The learning rate that the message or the reply names."""
        for record in (*self.clear.values(), self.config):
            for key in ("lr", "learning-rate", "learning_rate"):
                value = record.get(key)
                if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                    return float(value)
        return None


def find_runs(folder: Path) -> list[Path]:
    """The captures in a folder, oldest first: itself, or those of the runs in it.

    Raises:
        UsageError: there are none.
    """
    if (folder / "index.jsonl").is_file():
        return [folder]
    runs = [path.parent for path in folder.glob("*/index.jsonl")]
    if not runs:
        raise UsageError(f"{folder}: no captures here; name a folder that fedleak.tap or an Eavesdropper wrote")
    return sorted(runs, key=lambda run: (run.stat().st_mtime, run.name))


def read(folder: Path) -> list[Exchange]:
    """The exchanges of one run, by round and client; of a tap or of an `Eavesdropper`.

    Raises:
        UsageError: the capture is damaged, or holds no exchange of models.
    """
    try:
        info = json.loads((folder / "info.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'info.json'}: damaged ({error}); restore it, or repeat the run") from error
    if not isinstance(info, dict) or not str(info.get("format", "")).startswith("tap-"):
        found = [_observed(observation) for observation in CaptureStore.open(folder).load()]
    elif info["format"] != FORMAT:
        raise UsageError(f"{folder}: format {info['format']}, and this fedleak reads {FORMAT}; use a newer one")
    else:
        found = _tapped(folder)
    if not found:
        raise UsageError(f"{folder}: no node was sent a model and answered; let the federation train for a round")
    return sorted(found, key=lambda e: (e.round, e.client))


def known_shape(folder: Path) -> tuple[int, int, int] | None:
    """(C, H, W) of an image, where an `Eavesdropper` was told it."""
    info = json.loads((folder / "info.json").read_text())
    return None if "image_shape" not in info else CaptureStore.open(folder).info.image_shape


def _observed(o: Observation) -> Exchange:
    said: dict[str, Any] = {}
    if o.training.samples is not None:
        said["num-examples"] = o.training.samples
    config = {} if o.training.lr is None else {"lr": o.training.lr}
    return Exchange(
        round=o.round,
        node=str(o.client),
        client=o.client,
        sent={**o.parameters, **o.start_buffers},
        reply={**o.update, **o.buffers},
        config=config,
        clear={"metrics": said} if said else {},
        error=o.error,
    )


def _tapped(folder: Path) -> list[Exchange]:
    rows = []
    for number, line in enumerate((folder / "index.jsonl").read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UsageError(f"{folder / 'index.jsonl'}: line {number} is damaged; remove it") from error
    answers = {row["id"]: row for row in rows if row["kind"] == "reply"}
    sent = [row for row in rows if row["kind"] == "sent" and row["type"].split(".")[0] == "train"]
    numbers = {node: place for place, node in enumerate(sorted({row["node"] for row in sent}, key=_by_id))}
    seen: dict[str, int] = {}  # node -> rounds so far
    loaded: dict[str, dict[str, Tensor]] = {}
    found = []
    for row in sent:
        answer = answers.get(row["id"])
        masked = answer is not None and _masked(answer["content"])
        carries = _has_arrays(row["content"])
        if not carries and not masked and not (answer and _has_arrays(answer["content"])):
            continue  # another stage of a protocol
        config = {key: value for record in row["content"]["configs"].values() for key, value in record.items()}
        seen[row["node"]] = _round(row, config, seen.get(row["node"], 0))
        content = answer["content"] if answer is not None and answer["content"] is not None else None
        found.append(
            Exchange(
                round=seen[row["node"]],
                node=row["node"],
                client=numbers[row["node"]],
                sent=_arrays(folder, row["content"], loaded),
                reply={} if content is None else _arrays(folder, content, {}),
                config=config,
                clear={} if content is None else {**content["metrics"], **content["configs"]},
                masked=masked,
                error=_fault(answer),
                message=row["id"],
            )
        )
    return found


def _by_id(node: str) -> tuple[int, str]:
    return (len(node), node)


def _round(row: Mapping[str, Any], config: Mapping[str, Any], last: int) -> int:
    """The round that a message belongs to: what it says, or one more than the node's last."""
    for said in (config.get("server-round"), config.get("server_round"), row["group"]):
        if isinstance(said, str) and said.isdigit():
            said = int(said)
        if isinstance(said, int) and said > last:
            return said
    return last + 1


def _has_arrays(content: Mapping[str, Any] | None) -> bool:
    return content is not None and any(content["arrays"].values())


def _masked(content: Mapping[str, Any] | None) -> bool:
    records = [] if content is None else list(content["configs"].values())
    return any(MASKED in key and isinstance(value, dict) for record in records for key, value in record.items())


def _fault(answer: Mapping[str, Any] | None) -> str | None:
    if answer is None:
        return "no answer"
    if answer["error"] is not None:
        return f"client error: {' '.join(str(answer['error'].get('reason')).split()) or 'no reason given'}"
    return None


def _arrays(folder: Path, content: Mapping[str, Any], loaded: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The arrays of the first record that has any."""
    name = next((name for name, keys in content["arrays"].items() if keys), None)
    if name is None:
        return {}
    if content["file"] not in loaded:
        loaded[content["file"]], _ = tensorfile.load(folder / content["file"], sha256=content["sha256"])
    return {key: loaded[content["file"]][f"arrays/{name}/{key}"] for key in content["arrays"][name]}
