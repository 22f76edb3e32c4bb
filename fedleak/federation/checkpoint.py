"""What a federation needs to go on from its last finished round, in a file that is data alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedleak import files, tensorfile
from fedleak.errors import UsageError
from fedleak.federation.memory import Memory
from fedleak.training import Tensors

FILE = "checkpoint.safetensors"
"""In the run directory, from its first finished round until its tables are written."""


@dataclass(frozen=True)
class Checkpoint:
    """A federation after one of its rounds. Its clients need nothing: what they draw depends on seed, client and round.

    Attributes:
        round: the last that is finished.
        model: the server's model after it, parameters and buffers.
        memory: what the strategy remembers, of `remember`.
        lines: of the captures' index.
        of: what the run is of; see `fedleak.pipeline.identity`.
        seconds: that the run took until then.
        rounds: the SHA-256 of ``rounds.csv`` until then, None in the checkpoints of before.
    """

    round: int
    model: Tensors
    memory: Memory
    lines: int
    of: str
    seconds: float
    rounds: str | None = None

    def write(self, folder: Path) -> None:
        """Whole or not at all, in place of the one before."""
        tensors = {f"model/{name}": value for name, value in self.model.items()}
        tensors |= {f"memory/{name}": value for name, value in self.memory.tensors.items()}
        said = {"round": self.round, "lines": self.lines, "of": self.of, "seconds": self.seconds}
        said["rounds"] = self.rounds
        tensorfile.save(folder / FILE, tensors, said | {"memory": self.memory.said})

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint of a run directory, None where there is none; raises `UsageError` where it is damaged."""
        path = folder / FILE
        if not path.exists():
            return None
        tensors, said = tensorfile.load(path)
        try:
            model = {n.removeprefix("model/"): v for n, v in tensors.items() if n.startswith("model/")}
            kept = {n.removeprefix("memory/"): v for n, v in tensors.items() if n.startswith("memory/")}
            memory = Memory(said["memory"], kept)
            told = said.get("rounds")
            return cls(said["round"], model, memory, said["lines"], said["of"], said["seconds"], told)
        except KeyError as error:
            raise UsageError(f"{path}: no checkpoint, {error} is missing; repeat the run") from error

    def rewind(self, folder: Path) -> None:
        """Take what was written after this round out of a run directory.

        Raises:
            UsageError: less is there than was, or something else.
        """
        for path in [*(folder / "captures").glob("round-*.shard"), *(folder / "truth").glob("round-*.shard")]:
            number = re.fullmatch(r"round-(\d+)\.shard", path.name)
            if number is not None and int(number[1]) > self.round:
                path.unlink()
        _keep_lines(folder / "rounds.csv", self.round + 1)
        if self.rounds not in (None, files.digest(folder / "rounds.csv")):
            raise UsageError(f"{folder / 'rounds.csv'}: altered since the run stopped; restore it, or repeat the run")
        if (folder / "captures" / "index.jsonl").exists() or self.lines:
            _keep_lines(folder / "captures" / "index.jsonl", self.lines)


def _keep_lines(path: Path, count: int) -> None:
    """The first `count` lines of a file and no others; raises `UsageError` where there are fewer."""
    lines = files.read_bytes(path).splitlines(keepends=True)
    if sum(line.endswith(b"\n") for line in lines) < count:
        raise UsageError(f"{path}: shorter than its checkpoint says; restore it, or repeat the run")
    if len(lines) > count:
        files.write_atomically(path, b"".join(lines[:count]))
