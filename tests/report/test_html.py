import io
import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fedleak.errors import UsageError
from fedleak.report.charts import effort_charts, federation_charts, leak_charts
from fedleak.report.html import compare, embed, render, verdict, write_report
from fedleak.report.run_data import distinct_names, read_run
from fedleak.report.sprites import SETTINGS, pack


def page(*runs, output=None) -> str:
    return write_report(runs, output or runs[0].parent / "report.html").read_text()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_run_and_what_leaked(make_run):
    html = page(make_run())
    assert "recovered 6 of the 12 private images" in html
    assert "first in round 1, last in round 3" in html
    assert "2 of 2 attacked clients" in html
    assert "fedleak run attack=idlg" in html
    assert "honest-but-curious" in html
    assert "how many samples a client trains on in a step" in html  # granted
    assert "the labels of each private batch" in html  # withheld
    assert "Missing or damaged" not in html
    for name in ("seed", "device", "versions", "learning rate"):
        assert f"<dt>{name}</dt>" in html


def test_nothing_is_loaded_from_the_network(make_run):
    html = page(make_run())
    assert "default-src 'none'" in html
    body = html.split("</style>")[1].split('<script type="module">')[0]
    assert "http:" not in body
    assert "https:" not in body


def test_several_runs_show_their_differences_first(make_run):
    html = page(make_run("one"), make_run("two", attack="dlg", batch=4)).replace(".<wbr>", ".")
    table = html[html.index('<table class="compare">') : html.index("that are the same in all runs")]
    assert table.index("federation.batch_size") < table.index("images recovered") < len(table)
    assert "attack.name" in table
    assert "federation.lr" not in table
    assert "federation.lr" in html


def test_names_are_distinct_and_short(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert distinct_names(folders) == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert distinct_names([tmp_path / "x", tmp_path / "x"]) == ["x", "x (2)"]
    assert distinct_names([tmp_path / "x"]) == ["x"]
    assert distinct_names([tmp_path / "x" / "attacks" / "dlg", tmp_path / "x"]) == ["x/attacks/dlg", "x"]
    assert distinct_names([tmp_path / "sweep" / "0"]) == ["sweep/0"]


EVIL = "</script><img src=x onerror=alert(1)><!--"


def test_html_in_names_is_shown_not_executed(make_run):
    folder = make_run("<b>evil<b>")
    for name in ("attacks.csv", "summary.json"):
        text = (folder / name).read_text().replace("converged", EVIL)
        (folder / name).write_text(text.replace("fedleak run", f"fedleak {EVIL}"))
    html = page(folder).split('<script type="module">')[0]  # beyond it there is no text but the chart library
    assert "<img" not in html
    assert "<b>evil" not in html
    assert "&lt;b&gt;evil" in html
    assert "&lt;/script&gt;&lt;img" in html


def test_embedded_json_cannot_leave_its_element():
    value = {"a": ["</script>", "<!--", "\u2028", "&", 1.5, float("nan"), float("inf"), None, True]}
    text = str(embed(value))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": ["</script>", "<!--", "\u2028", "&", 1.5, None, None, None, True]}


# --- what is missing --------------------------------------------------------------------------------------------------

FILES = (
    "summary.json",
    ".hydra/config.yaml",
    "rounds.csv",
    "attacks.csv",
    "leakage.csv",
    "truth",
    "captures",
    "truth/round-00001.shard",
    "captures/reconstructions/key/round-00001-client-00000.safetensors",
)


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_a_report_in_spite_of_damage_says_what_is_missing(make_run, name, damage):
    folder = make_run()
    path = folder / name
    if damage == "missing":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif path.is_dir() or (damage, path.suffix) == ("truncated", ".yaml"):
        return  # a folder is there or not; half of a YAML file can be a YAML file
    else:
        data = path.read_bytes()
        path.write_bytes({"truncated": data[: len(data) // 2], "garbage": b"\x00\xff<b>" * 99, "empty": b""}[damage])
    assert read_run(folder).problems
    html = page(folder)
    assert "Missing or damaged" in html
    assert "The leak</h2>" in html


@pytest.mark.parametrize("odd", [3, "x", [1], {"a": [2]}, None])
def test_a_summary_of_odd_values_does_no_harm(make_run, odd):
    folder = make_run()
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(dict.fromkeys(summary, odd)))
    (folder / ".hydra" / "config.yaml").write_text(json.dumps({"federation": odd, "threat": odd, "attack": odd}))
    assert "The leak</h2>" in page(folder)


def test_a_damaged_reconstruction_leaves_the_others(make_run):
    folder = make_run()
    next((folder / "captures" / "reconstructions" / "key").glob("*")).write_bytes(b"no")
    run = read_run(folder)
    assert len(run.matches) == 10
    assert any("damaged" in problem for problem in run.problems)


def test_without_its_summary_a_run_still_shows_its_images(make_run):
    folder = make_run()
    (folder / "summary.json").unlink()
    lines = (folder / "leakage.csv").read_text().splitlines(keepends=True)
    (folder / "leakage.csv").write_text("".join(lines[:5]))
    run = read_run(folder)
    assert len(run.matches) == 12
    assert "leakage.csv holds 4 scored images, where the run counted 12." in run.problems
    shutil.copytree(folder / "captures/reconstructions/key", folder / "captures/reconstructions/another")
    assert read_run(folder).matches == []


def test_settings_deep_inside_parts_that_differ_come_after_those_that_count(make_run):
    one, two = read_run(make_run("one")), read_run(make_run("two"))
    one.config["attack"] = {"name": "a", "inversion": {"_target_": "x.Peeling", "tolerance": 1}, "restarts": 2}
    two.config["attack"] = {
        "name": "b",
        "inversion": {"_target_": "x.Other", "again": "${attack.restarts}"},
        "restarts": 3,
    }
    made = compare([one, two])
    assert [key for key, _ in made["differing"]] == ["attack.name", "attack.inversion", "attack.restarts"]
    assert made["inside"] == [("attack.inversion.tolerance", ["1", "–"])]


def test_without_truth_the_rebuilt_images_are_shown(make_run):
    folder = make_run(truth=False)
    run = read_run(folder)
    assert len(run.matches) == 12
    assert all(m.rebuilt is not None and m.true is None for m in run.matches)
    assert "nobody can say how close they came" in page(folder)


def test_an_attack_on_an_earlier_run_finds_its_federation_and_truth(make_run):
    folder = make_run()
    again = folder / "attacks" / "dlg"
    again.mkdir(parents=True)
    for name in ("attacks.csv", "leakage.csv"):
        shutil.copy(folder / name, again)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"run_dir": "../..", "reconstructions": "../../captures/reconstructions/key", "attack": "dlg"}
    summary |= {"command": "fedleak attack run_dir=run attack=dlg attack.restarts=4 seed=9"}
    (again / "summary.json").write_text(json.dumps(summary))
    run = read_run(again)
    assert run.problems == []
    assert len(run.rounds) == 3
    assert all(m.true is not None for m in run.matches)
    settings = run.settings()
    assert (settings["attack.name"], settings["attack.restarts"], settings["seed"]) == ("dlg", "4", "9")
    assert settings["data"] == "digits"
    assert "attack.name" in [key for key, _ in compare([read_run(folder), run])["differing"]]


def test_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "r.html")
    with pytest.raises(UsageError, match="holds no results"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UsageError, match="names no run directory"):
        write_report([], tmp_path / "r.html")


def test_the_output_must_be_a_file(make_run, tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        write_report([make_run()], tmp_path)


# --- the charts -------------------------------------------------------------------------------------------------------


def charts(*runs):
    return {c.key: c for c in federation_charts(runs) + leak_charts(runs) + effort_charts(runs)}


def test_charts_say_what_the_tables_hold(make_run):
    made = charts(read_run(make_run(trace=True)))
    assert made["labels"].sentence == "75% of the labels were inferred rightly, averaged over 6 updates."
    assert made["recovered"].sentence == (
        "Images were recovered in 3 of 3 attacked rounds, first in round 1; most in rounds 1, 2 and 3 (2 of 4 each)."
    )
    assert made["recovered"].rows[0][1:] == [1, "50.0%", "2 of 4 images"]
    assert made["clients-0"].sentence == (
        "2 of 2 attacked clients lost at least one image; most were lost by clients 0 and 1 (3 of 6 each)."
    )
    assert made["test_accuracy"].sentence == "From 50% in round 1 to 75% in round 3."
    assert made["stops"].rows == [["run", "converged", 6]]
    assert sum(row[2] for row in made["psnr"].rows) == sum(row[2] for row in made["mse"].rows) == 12
    assert made["data-0"].rows == [[0, 0, 3], [0, 1, 3], [1, 0, 3], [1, 1, 3]]
    assert len(made["traces"].rows) == 6 * 7
    assert len(made["films"].rows) == 12 * 3
    recovered = [row for row in made["films"].rows if row[0] == "round 1, client 0, image 0"]
    assert [row[1] for row in recovered] == [1, 12, 70]
    assert recovered[1][2] == pytest.approx(recovered[0][2] / 4, rel=0.2)
    assert recovered[2][2] == pytest.approx(1e-4, rel=1e-3)
    assert "below the dashed line after 70 evaluations or sooner" in made["films"].sentence
    assert len(made["effort-objective"].rows) == 6
    for chart in made.values():
        assert chart.sentence
        assert chart.rows
        assert {len(row) for row in chart.rows} == {len(chart.columns)}


def test_recovered_images_and_the_others_stand_on_their_sides_of_the_threshold(make_run):
    psnr = charts(read_run(make_run()))["psnr"]
    bars = psnr.spec["data"]["values"]
    assert sum(bar["count"] for bar in bars if bar["low"] >= 30) == 6
    assert sum(bar["count"] for bar in bars if bar["high"] <= 30) == 6


def test_many_rounds_and_clients_stay_legible(make_run):
    run = read_run(make_run(batch=1))
    where = [(number, client) for number in range(1, 61) for client in range(45)]
    run.leakage = run.leakage.iloc[[0] * len(where)].assign(round=[n for n, _ in where], client=[c for _, c in where])
    run.attacks = run.attacks.iloc[[0] * len(where)].assign(round=[n for n, _ in where], client=[c for _, c in where])
    run.attacks["evaluations"] = range(len(where))
    made = charts(run)
    assert len({v["client"] for v in made["clients-0"].spec["data"]["values"]}) == 40
    assert len({v["round"] for v in made["clients-0"].spec["data"]["values"]}) == 40
    assert "40 of 45 clients" in made["clients-0"].sentence
    assert "40 of 60 attacked rounds" in made["clients-0"].sentence
    assert len(made["effort-objective"].spec["data"]["values"]) == 1500


def test_the_verdict_says_what_was_attacked_where_that_is_not_everything(make_run):
    run = read_run(make_run(rounds=3, clients=2))
    said = {"label_accuracy": None, "final_test_accuracy": None}
    assert "It attacked" not in verdict(run, said)
    run.attacks = run.attacks[(run.attacks["client"] == 1) & (run.attacks["round"] != 2)]
    assert "It attacked 2 of the 6 updates that clients sent, from 1 of 2 clients in 2 of 3 rounds." in verdict(
        run, said
    )


def test_a_run_without_an_attack_is_not_said_to_lack_one(make_run):
    folder = make_run()
    for name in ("attacks.csv", "leakage.csv"):
        (folder / name).write_text((folder / name).read_text().splitlines()[0] + "\n")
    summary = json.loads((folder / "summary.json").read_text())
    gone = {"observations": 0, "images": 0, "failed": 0, "reconstructions": None}
    (folder / "summary.json").write_text(json.dumps(summary | gone | {"attack": "none"}))
    html = page(folder)
    assert "No attack was made. The shared model" in html
    assert "Missing or damaged" not in html


def test_where_all_attacks_cost_the_same_the_cost_is_no_chart(make_run):
    run = read_run(make_run())
    assert "effort-mse" in charts(run)
    run.attacks["evaluations"] = 1
    assert "effort-mse" not in charts(run)


def test_an_error_that_rises_again_is_said(make_run):
    run = read_run(make_run(trace=True))
    assert "which the attacker cannot see" not in charts(run)["films"].sentence
    run.matches = [
        replace(m, frames=(m.frames[0], replace(m.frames[1], mse=m.frames[2].mse / 9), m.frames[2]))
        for m in run.matches
    ]
    assert "which the attacker cannot see" in charts(run)["films"].sentence


def test_verdict_of_a_run_that_leaked_nothing(make_run):
    folder = make_run()
    text = (folder / "leakage.csv").read_text().replace("True", "False")
    (folder / "leakage.csv").write_text(text)
    run = read_run(folder)
    assert verdict(run, {"label_accuracy": None, "final_test_accuracy": None}) == (
        "The server recovered none of the 12 private images it went for."
    )


def test_an_attack_on_labels_alone_is_not_said_to_have_failed_at_images(make_run):
    folder = make_run()
    text = (folder / "attacks.csv").read_text().replace("converged", "labels_only")
    (folder / "attacks.csv").write_text(text)
    html = page(folder)
    assert "went for the labels behind 6 updates, and tried no image. It inferred 75% of the labels." in html
    assert "Images recovered, by round" not in html
    run = read_run(folder)
    assert 'select name="order"' in render([run])
    run.matches = [replace(m, rebuilt=None, mse=None, recovered=False) for m in run.matches]
    html = render([run])
    assert "image was tried: these are the private ones" in html
    assert 'select name="label"' in html
    assert 'select name="order"' not in html
    assert "Labels inferred, by round" in html


def test_what_was_reached_stands_beside_what_was_possible(make_run):
    run = read_run(make_run(limit=5e-5))
    assert run.problems == []
    assert {m.limit_mse for m in run.matches} == {5e-5}
    assert {m.expected_mse for m in run.matches} == {1e-4}
    made = charts(run)["limit"]
    assert "12 of 12 images could be recovered by this measure (left of the dashed line), 6 were" in made.sentence
    assert "an estimate" in made.sentence
    assert made.columns == ["run", "image", "reached", "possible"]
    assert made.rows[0] == ["run", "round 1, client 0, image 0", pytest.approx(1e-4, rel=1e-3), pytest.approx(5e-5)]
    [diagonal, points, *_] = made.spec["layer"]
    assert [(end["limit"], end["reached"]) for end in diagonal["data"]["values"]] == [(1e-5, 1e-5), (0.01, 0.01)]
    assert [tip["field"] for tip in points["encoding"]["tooltip"]] == ["run", "image", "mse", "limit"]
    html = render([run])
    assert "By an estimate made for 12 images, the updates tell enough to recover 12 of them." in html
    assert "<dt>median error, reached / possible</dt>" in html
    assert "median MSE possible</th>" in html
    assert "Reached and possible</dt>" in html


def test_an_exact_copy_and_an_infinite_error_beside_their_limits(make_run):
    run = read_run(make_run(limit=5e-5))
    run.leakage.loc[0, "mse"], run.leakage.loc[1, "mse"] = 0.0, float("inf")
    made = charts(run)["limit"]
    assert len(made.rows) == 11
    assert made.spec["data"]["values"][0]["reached"] == 1e-5
    assert made.rows[0][2] == 0


def test_a_run_without_limits_is_shown_as_before_there_were_any(make_run):
    folder = make_run()
    html = page(folder)
    for word in ("possible</", "could be expected", "By an estimate", "What was reached"):
        assert word not in html
    for name, last in (("attacks.csv", 1), ("leakage.csv", 2)):  # as an earlier version left it
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("".join(line.rsplit(",", last)[0] + "\n" for line in lines))
    assert page(folder) == html
    both = page(folder, make_run("limited", limit=5e-5))
    table = both[both.index('<table class="compare">') :]
    assert "<td>–</td>" in table[table.index("median error, reached / possible") :].split("</tr>")[0]


# --- the thumbnails ---------------------------------------------------------------------------------------------------


def unpack(sprites):
    sheets = [np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB")) for sheet in sprites.sheets]
    return [sheets[s][y : y + h, x : x + w] for s, x, y, w, h in sprites.places]


@pytest.mark.parametrize("shapes", [[(8, 8)] * 5, [(28, 28)] * 6000, [(5, 9), (9, 5), (1, 1)], []])
def test_thumbnails_are_exact_where_there_is_room(shapes):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 4, (*shape, 3), dtype=np.uint8) for shape in shapes]
    sprites = pack(images, most_bytes=10_000_000)
    assert sprites.lossless
    assert sprites.side == SETTINGS[0][0]
    for image, tile in zip(images, unpack(sprites), strict=True):
        assert (image == tile).all()


def test_thumbnails_shrink_to_the_budget():
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(200)]
    sprites = pack(images, most_bytes=200_000)
    assert sum(map(len, sprites.sheets)) <= 200_000
    assert not sprites.lossless
    assert len(sprites.places) == 200
    large = pack([np.full((300, 150, 3), 200, np.uint8)], most_bytes=100_000)
    assert large.places == [(0, 0, 0, 48, 96)]
    assert (unpack(large)[0] == 200).all()


# --- in a browser -----------------------------------------------------------------------------------------------------

CARDS = "return [...document.querySelectorAll('#cards .card')].map(c => c.innerText)"


# Contrast of every piece of text with what is behind it, as WCAG 2 defines it.
CONTRAST = """
  const linear = (v) => { v /= 255; return v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const behind = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    return /, 0\\)$/.test(color) ? behind(e.parentElement) : color;
  };
  return [...document.querySelectorAll('p, h1, h2, h3, dt, dd, summary, button:enabled, a, td, .chip, .where')]
    .filter((e) => e.innerText.trim()).map((e) => contrast(getComputedStyle(e).color, behind(e)));
"""


def opened(browser, path, *size, **options):
    window = browser(*size, **options)
    window.open(path)
    window.wait(
        "document.querySelectorAll('[data-chart]').length == document.querySelectorAll('[data-chart] svg').length"
    )
    return window


def test_it_opens_without_complaints_and_the_filters_work(make_run, browser):
    path = write_report([make_run(rounds=3, clients=2, batch=4, trace=True)], make_run("x").parent / "r.html")
    window = opened(browser, path)
    assert window.log() == []
    requests = [json.loads(entry["message"])["message"] for entry in window.log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith(("file:", "blob:", "data:")) for url in urls)
    assert window.run("return document.querySelectorAll('[data-chart] svg').length") >= 9

    assert len(window.run(CARDS)) == 24
    window.choose("recovered", "1")
    cards = window.run(CARDS)
    assert len(cards) == 6
    assert all("recovered" in card and "40.0 dB" in card for card in cards)
    window.choose("client", "1")
    assert all("client 1" in card for card in window.run(CARDS))
    assert len(window.run(CARDS)) == 3
    window.choose("round", "2")
    assert len(window.run(CARDS)) == 1
    assert "1 to 1 of 1" in window.run("return document.getElementById('status').textContent")
    window.choose("recovered", "0")
    assert len(window.run(CARDS)) == 3
    for name in ("recovered", "client", "round"):
        window.choose(name, "")
    window.choose("label", "0")
    wrong = window.run(CARDS)
    assert len(wrong) == 3
    assert all("client 0, image 3" in card and "9" in card for card in wrong)
    window.choose("label", "")
    window.choose("order", "closest")
    assert "recovered" in window.run(CARDS)[0]
    window.choose("order", "farthest")
    assert "recovered" not in window.run(CARDS)[0]
    assert window.log() == []


# The pixels of a thumbnail, as the page shows them.
PIXELS = """
      const i = document.querySelectorAll(arguments[0])[arguments[1]], s = i.style;
      const image = new Image(); image.src = s.backgroundImage.slice(5, -2); await image.decode();
      const scale = parseFloat(s.backgroundSize) / image.width;
      const [x, y] = s.backgroundPosition.split(' ').map(v => Math.round(-parseFloat(v) / scale));
      const canvas = document.createElement('canvas'); canvas.width = canvas.height = 6;
      const context = canvas.getContext('2d'); context.drawImage(image, -x, -y);
      return [...context.getImageData(0, 0, 6, 6).data];
"""


def shows(window, selector, images):
    """Whether the page's thumbnails are these images of 6 by 6 pixels."""
    for index, image in enumerate(images):
        shown = torch.tensor(window.run(PIXELS, selector, index)).reshape(6, 6, 4)[..., :3].permute(2, 0, 1) / 255
        assert (shown - image).abs().max() <= 0.5 / 255 + 1e-6


def test_pictures_are_where_they_should_be(make_run, browser):
    """The pixels on the screen are those of the private image and of its reconstruction."""
    folder = make_run(shape=(3, 6, 6))
    window = opened(browser, write_report([folder], folder.parent / "r.html"))
    first = read_run(folder).matches[0]
    shows(window, "#cards .card i", [first.true, first.rebuilt])
    box = window.run(
        "const r = document.querySelector('#cards .card i').getBoundingClientRect(); return [r.width, r.height]"
    )
    assert box == [78, 78]
    alt = window.run("return [...document.querySelectorAll('#cards .card i')].slice(0, 2).map(i => i.ariaLabel)")
    assert alt[0] == "private image, label 0"
    assert alt[1].startswith("rebuilt image, inferred label 0, 40.0 dB")


def test_cards_say_what_was_reached_and_what_was_possible(make_run, browser):
    window = opened(browser, write_report([make_run(limit=5e-5)], make_run("x").parent / "r.html"))
    card = window.run(CARDS)[0]
    assert "40.0 dB\nreached 1.0e-4 · possible 5.0e-5\nthe attacker expected 1.0e-4" in card
    assert window.run("return document.querySelectorAll('#panel-limit svg .mark-symbol.role-mark path').length") == 12
    plain = opened(browser, write_report([make_run("plain")], make_run("y").parent / "r.html"))
    assert "40.0 dB, MSE 1.0e-4" in plain.run(CARDS)[0]
    assert window.log() == plain.log() == []


def test_the_evolution_of_an_image(make_run, browser):
    """Its film opens by keyboard, shows the private image and every frame, leads to the next image, and closes."""
    folder = make_run(shape=(3, 6, 6), trace=True)
    window = opened(browser, write_report([folder], folder.parent / "r.html"))
    first, second = read_run(folder).matches[:2]
    window.run("document.querySelector('#cards .evolve').focus()")
    window.press("Enter")
    window.wait("document.getElementById('film').open")
    words = "return document.getElementById('film').innerText"
    assert "round 1, client 0, image 0" in window.run(words)
    assert "After 70 evaluations, at the latest" in window.run(words)
    captions = "return [...document.querySelectorAll('#frames li')].map(li => li.innerText.replace(/\\n/g, ' '))"
    assert window.run(captions)[2:] == [f"12 evaluations MSE {first.frames[1].mse:.2g}", "70 evaluations MSE 1.0e-4 ✓"]
    shows(window, "#frames i", [first.true, *(frame.image for frame in first.frames)])
    alts = window.run("return [...document.querySelectorAll('#frames i')].map(i => i.ariaLabel)")
    assert alts == ["private image, label 0", "image, start", "image, 12 evaluations", "rebuilt image, 70 evaluations"]
    window.press("ArrowRight")
    shows(window, "#frames i", [second.true, *(frame.image for frame in second.frames)])
    assert "never came to an MSE below 0.001" in window.run(words)
    window.run("document.getElementById('film-next').focus()")
    for _ in range(10):
        window.press("Enter")
    assert window.run("return document.getElementById('film-next').disabled")
    assert window.run("return document.activeElement.id") == "film-close"
    window.press("Escape")
    window.wait("!document.getElementById('film').open")
    assert window.run("return document.activeElement.className") == "evolve"
    assert window.log() == []


def test_films_are_kept_for_some_images_only(make_run, browser, monkeypatch):
    folder = make_run(trace=True)
    plain = write_report([make_run("plain")], folder.parent / "plain.html").read_text()
    assert 'select name="film"' not in plain
    monkeypatch.setattr("fedleak.report.html.MOST_FILMS", 5)
    window = opened(browser, write_report([folder], folder.parent / "r.html"))
    assert window.run("return document.querySelectorAll('#cards .evolve').length") == 5
    window.choose("film", "1")
    assert len(window.run(CARDS)) == 5
    assert "of 5 of 12 images" in window.run("return document.getElementById('gallery').innerText")
    assert window.log() == []


def test_every_chart_has_words_and_a_table(make_run, browser):
    window = opened(browser, write_report([make_run("a"), make_run("b", batch=3)], make_run("c").parent / "r.html"))
    panels = window.run(
        "return [...document.querySelectorAll('.panel')].map(p => [p.querySelector('.chart').ariaLabel.length,"
        "p.querySelectorAll('tbody tr').length, p.querySelector('.chart svg').getBoundingClientRect().width])"
    )
    assert len(panels) > 10
    assert [panel for panel in panels if panel[0] < 20 or panel[1] == 0 or panel[2] < 200] == []
    unnamed = window.run(
        "return [...document.querySelectorAll('button, select, a')].filter(e => !(e.ariaLabel || e.innerText.trim()"
        "|| e.labels?.length)).length"
    )
    assert unnamed == 0
    window.choose("run", "1")
    assert len(window.run(CARDS)) == 18
    assert window.log() == []


def test_the_keyboard_reaches_everything(make_run, browser):
    window = opened(browser, write_report([make_run()], make_run("x").parent / "r.html"))
    seen = []
    for _ in range(60):
        window.press("Tab")
        seen.append(window.run("const e = document.activeElement; return e.id || e.name || e.tagName"))
    assert {"theme", "round", "client", "recovered", "order", "SUMMARY", "A"} <= set(seen)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_on_a_phone(make_run, browser, dark):
    window = opened(browser, write_report([make_run()], make_run("x").parent / "r.html"), 390, 800, dark=dark)
    theme = "return document.documentElement.dataset.theme"
    assert window.run(theme) == ("dark" if dark else "light")
    for _ in range(2):
        ratios = window.run(CONTRAST)
        assert min(ratios) >= 4.5
        window.run("document.getElementById('theme').click()")
        window.wait("document.querySelectorAll('[data-chart] svg').length > 0")
    assert window.run("document.getElementById('theme').click(); " + theme) != ("dark" if dark else "light")
    assert window.run("return document.documentElement.scrollWidth") == 390
    assert window.log() == []


def test_evil_names_do_nothing_in_a_browser(make_run, browser):
    folder = make_run("<img src=x onerror=alert(1)>")
    (folder / "attacks.csv").write_text((folder / "attacks.csv").read_text().replace("converged", EVIL))
    window = opened(browser, write_report([folder, make_run("plain")], folder.parent / "r.html"))
    assert window.run("return document.querySelectorAll('img').length") == 0
    assert "<img src=x onerror=alert(1)>" in window.run("return document.querySelector('h2.name').textContent")
    assert window.log() == []


@pytest.mark.slow
def test_ten_thousand_images_stay_small_and_fast(make_run, browser):
    folder = make_run(rounds=125, clients=10, batch=8, shape=(3, 32, 32), std=0.3, trace=True)
    start = time.perf_counter()
    path = write_report([folder], folder.parent / "r.html")
    assert time.perf_counter() - start < 120
    assert path.stat().st_size < 20_000_000
    start = time.perf_counter()
    window = opened(browser, path)
    assert time.perf_counter() - start < 20
    assert len(window.run(CARDS)) == 48
    start = time.perf_counter()
    window.choose("recovered", "1")
    assert "of 1,250 chosen, 10,000 in all" in window.run("return document.getElementById('status').textContent")
    assert time.perf_counter() - start < 2
    assert window.log() == []


def test_the_report_of_a_real_run_lacks_nothing(small_run, tmp_path):
    run = read_run(small_run)
    assert run.problems == []
    assert len(run.matches) == run.summary["images"] == len(run.leakage)
    assert sum(bool(m.recovered) for m in run.matches) == run.summary["recovered"]
    html = page(small_run, output=tmp_path / "r.html")
    assert run.summary["command"] in html
    assert "Missing or damaged" not in html
