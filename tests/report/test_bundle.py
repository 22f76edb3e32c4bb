"""The page's script is bundled once, and kept as it was or not used."""

from fedleak.report import bundle


def test_it_is_kept_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle.vega.cache_clear()
    first = bundle.vega()
    [kept] = (tmp_path / "fedleak").iterdir()
    before = kept.stat().st_mtime_ns
    bundle.vega.cache_clear()
    assert bundle.vega() == first
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes().replace(b"vega", b"evil", 1))
    bundle.vega.cache_clear()
    assert bundle.vega() == first
    assert b"evil" not in kept.read_bytes()[:200]


def test_a_folder_that_cannot_be_written_to_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    bundle.vega.cache_clear()
    assert "vegaEmbed" in bundle.vega()
    bundle.vega.cache_clear()
