import json
from dataclasses import replace

import pytest
import torch

from fedleak import tensorfile
from fedleak.capture import CaptureInfo, CaptureStore
from fedleak.errors import UsageError
from fedleak.observation import Observation, find_fault
from fedleak.threat import ThreatModel
from fedleak.training import SGD, AdamW, LocalTraining

START = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([0.5])}
GRADIENT = {"w": torch.tensor([[0.25, -4.0]]), "b": torch.tensor([8.0])}


def test_gradient_and_weights_payloads_mean_the_same():
    lr, steps = 0.5, 4
    gradient = Observation(
        1, 0, START, {n: g * steps for n, g in GRADIENT.items()}, LocalTraining("gradient", None, steps)
    )
    new = {n: START[n] - lr * steps * GRADIENT[n] for n in START}
    weights = Observation(1, 0, START, new, LocalTraining("weights", None, steps, optimizer=SGD(lr)))
    assert (gradient.sign, weights.sign) == (1, -1)
    assert (gradient.scale, weights.scale) == (4.0, 2.0)
    for name in START:
        assert torch.equal(gradient.gradient()[name], GRADIENT[name])
        assert torch.equal(weights.gradient()[name], GRADIENT[name])


def test_without_the_learning_rate_weights_give_the_gradient_up_to_a_positive_factor():
    new = {n: START[n] - 0.25 * GRADIENT[n] for n in START}
    observation = Observation(1, 0, START, new, LocalTraining("weights", None, 1))
    assert observation.scale is None
    assert torch.equal(observation.gradient()["w"], 0.25 * GRADIENT["w"])


@pytest.mark.parametrize(
    ("update", "fault"),
    [
        ({"w": GRADIENT["w"]}, "missing tensor b"),
        ({**GRADIENT, "x": torch.ones(1)}, "unknown tensor x"),
        ({**GRADIENT, "b": torch.ones(2)}, r"wrong shape: b is \[2\], expected \[1\]"),
        ({**GRADIENT, "w": torch.tensor([[1.0, float("nan")]])}, "not finite: w"),
        ({**GRADIENT, "w": torch.tensor([[1.0, float("inf")]])}, "not finite: w"),
    ],
)
def test_find_fault(update, fault):
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(find_fault(update, START))
    assert find_fault(GRADIENT, START) is None


def observation(round_, client, start=START, **more):
    return Observation(round_, client, start, GRADIENT, LocalTraining("gradient", 3, 1, optimizer=SGD(0.1)), **more)


def test_what_was_written_is_read_back_and_shared_parameters_are_stored_once(tmp_path):
    store = CaptureStore.create(tmp_path, CaptureInfo(ThreatModel(labels=True), (1, 2, 1), 2))
    other = {n: p + 1 for n, p in START.items()}
    written = [
        observation(1, 0, buffers={"mean": torch.ones(1)}, labels=torch.tensor([0, 1])),
        observation(1, 1),
        observation(2, 0, start=other),
        observation(2, 1, start=START),  # an active server may send different models
    ]
    for o in reversed(written[:2]):  # replies come in any order
        store.write(o)
    for o in written[2:]:
        store.write(o)
    opened = CaptureStore.open(tmp_path)
    assert opened.info == store.info
    read = opened.load()
    assert [(o.round, o.client) for o in read] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for a, b in zip(written, read, strict=True):
        for name in START:
            assert torch.equal(a.parameters[name], b.parameters[name])
            assert torch.equal(a.update[name], b.update[name])
        assert a.training == b.training
    assert torch.equal(read[0].buffers["mean"], torch.ones(1))
    assert torch.equal(read[0].labels, torch.tensor([0, 1]))
    assert read[0].parameters is read[1].parameters
    assert {path.name for path in tmp_path.glob("*.shard")} == {"round-00001.shard", "round-00002.shard"}


def test_what_the_threat_model_withholds_is_never_written(tmp_path):
    nothing = ThreatModel(batch_size=False, hyperparameters=False, buffers=False)
    store = CaptureStore.create(tmp_path, CaptureInfo(nothing))
    store.write(observation(1, 0, buffers={"mean": torch.ones(1)}, labels=torch.tensor([0, 1])))
    [read] = CaptureStore.open(tmp_path).load()
    assert read.training == LocalTraining(epochs=None)
    assert (read.labels, dict(read.buffers)) == (None, {})
    with pytest.raises(UsageError, match=r"threat\.labels=true.*captured without"):
        CaptureStore.open(tmp_path).load(threat=replace(nothing, labels=True))


def test_a_narrower_threat_model_leaves_out_what_was_captured(tmp_path):
    CaptureStore.create(tmp_path, CaptureInfo(ThreatModel())).write(observation(1, 0))
    [read] = CaptureStore.open(tmp_path).load(threat=ThreatModel(batch_size=False))
    assert read.training.batch_size is None
    assert read.training.lr == 0.1


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_capture_is_one_clear_error(tmp_path, damage):
    CaptureStore.create(tmp_path, CaptureInfo()).write(observation(1, 0))
    path = tmp_path / "round-00001.shard"
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-3])
    elif damage == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(UsageError, match=r"round-00001\.shard: .*(restore|repeat)"):
        CaptureStore.open(tmp_path).load()


def test_a_damaged_index_or_info_is_one_clear_error(tmp_path, caplog):
    store = CaptureStore.create(tmp_path, CaptureInfo())
    store.write(observation(1, 0))
    index = tmp_path / "index.jsonl"
    whole = index.read_text()
    index.write_text(whole + '{"round": 1,')
    assert len(CaptureStore.open(tmp_path).rows()) == 1
    assert "its last line is half written" in caplog.text
    index.write_text(whole + '{"round": 1,\n')
    with pytest.raises(UsageError, match="line 2 is damaged"):
        CaptureStore.open(tmp_path).rows()
    (tmp_path / "info.json").write_text(json.dumps({"threat": {}}))
    with pytest.raises(UsageError, match=r"info\.json: damaged"):
        CaptureStore.open(tmp_path)


def test_a_store_is_never_overwritten(tmp_path):
    CaptureStore.create(tmp_path, CaptureInfo())
    with pytest.raises(UsageError, match="holds captures already"):
        CaptureStore.create(tmp_path, CaptureInfo())
    with pytest.raises(UsageError, match="no captures here"):
        CaptureStore.open(tmp_path / "elsewhere")


def test_an_unusable_update_is_reported_without_its_tensors(tmp_path):
    bad = Observation(1, 0, START, {"w": torch.full((1, 2), float("nan"))}, error="bad update: not finite: w")
    CaptureStore.create(tmp_path, CaptureInfo()).write(bad)
    [read] = CaptureStore.open(tmp_path).load()
    assert read.error == "bad update: not finite: w"
    assert dict(read.update) == {}


def test_equal_models_of_a_round_are_stored_once_and_shared_whoever_holds_them(tmp_path):
    store = CaptureStore.create(tmp_path, CaptureInfo())
    copied, moved = ({n: p.clone() + shift for n, p in START.items()} for shift in (0, 1))
    for client, start in enumerate([START, moved, copied, dict(moved)]):
        store.write(observation(1, client, start=start))
    store.write(observation(2, 0, start_buffers={"mean": torch.ones(1)}))
    store.write(observation(2, 1, start_buffers={"mean": torch.zeros(1)}))
    read = CaptureStore.open(tmp_path).load()
    assert len({(row["start_file"], row["start_offset"]) for row in store.rows()}) == 2 + 2
    assert read[0].parameters is read[2].parameters
    assert read[1].parameters is read[3].parameters
    assert torch.equal(read[3].parameters["w"], START["w"] + 1)
    assert [float(o.start_buffers["mean"]) for o in read[4:]] == [1, 0]


@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9, nesterov=True), AdamW(0.01, betas=(0.8, 0.9))], ids=str)
def test_how_a_client_trained_is_read_back(tmp_path, optimizer):
    training = LocalTraining("weights", 3, 5, 2, optimizer, training_mode=False)
    store = CaptureStore.create(tmp_path, CaptureInfo(training_mode=False))
    store.write(replace(observation(1, 0), training=training))
    [read] = CaptureStore.open(tmp_path).load()
    assert read.training == training
    [row] = store.rows()
    assert (row["lr"], row["local_steps"], row["epochs"], row["batch_size"]) == (optimizer.lr, 5, 2, 3)
    [row] = [{**row, "optimizer": {"_target_": "os.getcwd"}}]
    with pytest.raises(UsageError, match="is no ClientOptimizer"):
        store.load([row])


def test_captures_of_before_there_were_formats_are_read_and_newer_ones_refused(tmp_path):
    store = CaptureStore.create(tmp_path, CaptureInfo())
    store.write(observation(1, 0))
    info = json.loads((tmp_path / "info.json").read_text())
    assert info.pop("format") == 3
    del info["sha256"]
    (tmp_path / "info.json").write_text(json.dumps(info))
    [row] = store.rows()
    start = {f"parameters/{name}": value for name, value in START.items()}
    update = {f"update/{name}": value for name, value in GRADIENT.items()}
    files = {"start_file": "round-00001.safetensors", "update_file": "round-00001-client-00000.safetensors"}
    files["start_sha256"] = tensorfile.save(tmp_path / files["start_file"], start)
    files["update_sha256"] = tensorfile.save(tmp_path / files["update_file"], update)
    newer = ("epochs", "optimizer", "start_offset", "start_size", "update_offset", "update_size", "row", "change")
    index = tmp_path / "index.jsonl"
    index.write_text(json.dumps({k: v for k, v in (row | files).items() if k not in newer}) + "\n")
    old = CaptureStore.open(tmp_path)
    assert old.info == store.info
    assert old.load()[0].training == observation(1, 0).training
    for number in (4, "next"):
        (tmp_path / "info.json").write_text(json.dumps({**info, "format": number}))
        with pytest.raises(UsageError, match=rf"info\.json: format {number}, and this fedleak reads up to 3"):
            CaptureStore.open(tmp_path)


@pytest.mark.parametrize("sealed", [True, False])
def test_no_line_of_an_index_can_be_altered_dropped_or_doubled(tmp_path, sealed):
    store = CaptureStore.create(tmp_path, CaptureInfo())
    for client in range(3):
        store.put(observation(1, client))
    store.close() if sealed else store.flush()
    index = tmp_path / "index.jsonl"
    lines = index.read_text().splitlines()
    assert len(CaptureStore.open(tmp_path).load()) == 3
    for damaged in (
        [lines[0].replace('"batch_size": 3', '"batch_size": 2'), *lines[1:]],
        [lines[0].replace('"gradient"', '"weights"'), *lines[1:]],
        [lines[0], lines[2]],
        lines[1:],
        [*lines, lines[2]],
        *([lines[:2], []] if sealed else []),  # of a run that was killed, the end may be missing
    ):
        index.write_text("".join(line + "\n" for line in damaged))
        with pytest.raises(UsageError, match=r"index\.jsonl: (line \d is damaged|altered since)"):
            CaptureStore.open(tmp_path).rows()


def test_no_word_of_the_info_can_be_altered(tmp_path):
    CaptureStore.create(tmp_path, CaptureInfo(classes=10)).close()
    info = tmp_path / "info.json"
    info.write_text(info.read_text().replace("10", "11"))
    with pytest.raises(UsageError, match=r"info\.json: damaged \(altered"):
        CaptureStore.open(tmp_path)


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_updates_in_half_the_bits_come_back_as_they_were_but_for_rounding(tmp_path, payload):
    store = CaptureStore.create(tmp_path, CaptureInfo(), dtype=torch.float16)
    sent = {name: value - 1e-4 * GRADIENT[name] for name, value in START.items()} if payload == "weights" else GRADIENT
    training = LocalTraining(payload, 3, 1, optimizer=SGD(1e-4))
    store.write(Observation(1, 0, START, sent, training))
    [read] = CaptureStore.open(tmp_path).load()
    for name, value in GRADIENT.items():
        assert read.update[name].dtype == torch.float32
        torch.testing.assert_close(read.gradient()[name], value, rtol=3e-3, atol=1e-5)
