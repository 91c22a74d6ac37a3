"""A checkout that is on the path and not installed."""

from importlib import metadata

from difftuning_control import __version__
from difftuning_control.runs import audit, identity


def test_a_run_and_its_audit_need_no_installed_package(tmp_path, monkeypatch):
    installed = metadata.version

    def version(name: str) -> str:
        if name == "difftuning-control":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(identity, "version", version)
    assert identity.versions()["difftuning-control"] == __version__
    with audit.noted(tmp_path):
        pass
    assert [entry["version"] for entry in audit.read_audit(tmp_path).entries] == [__version__]
