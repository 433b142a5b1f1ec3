"""Publishing on the hub: what is sent, as what, and what is refused; and the folders that exports write."""

import errno
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from autoencoder import export
from autoencoder.export_folder import RECORD, begin, check_place, finish, published
from autoencoder.model import build
from autoencoder.model_config import ModelConfig
from autoencoder.publishing import Upload, check_publishing, describe, log_in, publish
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.files import replace_text
from tests.hub import FakeHub, http_error, install

FILES = {"README.md": "---\nlicense: mit\n---\n\n# Card\n", "config.json": "{}", "diffusion_pytorch_model.safetensors": "weights"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export of three files."""
    return write(tmp_path / "out")


def write(out: Path, files: dict[str, str] = FILES) -> Path:
    beside = begin(out)
    for name, text in files.items():
        (beside / name).write_text(text)
    finish(beside, out, {})
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in published(folder)}


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_gets_the_files_of_the_folder_in_one_commit(hub: FakeHub, folder: Path, private: bool) -> None:
    told = publish(Upload("me/model", private, folder), log_in("me/model"))
    assert hub.repositories == {"me/model": (private, contents(folder))}
    assert hub.calls == ["whoami", "model_info", "create_repo", "create_commit"]
    assert told == "published: https://huggingface.co/me/model (4 files)"


def test_weights_of_an_earlier_export_go_and_all_else_stays(hub: FakeHub, folder: Path) -> None:
    kept = {".gitattributes": b"a", "samples.png": b"b", "vae/notes.md": b"c", "LICENSE": b"d"}
    kept["transformer/diffusion_pytorch_model.safetensors"] = b"of a model that this is no part of"
    gone = ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"]
    hub.repositories["me/model"] = (True, {**kept, **dict.fromkeys(gone, b"old"), "config.json": b"old"})
    upload = Upload("me/model", False, folder)
    shown = describe(upload)
    assert "it exists" in shown and "(private" in shown
    assert all(f"removes   {name}" in shown for name in gone)
    assert "replaces  config.json" in shown and "sends     README.md" in shown
    assert hub.writes == []
    told = publish(upload, log_in("me/model"))
    assert hub.repositories["me/model"] == (True, {**kept, **contents(folder)})
    assert "create_repo" not in hub.calls
    assert f"removed {', '.join(gone)}" in told


def test_what_is_to_be_private_does_not_go_into_a_public_repository(hub: FakeHub, folder: Path) -> None:
    hub.repositories["me/model"] = (False, {})
    upload = Upload("me/model", True, folder)
    assert "--private would be refused" in describe(upload)
    with pytest.raises(ConfigError, match="private: got True; me/model exists and is public"):
        publish(upload, log_in("me/model"))
    assert hub.writes == []


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("whoami", LocalTokenNotFoundError("none"), "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
        ("whoami", http_error(401), "does not accept the token"),
        ("whoami", OfflineModeIsEnabled("offline"), "cannot be reached (OfflineModeIsEnabled: offline); check the network"),
        ("model_info", ConnectionError("no route"), "cannot be reached (ConnectionError: no route)"),
        ("create_repo", http_error(403), "may not write there (403 from the hub); give one that may write as me"),
        ("create_commit", http_error(403), "The repository was made and is still empty. Nothing was published"),
        ("create_commit", http_error(500), "the hub refuses: 500 from the hub"),
    ],
)
def test_what_the_hub_refuses_is_one_message_with_a_remedy(
    hub: FakeHub,
    folder: Path,
    call: str,
    error: Exception,
    said: str,
) -> None:
    hub.failures[call] = error
    with pytest.raises(UsageError) as raised:
        publish(Upload("me/model", False, folder), log_in("me/model"))
    message = str(raised.value)
    assert message.startswith("push_to_hub: got 'me/model'; ")
    assert said in message and message.endswith("Nothing was published")
    assert all(not files for _, files in hub.repositories.values())


def test_a_dry_run_shows_files_and_card_without_network(hub: FakeHub, folder: Path) -> None:
    hub.failures["model_info"] = ConnectionError("no route")
    (folder / "README.md").write_text("# Card\n\n<details><summary>All settings</summary>\n\na\nb\n\n</details>\n\n## End\n")
    shown = describe(Upload("me/model", True, folder))
    assert "dry run: https://huggingface.co/me/model (private; whether it exists could not be asked: ConnectionError: no route)" in shown
    assert all(name in shown for name in FILES)
    assert "4 files" in shown and "nothing was sent" in shown
    assert "| # Card" in shown and "(All settings: 6 lines, folded away)" in shown and "| ## End" in shown
    assert hub.calls == ["model_info"]


@pytest.mark.parametrize("name", ["me/model", "me/m-1.2_x", "Me2/X", "_me/a_", "me/" + "a" * 90])
def test_repositories_of_owners_are_taken(name: str) -> None:
    check_publishing(None, name)


@pytest.mark.parametrize(
    "name",
    [
        *("me", "me/model/more", "me/mo del", "/model", "me/", "me/a--b", "me/a..b", "me/.a", "me/a.git", "-me/a", "me/a-"),
        *("me/" + "a" * 97, "mé/a"),
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"push_to_hub: got .*; give OWNER/NAME"):
        check_publishing(None, name)


@pytest.mark.parametrize("license", ["Apache-2.0", "apache 2.0", "", "(c) me"])
def test_licences_are_the_hubs_identifiers(license: str) -> None:
    check_publishing("apache-2.0", None)
    check_publishing("cc-by-nc-sa-4.0", None)
    with pytest.raises(ConfigError, match=r"license: got .*; give the hub's identifier"):
        check_publishing(license, None)


def test_an_export_that_nobody_has_changed_may_be_replaced(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    assert record["files"].keys() == FILES.keys()
    check_place(str(folder))
    write(folder, {"config.json": "[]"})
    assert published(folder) == ["config.json", RECORD]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("README.md", "my words", "README.md has changed since"),
        ("mine.txt", "notes", "mine.txt is not of the export"),
        (RECORD, "no json", "cannot be read"),
        (RECORD, '{"files": 3}', "cannot be read"),
        (RECORD, None, f"it holds files and no {RECORD}"),
    ],
)
def test_a_folder_with_something_of_others_is_refused(folder: Path, name: str, text: str | None, said: str) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"out: got .*{said}"):
        check_place(str(folder))


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    check_place(str(tmp_path / "empty"))
    check_place(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="a file"):
        check_place(str(tmp_path / "file"))


def test_the_folder_that_the_command_runs_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (".", str(tmp_path), f"{tmp_path}/more/.."):
        with pytest.raises(ConfigError, match=r"out: got .*; is the folder that the command runs in"):
            check_place(out)


def test_a_link_to_a_folder_stays_one_and_its_folder_is_replaced(tmp_path: Path, folder: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    for text in ("1", "2"):
        write(link, {"config.json": text})
        assert link.is_symlink() and (folder / "config.json").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_folder_that_cannot_be_replaced_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    before = contents(folder)
    beside = begin(folder)
    replace_text(beside / "config.json", "other")
    replace_text(beside / RECORD, "{}")
    monkeypatch.setattr("autoencoder.export_folder.replace_text", lambda path, text: None)
    monkeypatch.setattr("autoencoder.export_folder.os.replace", busy)
    with pytest.raises(ConfigError, match=r"out: got .*; cannot be replaced \(Device or resource busy\)"):
        finish(beside, folder, {})
    assert contents(folder) == before


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder."""
    vae = build(ModelConfig(preset="tiny", block_out_channels=(8, 8), norm_groups=4), channels=3, resolution=16)
    vae.save_pretrained(tmp_path_factory.mktemp("network") / "vae")
    return tmp_path_factory.getbasetemp() / "network0" / "vae"


def test_export_autoencoder_publishes_what_it_has_written_and_a_dry_run_before_does_not(
    hub: FakeHub,
    network: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    argv = ["--checkpoint", str(network), "--out", str(out), "--push_to_hub", "me/vae", "--license", "mit"]
    assert export.main([*argv, "--dry_run"]) == 0
    assert hub.writes == [] and "whoami" not in hub.calls
    shown = capsys.readouterr().out
    assert "nothing was sent" in shown and "| license: mit" in shown and 'from_pretrained("me/vae")' in shown
    assert export.main([*argv, "--private"]) == 0
    assert hub.repositories == {"me/vae": (True, contents(out))}
    assert published(out) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors", RECORD]


def test_a_token_that_is_refused_stops_before_anything_is_written(
    hub: FakeHub,
    network: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.failures["whoami"] = http_error(401)
    assert export.main(["--checkpoint", str(network), "--out", str(tmp_path / "out"), "--push_to_hub", "me/vae"]) == 2
    assert capsys.readouterr().err.startswith("error: push_to_hub: got 'me/vae'; the hub does not accept the token")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing_beside(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("autoencoder.artifact.save_stock", full)
    with pytest.raises(OSError, match="No space left"):
        export.main(["--checkpoint", str(network), "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--private"], "private: got True; it would have no effect"),
        (["--dry_run"], "dry_run: got True; it would have no effect"),
        (["--push_to_hub", "vae"], "push_to_hub: got 'vae'; give OWNER/NAME"),
        (["--format", "ldm", "--push_to_hub", "me/vae"], "push_to_hub: got 'me/vae'; a single file has no model card"),
        (["--format", "ldm", "--license", "mit"], "license: got 'mit'; a single file has no model card"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    hub: FakeHub,
    network: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    said: str,
) -> None:
    assert export.main(["--checkpoint", str(network), "--out", str(tmp_path / "out.safetensors"), *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert hub.calls == [] and list(tmp_path.iterdir()) == []
