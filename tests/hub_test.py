"""Hub ids: what is fetched, what is not, and errors that say what to do. Nothing here reaches the network."""

from types import SimpleNamespace

import httpx2
import huggingface_hub
from huggingface_hub import errors
import pytest

from ctxjax.host import hub


def fails(error):
    def snapshot_download(*_, **__):
        raise error

    return snapshot_download


def answered(kind, status=404):
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=status))


def test_a_folder_is_itself_and_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", fails(AssertionError("looked up")))
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.find_folder("org/name").samefile(tmp_path / "org" / "name")
    assert hub.find_folder("~/org").samefile(tmp_path / "org")


@pytest.mark.parametrize(
    ("path", "name", "revision"),
    [("org/na.me-1", "org/na.me-1", None), ("org/name@refs/pr/1", "org/name", "refs/pr/1")],
)
def test_an_id_is_fetched_at_its_revision(path, name, revision, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *args, **options: calls.append((*args, options["revision"])) or str(tmp_path)
    )
    assert hub.find_folder(path) == tmp_path
    assert calls == [(name, revision)]


def test_weights_tokenizer_and_templates_are_fetched_but_no_pickles_no_code_no_copies():
    wanted = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
    ]  # fmt: skip
    others = [
        "pytorch_model.bin", "model.pt", "modeling_custom.py", "consolidated.safetensors", "original/params.json",
        "onnx/model.safetensors", "README.md", "training_args.bin",
    ]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(
        wanted + others, allow_patterns=hub.WANTED, ignore_patterns=hub.UNWANTED
    )
    assert list(kept) == wanted


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            answered(errors.GatedRepoError),
            PermissionError,
            "gated: accept its terms at https://huggingface.co/org/name",
        ),
        (answered(errors.RepositoryNotFoundError), FileNotFoundError, "org/name@v1 is neither on this machine nor"),
        (answered(errors.RevisionNotFoundError), FileNotFoundError, "org/name has no revision 'v1'"),
        (errors.OfflineModeIsEnabled("no"), FileNotFoundError, "HF_HUB_OFFLINE is set"),
        (answered(errors.HfHubHTTPError), FileNotFoundError, "did not deliver org/name@v1: "),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_remedy(error, kind, message, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", fails(error))
    with pytest.raises(kind, match=message):
        hub.find_folder("org/name@v1")


BROKEN = [
    httpx2.ReadError("reset"), httpx2.ConnectTimeout("slow"), httpx2.RemoteProtocolError("cut off"),
    ConnectionResetError(104, "reset"), TimeoutError("slow"), answered(errors.HfHubHTTPError, 503),
    answered(errors.HfHubHTTPError, 429),
]  # fmt: skip


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
def test_a_broken_connection_is_one_message_with_the_remedy(error, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", fails(error))
    with pytest.raises(FileNotFoundError, match="the Hub did not deliver org/name: .* What has arrived is kept: try"):
        hub.find_folder("org/name")


def test_offline_an_id_that_is_not_cached_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nor in the Hub's cache, and the Hub cannot be reached"):
        hub.find_folder("org/name")


@pytest.mark.parametrize("path", ["missing", "./org/name", "../name", "/no/such/folder", "a/b/c", "org/name@"])
def test_what_is_neither_a_folder_nor_an_id_is_named(path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", fails(AssertionError("looked up")))
    with pytest.raises(FileNotFoundError, match=f"model folder {path} does not exist; give a folder, or a Hub id"):
        hub.find_folder(path)
