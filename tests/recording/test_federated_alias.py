"""`fedgfe_store.federated`, the old name of recording."""

from fedgfe_store import federated, recording
from fedgfe_store.recording import fedgfe


def test_the_old_name_gives_the_same_classes():
    assert federated.Recorder is recording.Recorder
    for name in fedgfe.__all__:
        assert getattr(federated, name) is getattr(fedgfe, name)
    assert set(federated.__all__) == {"Recorder", *fedgfe.__all__}
