"""Run directories to report on, and a real headless Chromium to look at the report with.

The browser is driven over the WebDriver protocol with nothing but the standard library.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from fedleak.attacks.results import Reconstruction
from fedleak.attacks.store import ReconstructionStore
from fedleak.evaluation.tables import score, summarise
from fedleak.truth import Truth, TruthStore


def find_chromium() -> tuple[str, str] | None:
    """(browser, driver), None where either is not installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One browser window.

    Args:
        paths: from `find_chromium`.
        width, height: the window.
        dark: the system's colour scheme.
    """

    def __init__(self, paths: tuple[str, str], width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.driver = subprocess.Popen([paths[1], f"--port={port}"], stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium refuses to run as root with one
        if dark:
            arguments.append("--blink-settings=preferredColorScheme=0")
        options = {"binary": paths[0], "args": arguments}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        for _ in range(200):
            try:
                session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                break
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionRefusedError):
                    raise
                time.sleep(0.05)
        self.url += f"/session/{session['sessionId']}"
        # Below Chromium's least window width, only an emulated screen is honest.
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def open(self, path: Path) -> None:
        self._call("POST", "/url", {"url": path.absolute().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript function body."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 20) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return {script}"):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {script}; console: {self.log()}")
            time.sleep(0.05)

    def choose(self, name: str, value: str) -> None:
        """Pick an option of a select by its value, as a user does."""
        self.run(
            "const s = document.querySelector(`select[name=${arguments[0]}]`);"
            "s.value = arguments[1]; s.dispatchEvent(new Event('change', {bubbles: true}))",
            name,
            value,
        )

    def press(self, key: str) -> None:
        """One key, by its DevTools name."""
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39}[key]
            text = {"Enter": "\r", " ": " "}.get(key, "")
            self.devtools("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def log(self, kind: str = "browser") -> list[dict[str, Any]]:
        """Console messages, or (``performance``) network events, since the last call."""
        return self._call("POST", "/se/log", {"type": kind})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: Path, *, full: bool = False) -> None:
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=full) if full else None
        path.write_bytes(base64.b64decode(shot["data"] if shot else self._call("GET", "/screenshot")))

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error


@pytest.fixture(scope="session")
def chromium() -> tuple[str, str]:
    found = find_chromium()
    if found is None:
        pytest.skip("needs chromium and chromedriver")
    return found


@pytest.fixture
def browser(chromium):
    """Opens windows, closes them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *size, **options: stack.enter_context(Browser(chromium, *size, **options))


def write_run(
    folder: Path,
    *,
    rounds: int = 3,
    clients: int = 2,
    batch: int = 2,
    shape: tuple[int, int, int] = (1, 8, 8),
    attack: str = "idlg",
    truth: bool = True,
    std: float = 0.1,
    trace: bool = False,
    limit: float | None = None,
) -> Path:
    """A run directory as fedleak run leaves it: in every batch, image 0 is recovered and the others are not.

    Where `trace` is kept, the images come out of grey in two steps. The label of the last image of client 0 is inferred
    wrongly in every round. A `limit` is that of every image, and the attacker expects twice as much.
    """
    generator = torch.Generator().manual_seed(rounds)
    attack_rows, leakage_rows = [], []
    for number in range(1, rounds + 1):
        for client in range(clients):
            private = Truth(
                number, client, 0.9 * torch.rand(batch, *shape, generator=generator), torch.arange(batch) % 10
            )
            noise = std * torch.randn(batch, *shape, generator=generator)
            noise[0] = 0.01
            labels = private.labels.clone()
            labels[-1] = 9 if client == 0 else labels[-1]
            reconstruction = Reconstruction(
                number, client, (private.images + noise).clamp(0, 1), labels, 1e-7, 100 * number, 0.5, "converged"
            )
            if limit is not None:
                reconstruction.details = {"expected_mse": [2 * limit] * batch}
            if trace:
                reconstruction.trace = [(i * 10, 10.0**-i) for i in range(1, 8)]
                grey, images = torch.full_like(reconstruction.images, 0.5), reconstruction.images
                mixtures = [(1, grey), (12, (grey + images) / 2), (70, images)]
                reconstruction.snapshots = [(count, mixture.half()) for count, mixture in mixtures]
            ReconstructionStore(folder / "captures" / "reconstructions" / "key").write(reconstruction)
            if truth:
                TruthStore(folder / "truth").write(private)
            row, leaks = score(
                reconstruction,
                private if truth else None,
                attack=attack,
                defense="none",
                batch_size=batch,
                update_residual=1e-7,
                limit_mse=None if limit is None else torch.full((batch,), limit, dtype=torch.float64),
                limit_bits=None if limit is None else 300.0,
            )
            attack_rows.append(row)
            leakage_rows += leaks
    attacks, leakage = pd.DataFrame(attack_rows), pd.DataFrame(leakage_rows)
    table = pd.DataFrame(
        {
            "round": range(1, rounds + 1),
            "clients": clients,
            "train_loss": [2 / number for number in range(1, rounds + 1)],
            "test_accuracy": [1 - 1 / (1 + number) for number in range(1, rounds + 1)],
            "seconds": 0.1,
        }
    )
    table.to_csv(folder / "rounds.csv", index=False)
    attacks.to_csv(folder / "attacks.csv", index=False)
    leakage.to_csv(folder / "leakage.csv", index=False)
    federation = {"clients": clients, "rounds": rounds, "batch_size": batch, "lr": 0.1, "payload": "gradient"}
    summary = {
        **summarise(attacks, leakage, table),
        "command": f"fedleak run attack={attack}",
        "seconds": 12.5,
        "seed": 4,
        "device": "cpu",
        "attack": attack,
        "defense": "none",
        "federation": federation,
        "threat": {"kind": "honest-but-curious", "granted": ["batch_size"], "withheld": ["labels"]},
        "versions": {"fedleak": "0", "torch": "2"},
        "run_dir": ".",
        "reconstructions": "captures/reconstructions/key",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / ".hydra").mkdir()
    config = {
        "data": {"_target_": "fedleak.data.digits"},
        "federation": federation,
        "attack": {"name": attack},
        "defense": {"_target_": "fedleak.defenses.NoDefense"},
        "seed": 4,
        "output_dir": str(folder),
    }
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def make_run(tmp_path):
    """Writes a run directory named by its first argument."""
    return lambda name="run", **options: write_run(tmp_path / name, **options)
