"""One table over many runs."""

import json
import shutil

import pandas as pd

from fedleak.cli import main


def test_one_table_over_all_runs_of_a_folder(small_run, tmp_path, capsys):
    summary = json.loads((small_run / "summary.json").read_text())
    for job, std in ((2, "0.1"), (10, "0.2")):
        folder = tmp_path / "sweep" / str(job)
        shutil.copytree(small_run / ".hydra", folder / ".hydra")
        words = f"fedleak run defense.std={std} +attack.view=sum seed=3 'output_dir=a b' hydra.job.chdir=false"
        said = summary | {"command": words, "seed": 3, "final_test_accuracy": job / 100}
        (folder / "summary.json").write_text(json.dumps(said))
    shutil.copytree(small_run / ".hydra", tmp_path / "sweep" / "11" / ".hydra")  # killed
    (tmp_path / "sweep" / "12").mkdir()
    (tmp_path / "sweep" / "12" / "summary.json").write_text("{half")
    (tmp_path / "other" / "x").mkdir(parents=True)
    (tmp_path / "other" / "x" / "summary.json").write_text("{}")  # somebody else's

    assert main(["collect", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "collected.csv")
    assert list(table["run"]) == ["sweep/2", "sweep/10"]
    assert list(table["defense.std"]) == [0.1, 0.2]
    assert list(table["attack.view"]) == ["sum", "sum"]
    assert list(table["final_test_accuracy"]) == [0.02, 0.1]
    assert list(table["seed"]) == [3, 3]
    assert not {"output_dir", "hydra.job.chdir"} & set(table)
    said = capsys.readouterr()
    assert "defense.std" in said.out
    assert "attack.view" not in said.out  # the same everywhere
    assert "not finished: sweep/11" in said.err
    assert "left out, damaged: sweep/12" in said.err

    assert main(["collect", str(tmp_path / "sweep"), "--output", str(tmp_path / "t.csv")]) == 0
    assert list(pd.read_csv(tmp_path / "t.csv")["run"].astype(str)) == ["2", "10"]
    for words in (["collect"], ["collect", str(tmp_path / "other")], ["collect", str(tmp_path / "nowhere")]):
        capsys.readouterr()
        assert main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
