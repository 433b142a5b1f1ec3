"""A hub in memory, in the place of huggingface_hub's client: it records what is asked of it and what it is sent."""

from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


class FakeHub:
    """Repositories by name, with their visibility and the bytes of their files."""

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.calls: list[str] = []
        self.failures: dict[str, Exception] = {}
        """What a call raises, by its name."""

    def __call__(self, **options: Any) -> "FakeHub":
        return self

    @property
    def writes(self) -> list[str]:
        """Calls that change something."""
        return [name for name in self.calls if name not in ("whoami", "model_info")]

    def whoami(self) -> dict[str, str]:
        self._called("whoami")
        return {"name": "me"}

    def model_info(self, repository: str) -> Any:
        self._called("model_info")
        if repository not in self.repositories:
            raise http_error(404, RepositoryNotFoundError)
        private, files = self.repositories[repository]
        return SimpleNamespace(private=private, siblings=[SimpleNamespace(rfilename=name) for name in files])

    def create_repo(self, repository: str, *, repo_type: str, private: bool | None, exist_ok: bool) -> None:
        self._called("create_repo")
        assert repo_type == "model"
        self.repositories[repository] = (bool(private), {})

    def create_commit(self, repository: str, operations: list[Any], *, commit_message: str, repo_type: str) -> None:
        self._called("create_commit")
        assert repo_type == "model" and commit_message
        files = self.repositories[repository][1]
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                assert isinstance(operation, CommitOperationAdd)
                with operation.as_file() as content:
                    files[operation.path_in_repo] = content.read()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failures:
            raise self.failures[name]


def http_error(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    """What the hub's client raises for an answer of this status."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} from the hub", response=response)


def install(patch: pytest.MonkeyPatch) -> FakeHub:
    """Have our code meet such a hub."""
    fake = FakeHub()
    patch.setattr(huggingface_hub, "HfApi", fake)
    return fake
