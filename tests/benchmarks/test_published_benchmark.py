import csv
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("published_benchmark", ROOT / "benchmarks" / "published.py")
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench
spec.loader.exec_module(bench)


def test_a_step_at_once_and_one_at_a_time_gives_the_same_rows(tmp_path, capsys):
    output = tmp_path / "rows.csv"
    assert bench.main(["--networks", "3", "--steps", "1", "--dtype", "float64", "--output", str(output)]) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        assert row["label_one"] == row["label_all"]
        assert abs(float(row["mse_one"]) / float(row["mse_all"]) - 1) < 1e-4
    assert "error within 1%: the same in 3 of 3" in capsys.readouterr().out


def test_the_control_compares_the_procedure_with_itself_begun_a_little_beside(capsys):
    assert bench.main(["--networks", "1", "--steps", "1", "--dtype", "float64", "--control"]) == 0
    assert "label of the last step: the same in 1 of 1" in capsys.readouterr().out
