import threading
import time
from pathlib import Path

import pytest
import torch

from fedleak import files, shards, tensorfile
from fedleak.cli import main
from fedleak.errors import FedleakError, UsageError
from fedleak.rounds import Keep
from fedleak.truth import Truth, TruthStore


def test_several_writers_append_whole_blobs(tmp_path):
    begins: dict[int, int] = {}

    def write(number: int) -> None:
        begins[number] = shards.append(tmp_path / "x", bytes([number]) * 1000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = (tmp_path / "x").read_bytes()
    assert len(data) == 20_000
    assert all(data[begin : begin + 1000] == bytes([number]) * 1000 for number, begin in begins.items())


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_blob():
    with pytest.raises(FedleakError, match=r"/dev/full: cannot be written \(No space left.*make room"):
        shards.append(Path("/dev/full"), b"x")
    with pytest.raises(FedleakError, match=r"/dev/full/x: cannot be written"):
        files.write_atomically(Path("/dev/full/x"), b"x")


def test_jobs_are_done_in_order_and_whoever_brings_too_much_waits():
    done: list[int] = []
    background = shards.Background(most=10)
    started = time.perf_counter()
    for number in range(4):
        background.put(lambda number=number: (time.sleep(0.05), done.append(number)), 8)
    assert time.perf_counter() - started > 0.1, "two of 8 bytes do not fit into 10"
    background.flush()
    assert done == [0, 1, 2, 3]
    time.sleep(3 * shards.IDLE)
    background.put(lambda: done.append(4))
    background.flush()
    assert done[-1] == 4, "after a pause another thread goes on"


def test_what_a_job_raised_is_raised_to_who_waits():
    background = shards.Background()
    background.put(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.flush()


def truth(client: int) -> Truth:
    return Truth(1, client, torch.rand(2, 1, 3, 3), torch.tensor([1, client]), 1)


def test_no_bit_of_the_truth_can_change_without_a_word(tmp_path):
    store = TruthStore(tmp_path)
    written = [truth(client) for client in range(3)]
    for one in written:
        store.write(one)
    read = TruthStore(tmp_path)
    assert read.known() == [(1, 0), (1, 1), (1, 2)]
    assert torch.equal(read.load(1, 2).images, written[2].images)
    assert read.load(1, 3) is read.load(2, 0) is None
    path = tmp_path / "round-00001.shard"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        changed = 0
        for client in range(3):
            try:
                found = TruthStore(tmp_path).load(1, client)
            except UsageError:
                changed += 1
            else:
                changed += found is None
                assert found is None or torch.equal(found.images, written[client].images)
        assert changed, place
    path.write_bytes(data + data)
    with pytest.raises(UsageError, match="holds client 0 twice"):
        TruthStore(tmp_path).load(1, 0)


def test_a_truth_of_before_there_were_shards_is_read(tmp_path):
    tensors = {"images": torch.rand(2, 1, 3, 3), "labels": torch.tensor([0, 1])}
    tensorfile.save(tmp_path / "round-00003-client-00001.safetensors", tensors, {"local_steps": 1})
    store = TruthStore(tmp_path)
    assert store.known() == [(3, 1)]
    assert torch.equal(store.load(3, 1).images, tensors["images"])


def test_what_is_kept():
    assert Keep()(5, 7)
    assert [c for c in range(4) if Keep(clients=2)(1, c)] == [0, 1]
    assert [r for r in range(1, 8) if Keep(rounds=5, every=2)(r, 0)] == [1, 3, 5]
    assert [r for r in range(1, 8) if Keep(rounds=(2, 3), clients=(4,))(r, 4)] == [2, 3]
    assert not Keep(rounds=(2, 3), clients=(4,))(2, 3)


def test_the_group_capture_chooses_what_is_kept_and_none_keeps_nothing(tmp_path, capsys):
    run = ["run", "attack=none", "limit=off", "federation.clients=3", "federation.rounds=3", "federation.batch_size=2"]
    assert main([*run, f"output_dir={tmp_path / 'all'}"]) == 0
    assert main([*run, "capture=none", f"output_dir={tmp_path / 'none'}"]) == 0
    some = ["capture.clients=[1]", "capture.rounds=2", "capture.dtype=float16"]
    assert main([*run, *some, f"output_dir={tmp_path / 'some'}"]) == 0
    rounds = [(tmp_path / name / "rounds.csv").read_text().splitlines() for name in ("all", "none", "some")]
    accuracies = [[line.rsplit(",", 1)[0] for line in lines] for lines in rounds]
    assert accuracies[0] == accuracies[1] == accuracies[2]
    assert not (tmp_path / "none" / "captures").exists()
    assert not (tmp_path / "none" / "truth").exists()
    assert TruthStore(tmp_path / "some" / "truth").known() == [(1, 1), (2, 1)]
    from fedleak.capture import CaptureStore

    kept = CaptureStore.open(tmp_path / "some" / "captures").load()
    assert [(o.round, o.client) for o in kept] == [(1, 1), (2, 1)]
    whole = CaptureStore.open(tmp_path / "all" / "captures").load()[1]
    torch.testing.assert_close(kept[0].update["fc.bias"], whole.update["fc.bias"], rtol=1e-3, atol=1e-5)
    capsys.readouterr()
    assert main(["run", "capture=none"]) == 2
    assert "choose attack=none too" in capsys.readouterr().err
    assert main(["run", "capture.clients=some"]) == 2
    assert "capture.clients=some: must be all" in capsys.readouterr().err


def test_what_is_put_aside_is_written_too_and_errors_wait_for_who_brings_more(tmp_path):
    background = shards.Background(most=10)
    done: list[int] = []
    for number in range(3):
        background.put_aside(lambda number=number: done.append(number), 8)
    background.flush()
    assert done == [0, 1, 2]
    background.put_aside(lambda: 1 / 0)
    time.sleep(3 * shards.IDLE)
    background.put_aside(lambda: done.append(3))
    with pytest.raises(ZeroDivisionError):
        background.put(lambda: done.append(4))
    background.flush()
    assert done == [0, 1, 2]
