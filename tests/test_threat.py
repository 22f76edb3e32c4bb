import pytest

from fedleak.errors import UsageError
from fedleak.threat import ThreatModel


def test_granted_and_withheld_partition_the_fields():
    threat = ThreatModel(labels=True, buffers=False)
    assert set(threat.granted) & set(threat.withheld) == set()
    assert "labels" in threat.granted
    assert "buffers" in threat.withheld


def test_a_missing_grant_is_named_with_its_mend():
    with pytest.raises(UsageError, match=r"attack=x needs auxiliary_data.*threat\.auxiliary_data=true"):
        ThreatModel().require({"auxiliary_data", "batch_size"}, "attack=x")
    ThreatModel(auxiliary_data=True).require({"auxiliary_data"}, "attack=x")
