"""``fedleak audit`` from end to end: apps of five forms, captures, and what comes out."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict
from torch import nn
from torch.nn.functional import cross_entropy

import fedleak
from fedleak.attacks.base import Knowledge
from fedleak.audit.app import read_app, run_app
from fedleak.audit.findings import EXPOSED, INCONCLUSIVE, NOT_SHOWN, PARTLY, Truth, examine, overall
from fedleak.audit.preflight import preflight
from fedleak.audit.report import Audit, render
from fedleak.audit.shapes import guess_normalization, infer_classes, infer_shape
from fedleak.audit.statement import Statement
from fedleak.audit.wire import Exchange
from fedleak.cli import main
from fedleak.errors import UsageError
from fedleak.models import LeNet

APPS = Path(__file__).parents[1] / "apps"


def audited(folder: Path) -> dict:
    return json.loads((folder / "audit.json").read_text())


@pytest.fixture
def quickapp(monkeypatch):
    """The quickstart app's package, importable as for its user."""
    monkeypatch.syspath_prepend(str(APPS / "quickstart"))
    yield
    for name in [name for name in sys.modules if name.startswith("quickapp")]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "code", "verdicts"),
    [
        ("quickstart", 3, {EXPOSED}),
        ("advanced", 3, {EXPOSED}),
        ("opacus_app", None, {EXPOSED, PARTLY, NOT_SHOWN}),
        ("secagg", 0, {"not attackable"}),
        ("dp_sa", 0, {"not attackable"}),
    ],
)
def test_an_app_from_its_folder_to_a_verdict(form, code, verdicts, tmp_path):
    if form == "opacus_app":
        pytest.importorskip("opacus")
    rounds = "1" if form == "opacus_app" else "2"
    torch.manual_seed(0)  # the apps draw their weights and noise from torch
    done = main(["audit", str(APPS / form), "--nodes", "3", "--rounds", rounds, "--output", str(tmp_path)])
    found = audited(tmp_path)
    assert code is None or done == code
    assert {u["verdict"] for u in found["updates"]} <= verdicts
    assert len(found["updates"]) == 3 * int(rounds)
    assert "num" in json.dumps(found["in_the_clear"])
    page = (tmp_path / "audit.html").read_text()
    assert found["verdict"] in page
    assert found["updates"][0]["node"] in page
    for update in found["updates"]:
        assert update["preflight"]["verdict"] != "contradicts", update
        if update["verdict"] == EXPOSED and form != "opacus_app":
            assert update["labels"]["accuracy"] == 1.0


def test_a_capture_with_what_its_user_knows_and_the_truth_that_clients_noted(tmp_path, quickapp):
    run_app(read_app(APPS / "quickstart"), tmp_path / "captures", nodes=2, rounds=1)
    run, watch = run_app(read_app(APPS / "quickstart"), tmp_path / "captures", nodes=3, rounds=1)
    for session in watch.sessions:
        message = Message(RecordDict(), dst_node_id=1, message_type="train")
        message.metadata.__dict__["_message_id"] = session.message
        fedleak.note_truth(message, session.truth[1], session.truth[0] * 0.5 + 0.5, tmp_path / "truth")
    command = ["audit", str(tmp_path / "captures"), "--model", "quickapp.task:Net", "--normalize", "0.5/0.5"]
    options = ["--truth", str(tmp_path / "truth"), "--output", str(tmp_path / "out"), "--seconds", "0"]
    for client in ("optimizer=sgd,lr=0.1,batch_size=32,epochs=1", "quickapp.task:train,batch_size=32"):
        assert main([*command, "--client", client, *options]) == 3
        found = audited(tmp_path / "out")
        assert [u["labels"]["accuracy"] for u in found["updates"]] == [1.0] * 3
        assert str(run) in found["facts"]["capture"], "the last of several runs"
    assert main([*command, "--client", "lr=1.0,batch_size=32,epochs=1", *options]) == 5
    found = audited(tmp_path / "out")
    assert {u["verdict"] for u in found["updates"]} == {INCONCLUSIVE}
    assert "lr=1 was stated, and the messages say 0.1" in found["updates"][0]["why"]
    assert "state how clients really train" in " ".join(found["advice"])


def train_by_column(net, trainloader, epochs, lr, device):
    """A training function of an app whose batches are dictionaries, as Flower Datasets makes them."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for batch in trainloader:
            optimizer.zero_grad()
            cross_entropy(net(batch["img"].to(device)), batch["label"].to(device)).backward()
            optimizer.step()


def test_an_apps_own_training_shows_itself_where_no_federation_ran(monkeypatch):
    from fedleak.audit.statement import parse

    # What makes messages is set up by a running app alone, and a capture's audit is none.
    monkeypatch.setattr(Message, "__init__", lambda *_, **__: pytest.fail("there is no task to make messages in"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr("fedleak.audit.statement.locate", lambda *_: train_by_column)
    found = parse("myapp.task:train,batch_size=8,lr=0.1", model, (1, 8, 8), 10)
    assert (found.optimizer, found.momentum, found.lr, found.batch_size) == ("sgd", 0.9, 0.1, 8)


def test_an_eavesdroppers_captures_can_be_audited_too(small_run, tmp_path, monkeypatch):
    info = fedleak.CaptureStore.open(small_run / "captures").info
    monkeypatch.setattr("fedleak.audit.command._model", lambda reference: LeNet(info.image_shape, info.classes))
    client = "payload=gradient,batch_size=1,steps=1,epochs=1"
    options = ["--model", "any:Net", "--seconds", "0", "--output", str(tmp_path)]
    assert main(["audit", str(small_run / "captures"), "--client", client, *options]) == 3
    assert len(audited(tmp_path)["updates"]) == 4
    other = ["--image-shape", "3,32,32", *options]
    monkeypatch.setattr("fedleak.audit.command._model", lambda reference: LeNet((3, 32, 32), info.classes))
    assert main(["audit", str(small_run / "captures"), "--client", client, *other]) == 5
    assert "came in another shape" in audited(tmp_path)["updates"][0]["why"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "0 targets named"),
        (["nowhere"], "no such folder"),
        (["{app}", "{app}"], "2 targets named"),
        (["{app}", "--nodes"], "has no value"),
        (["{app}", "--nodes=0"], "--nodes=0: no number it can be"),
        (["{app}", "--colour=red"], "--colour=red: unknown option"),
        (["{app}", "--model=a:B"], "an app shows its own"),
        (["{app}", "--run-config=speed=3"], "the app has no such key"),
        (["{app}", "--run-config=speed"], "write key=value"),
        (["{empty}", "--model=a:B"], "no captures here"),
        (["{empty}", "--nodes=2"], "a capture is of a run that is over"),
        (["{run}"], "--model: missing"),
        (["{run}", "--model=quickapp.task:Net", "--client=speed=3"], "unknown key; known: optimizer"),
        (["{run}", "--model=quickapp.task:Net", "--client=lr=fast"], "no value for lr"),
        (["{run}", "--model=quickapp.task:Net", "--client=optimizer=lion"], "known: sgd, adam, adamw"),
        (["{run}", "--model=quickapp.task:Net", "--client=quickapp.task:load_data"], "asks for partition_id"),
        (["{run}", "--model=quickapp.task:load_data"], "cannot be made without arguments"),
        (["{run}", "--model=quickapp.task:Net", "--normalize=half"], "is no MEAN/STD"),
        (["{run}", "--model=quickapp.task:Net", "--image-shape=32"], "is no C,H,W"),
        (["{run}", "--model=quickapp.task:Net", "--image-shape=3,8,8"], "does not take such images"),
        (["{run}", "--model=quickapp.task:Net", "--truth={empty}"], "holds no truth"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments, words, tmp_path, quickapp, capsys):
    places = {"app": APPS / "quickstart", "empty": tmp_path / "empty", "run": tmp_path / "run"}
    places["empty"].mkdir()
    if "{run}" in arguments:
        run_app(read_app(APPS / "quickstart"), tmp_path / "run", nodes=2, rounds=1)
    assert main(["audit", "--output", str(tmp_path / "out"), *(a.format(**places) for a in arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in said


def test_an_app_that_waits_for_more_nodes_or_fails_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    assert main(["audit", str(APPS / "quickstart"), "--nodes", "1", "--output", str(tmp_path)]) == 2
    assert "the app waits for more nodes" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert main(["audit", str(broken)]) == 2
    assert "lacks serverapp" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    from fedleak.audit.command import VALUES

    assert main(["audit", "--help"]) == 0
    said = capsys.readouterr().out
    assert [name for name in VALUES if name not in said] == []


def test_one_bad_update_never_stops_the_others(client, knowledge, monkeypatch):
    clients = [client(seed, number=seed, steps=2, norm=True) for seed in range(3)]
    exchanges = [c.exchange for c in clients]
    exchanges[1] = replace(exchanges[1], error="client error: boom")
    checked = preflight(exchanges, knowledge(True), [c.statement for c in clients])
    calls = []

    def failing(observation, *_):
        calls.append(observation.client)
        raise RuntimeError("out of luck")

    monkeypatch.setattr("fedleak.audit.findings._infer", failing)
    checked = [replace(c, claimed=None) for c in checked]
    found = examine(checked, knowledge(True), seconds=0)
    assert calls == [0, 2]
    assert [f.verdict for f in found] == [INCONCLUSIVE, "not attackable", INCONCLUSIVE]
    assert "out of luck" in found[0].words


def test_noise_leaves_an_attacker_that_knows_how_far_it_errs(client, knowledge):
    one = client(0, noise=0.003)
    checked = preflight([one.exchange], knowledge(), [one.statement])
    [found] = examine(checked, knowledge(), seconds=0, truths={"": Truth(torch.tensor(labels_of(one.counts)))})
    assert found.verdict in (PARTLY, NOT_SHOWN)
    assert abs(found.accuracy - found.label_accuracy) < 0.12
    low, high = zip(*found.interval, strict=True)
    inside = [a <= n <= b for a, n, b in zip(low, one.counts, high, strict=True)]
    assert sum(inside) >= 8


def labels_of(counts: list[int]) -> list[int]:
    return [label for label, count in enumerate(counts) for _ in range(count)]


def test_an_empty_update_is_empty_and_nothing_else(client, knowledge):
    one = client(0)
    same = replace(one.exchange, reply=dict(one.exchange.sent))
    [found] = examine(preflight([same], knowledge(), [one.statement]), knowledge())
    assert (found.verdict, found.counts) == (NOT_SHOWN, ())
    assert found.words.startswith("empty")


def test_images_are_shown_where_they_explain_the_update():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
    image, label = torch.rand(1, 1, 8, 8), torch.tensor([3])
    sent = {n: v.clone() for n, v in model.state_dict().items()}
    cross_entropy(model(image), label).backward()
    reply = {n: p.grad.clone() for n, p in model.named_parameters()}
    exchange = Exchange(1, "7", 0, sent, reply, {}, {"m": {"num-examples": 1, "secret": float("nan")}}, message="9")
    knowledge = Knowledge(model, (1, 8, 8), 10)
    stated = Statement(payload="gradient", batch_size=1, epochs=1, steps=1, source="stated")
    found = examine(preflight([exchange], knowledge, [stated]), knowledge, truths={"9": Truth(label, image)})
    assert overall(found) == EXPOSED
    assert found[0].counts[3] == 1
    assert found[0].image_mse[0] < 1e-3
    page = render(Audit("one", found, "fedleak audit", {}))
    assert "data:image/png;base64," in page


def test_what_a_model_and_images_tell():
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(4 * 28 * 28, 7))
    assert infer_shape(model) == (3, 32, 32)
    assert infer_classes(model, (3, 32, 32)) == 7
    with pytest.raises(UsageError, match="image-shape"):
        infer_shape(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)))
    images = torch.rand(4, 3, 8, 8)
    images[0, :, 0, :2] = torch.tensor([0.0, 1.0])
    assert guess_normalization([images]) == ([0.0], [1.0])
    assert guess_normalization([(images - 0.5) / 0.5]) == ([0.5], [0.5])
    assert guess_normalization([(images[:, :1] - 0.1307) / 0.3081]) == ([0.1307], [0.3081])
    assert guess_normalization([]) == ([0.0], [1.0])
