"""Publishing towers and loading them again: a folder, and a server that answers as the hub does."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from maft_adapter import make_mask_aware
from maft_adapter.hub import from_pretrained, push_to_hub
from maft_adapter.models import load_model
from maft_adapter.shapes import render_scene

REPO = "somebody/shapes-tower"


class Hub(BaseHTTPRequestHandler):
    """The few requests that publishing and loading one repository take. Files are kept in `files`."""

    files: dict[str, bytes]
    created: list[dict[str, Any]]
    refuses: bool

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/{REPO}"
        if self.refuses:
            self.answer(403, {"error": "no right to write to somebody"})
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer(200, {"url": address})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self.answer(200, {"files": files})
        elif self.path == f"/api/models/{REPO}/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            self.files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.answer(200, {"commitUrl": f"{address}/commit/{self.commit}", "commitOid": self.commit})
        else:
            self.answer(200, {"errors": [], "warnings": []})  # of the card's head

    def do_GET(self) -> None:
        name = re.fullmatch(rf"/{REPO}/resolve/\w+/(.+)", self.path)
        listed = [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in self.files.items()]
        if self.path.startswith(f"/api/models/{REPO}/tree/"):
            self.answer(200, listed)
        elif self.path.startswith(f"/api/models/{REPO}"):
            self.answer(200, {"id": REPO, "sha": self.commit, "siblings": [{"rfilename": path} for path in self.files]})
        elif name and name[1] in self.files:
            data = self.files[name[1]]
            self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=self.commit)
        else:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    @property
    def commit(self) -> str:
        return "c" * 40

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind = type("ThisHub", (Hub,), {"files": {}, "created": [], "refuses": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants._HF_DEFAULT_ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield kind
    server.shutdown()


@pytest.fixture
def clip() -> Any:
    """The embedded CLIP with a tower that was trained on."""
    clip = load_model().clip
    with torch.no_grad():
        clip.visual.proj += 0.01
    make_mask_aware(clip.visual, 2)
    return clip


def card_code(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def test_a_tower_is_published_and_loaded_again(hub: Any, clip: Any, tmp_path: Path, monkeypatch: Any) -> None:
    address = push_to_hub(clip, REPO, model=None, license="apache-2.0", data="drawn scenes", private=True)
    assert address.endswith(f"/{REPO}/commit/{'c' * 40}")
    assert hub.created[0]["name"] == "shapes-tower" and hub.created[0]["organization"] == "somebody"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert set(hub.files) >= {"tower.safetensors", "config.json", "README.md"}

    model = from_pretrained(REPO)
    assert model.clip.visual.start_layer == 2
    for name, weight in model.clip.state_dict().items():
        assert torch.equal(weight, clip.state_dict()[name]), name
    assert from_pretrained(REPO, precision="bf16").clip.visual.proj.dtype == torch.bfloat16

    # The card's three lines do what they say.
    Image.fromarray(render_scene(3).image).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = card_code(hub.files["README.md"].decode())
    exec(code, space := {})  # type: ignore[var-annotated]
    assert np.unique(space["segmenter"]("photo.jpg").label_map).size


def test_the_card(hub: Any, clip: Any, tmp_path: Path) -> None:
    from maft_adapter.checkpoint import save_mask_aware
    from maft_adapter.cli import main

    save_mask_aware(clip.visual, tmp_path / "best.safetensors")
    out = tmp_path / "scores"
    given = ["--data", "shapes", "--limit", "1", "--checkpoint", str(tmp_path / "best.safetensors"), "--out", str(out)]
    assert main(["evaluate", *given]) == 0
    metrics = out / "metrics.json"
    push_to_hub(clip.visual, REPO, model=None, license="apache-2.0", data="drawn scenes", metrics=metrics)
    card: Any = huggingface_hub.ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0",
        "maft-adapter",
        "image-segmentation",
    )
    expected = json.loads(metrics.read_text())
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert figures["mIoU"] == round(expected["miou"], 2)
    assert f"| mask accuracy | {expected['mask_accuracy']:.1f} |" in card.text
    assert "start_layer 2" in card.text and "Fine-tuned on: drawn scenes" in card.text

    with torch.no_grad():
        clip.visual.proj += 0.01
    with pytest.raises(ValueError, match=r"metrics\.json is of other weights: embedded CLIP, checkpoint best\.safe"):
        push_to_hub(clip, REPO, model=None, license="apache-2.0", data="drawn scenes", metrics=metrics)


def test_a_tower_of_another_clip_is_not_published(hub: Any, clip: Any) -> None:
    with pytest.raises(ValueError, match=r"a VisionTransformer, .*"):
        push_to_hub(clip, REPO, model="ViT-S-32-alt", pretrained="random", license="mit", data="drawn scenes")
    assert not hub.created and not hub.files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo": "tower"}, "repo is 'tower', expected \"user/name\""),
        ({"repo": "a/b/c"}, "repo is 'a/b/c', expected \"user/name\""),
        ({"model": "local-dir:clip"}, "model is 'local-dir:clip', a folder of one machine; expected the name of a pub"),
        ({"model": "ViT-S-32-alt", "pretrained": __file__}, "a file of one machine; expected a tag that open_clip"),
        ({"metrics": __file__}, "is not what maft-adapter evaluate writes"),
    ],
)
def test_refusals(hub: Any, clip: Any, options: dict[str, Any], message: str) -> None:
    given = {"repo": REPO, "model": None, "license": "mit", "data": "drawn scenes", **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        push_to_hub(clip, given.pop("repo"), **given)
    assert not hub.created and not hub.files


def test_figures_of_a_baseline_are_refused(clip: Any, tmp_path: Path) -> None:
    settings = {"data": "x", "model": "m 1", "proposals": "p", "names": "plain", "pictures": 1, "encoder": "crop"}
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": settings, "miou": 1.0}))
    with pytest.raises(ValueError, match=r"of a mask-aware CLIP: .*its encoder is crop"):
        push_to_hub(clip, REPO, model=None, license="mit", data="x", metrics=tmp_path / "metrics.json")


def test_what_the_hub_refuses(hub: Any, clip: Any) -> None:
    hub.refuses = True
    with pytest.raises(OSError, match=rf"{REPO} can't be published: .*403"):
        push_to_hub(clip, REPO, model=None, license="mit", data="drawn scenes")
    with pytest.raises(OSError, match=r"somebody/else is no folder and can't be loaded from the hub: .*404"):
        from_pretrained("somebody/else")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no tower.safetensors and no config.json, which push_to_hub writes"),
        ("{", "config.json of .* is not what push_to_hub writes"),
        ('{"model": null}', "config.json of .* is not what push_to_hub writes: KeyError"),
        ('{"model": 3, "pretrained": null}', "config.json of .* is not what push_to_hub writes"),
        ('["model"]', "config.json of .* is not what push_to_hub writes"),
        ('{"model": "local-dir:/etc", "pretrained": null}', "model is 'local-dir:/etc', a folder of one machine"),
    ],
)
def test_folders_of_other_things(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "tower.safetensors").write_bytes(b"")
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"revision is 'v1', but .* is a folder: leave it out"):
        from_pretrained(tmp_path, revision="v1")
