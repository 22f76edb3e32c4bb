import pytest

from fedleak.defenses import Chain, Gaussian
from fedleak.errors import UsageError
from fedleak.instantiate import instantiate, locate


def test_nested_nodes_and_lists_are_built():
    node = {"_target_": "fedleak.defenses.Chain", "parts": [{"_target_": "fedleak.defenses.Gaussian", "std": 0.1}]}
    chain = instantiate(node, "defense")
    assert isinstance(chain, Chain)
    assert isinstance(chain.parts[0], Gaussian)
    assert instantiate({"a": [1, {"b": 2}]}, "x") == {"a": [1, {"b": 2}]}


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "no.such.Thing"}, r"defense\._target_=no\.such\.Thing: no module named no"),
        ({"_target_": "fedleak.defenses.Gausian", "std": 1}, r"no Gausian in fedleak\.defenses"),
        ({"_target_": "fedleak.__version__"}, "is a str, not a class or function"),
        ({"_target_": "fedleak.defenses.Gaussian", "sdt": 1}, r"did you mean defense\.std\?"),
        ({"_target_": "fedleak.defenses.Gaussian", "std": -1}, r"defense\.std=-1"),
    ],
)
def test_errors_name_the_key_and_the_mend(node, message):
    with pytest.raises(UsageError, match=message):
        instantiate(node, "defense")


def test_a_users_module_with_a_missing_import_says_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "mine_needs.py").write_text("import not_installed_anywhere\nclass Mine: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="No module named 'not_installed_anywhere'; mend that"):
        locate("mine_needs.Mine", "defense")
