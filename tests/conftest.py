"""Fixtures of several files, which ask for them by `pytest.mark.usefixtures`."""

import os
from collections.abc import Iterator

import pytest

# Processes side by side share the cores: a thread each, and each process that they start. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as small runs are quickest."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without report page and whole photos, which take longer than they do."""
    from autoencoder import finish

    monkeypatch.setattr(finish, "write_report", lambda *_: None)
    monkeypatch.setattr(finish, "PHOTOS", 0)
