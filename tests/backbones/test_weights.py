"""``load_backbone``: every form of checkpoint file, the cache folder, the download, and what a user can get wrong."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import pickle
import re
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from oodprompt.backbones import BACKBONES, CLIP, load_backbone, weights
from oodprompt.backbones.model import CLIPShape
from oodprompt.backbones.tokenizer import load_clip_file
from oodprompt.errors import UserError

Reference = Callable[[str], nn.Module]
SMALL = ("small ViT", "small RN")


def saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def openai_archive(model: nn.Module, convert_weights: Callable[[nn.Module], None]) -> bytes:
    """A TorchScript archive like OpenAI's: half-precision weights, three sizes among the tensors."""
    shape = CLIPShape.of(model.state_dict())
    convert_weights(model)
    for key, value in (
        ("input_resolution", shape.image_resolution),
        ("context_length", shape.context_length),
        ("vocab_size", shape.vocab_size),
    ):
        if hasattr(model, key):
            delattr(model, key)
        model.register_buffer(key, torch.tensor(value))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer PyTorch says that TorchScript is deprecated
        model.requires_grad_(False)
        images = torch.randn(1, 3, shape.image_resolution, shape.image_resolution)
        example = (images, torch.zeros(1, shape.context_length, dtype=torch.long))
        torch.jit.save(torch.jit.trace(model, example, check_trace=False), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def state(reference: Reference) -> dict[str, Tensor]:
    return dict(reference("small ViT").state_dict())


def assert_loaded(model: CLIP, state: dict[str, Tensor]) -> None:
    """The model carries the values of ``state`` and is as ``load_backbone`` promises."""
    for key, value in model.state_dict().items():
        assert torch.equal(value.float(), state[key].float()), key
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


# ---------------------------------------------------------------------------------------------- forms of files

FORMS: dict[str, Callable[[dict[str, Tensor]], bytes]] = {
    "state dict": saved,
    "state dict, old format": lambda state: saved(state, _use_new_zipfile_serialization=False),
    "state_dict entry": lambda state: saved({"state_dict": state}),
    "training checkpoint": lambda state: saved({"state_dict": state, "epoch": 3, "optimizer": {"state": [1.0]}}),
    "module. prefix": lambda state: saved({"module." + key: value for key, value in state.items()}),
    "module. prefix in an entry": lambda state: saved({"state_dict": {"module." + k: v for k, v in state.items()}}),
    "gzip": lambda state: gzip.compress(saved(state), 1),
    "gzip, half precision": lambda state: gzip.compress(saved({k: v.half() for k, v in state.items()}), 1),
    "sizes among the tensors": lambda state: saved(
        {
            **state,
            "input_resolution": torch.tensor(40),
            "context_length": torch.tensor(12),
            "vocab_size": torch.tensor(100),
        }
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_state_dicts(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(FORMS[form](state))
    expected = {key: value.half() for key, value in state.items()} if "half" in form else state
    assert_loaded(load_backbone("ViT-B/16", file), expected)
    assert_loaded(load_backbone("", str(file)), expected)


@pytest.mark.parametrize("compress", [bytes, lambda content: gzip.compress(content, 1)], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", SMALL)
def test_openais_archive(
    name: str, compress: Callable[[bytes], bytes], reference: Reference, openai: ModuleType, tmp_path: Path
) -> None:
    model = reference(name)
    archive = openai_archive(model, openai.convert_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = torch.jit.load(io.BytesIO(archive)).state_dict()
    assert {"input_resolution", "context_length", "vocab_size"} < read.keys()
    assert read["visual.conv1.weight"].dtype == torch.float16 and read["ln_final.weight"].dtype == torch.float32
    file = tmp_path / "clip.pt"
    file.write_bytes(compress(archive))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user cannot mend that OpenAI's archives are of an old kind
        ours = load_backbone(name, file)
    assert_loaded(ours, model.state_dict())
    images = torch.randn(2, 3, *2 * (ours.shape.image_resolution,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.float().encode_image(images)
        assert (ours.encode_image(images) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_batch_norm_counters_may_be_missing(reference: Reference, tmp_path: Path) -> None:
    """They came with PyTorch 0.4.1 and change nothing in evaluation; other keys must be there."""
    state = {k: v for k, v in reference("small RN").state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "rn.pt")
    model = load_backbone("RN50", tmp_path / "rn.pt")
    assert_loaded(model, {**model.state_dict(), **state})


def test_home_is_expanded(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "clip.pt")
    assert_loaded(load_backbone("", "~/clip.pt"), state)


# ---------------------------------------------------------------------------------------------- unreadable files


class Malicious:
    """Runs a command when unpickled by the plain ``pickle``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def as_archive(content: bytes) -> bytes:
    """A ``torch.save`` zip dressed up as TorchScript."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/constants.pkl", archive.read(f"{root}/data.pkl"))
        archive.writestr(f"{root}/code/__torch__.py", "")
    return buffer.getvalue()


MALICIOUS: dict[str, Callable[[object], bytes]] = {
    "zip": saved,
    "old format": lambda content: saved(content, _use_new_zipfile_serialization=False),
    "pickle": lambda content: pickle.dumps(content, 2),
    "gzip": lambda content: gzip.compress(pickle.dumps(content, 2)),
    "zip in gzip": lambda content: gzip.compress(saved(content)),
    "false TorchScript": lambda content: as_archive(saved(content)),
}


@pytest.mark.parametrize("form", MALICIOUS)
def test_nothing_in_a_file_is_executed(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    file, marker = tmp_path / "evil.pt", tmp_path / "executed"
    content = MALICIOUS[form]({"state_dict": state, "extra": Malicious(marker)})
    file.write_bytes(content)
    if form in ("zip", "old format", "zip in gzip"):  # what is beside the tensors is passed over
        assert_loaded(load_backbone("tiny", file), state)
    else:
        with pytest.raises(UserError, match="evil.pt"):
            load_backbone("tiny", file)
    file.write_bytes(MALICIOUS[form](Malicious(marker)))
    with pytest.raises(UserError, match="evil.pt"):
        load_backbone("tiny", file)
    assert not marker.exists()
    if form in ("pickle", "gzip"):  # the bait is live
        pickle.loads(gzip.decompress(content) if form == "gzip" else content)
        assert marker.exists()


def scrambled(content: bytes, start: float, length: int) -> bytes:
    at = int(start * len(content))
    return content[:at] + bytes(255 - byte for byte in content[at : at + length]) + content[at + length :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "2 bytes": lambda content: content[:2],
    "100 bytes": lambda content: content[:100],
    "a tenth": lambda content: content[: len(content) // 10],
    "half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "last 100 bytes missing": lambda content: content[:-100],
    "first bytes scrambled": lambda content: scrambled(content, 0, 40),
    "start scrambled": lambda content: content[:2] + scrambled(content[2:], 0, 40),
    "middle scrambled": lambda content: scrambled(content, 0.5, 40),
    "end scrambled": lambda content: content[:-60] + scrambled(content[-60:], 0, 60),
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n",
    "web page": lambda content: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
}


# The numbers of a tensor carry no checksum that PyTorch looks at, and the old format ends with numbers.
UNSEEN = {
    *((form, "middle scrambled") for form in ("zip", "old format", "TorchScript")),
    ("old format", "end scrambled"),
}


@pytest.fixture(scope="module")
def whole_files(state: dict[str, Tensor], reference: Reference, openai: ModuleType) -> dict[str, bytes]:
    return {
        "zip": saved(state),
        "old format": saved(state, _use_new_zipfile_serialization=False),
        "gzip": gzip.compress(saved(state), 1),
        "TorchScript": openai_archive(reference("small ViT"), openai.convert_weights),
    }


@pytest.mark.parametrize(
    ("form", "damage"),
    [(f, d) for f in ("zip", "old format", "gzip", "TorchScript") for d in DAMAGE if (f, d) not in UNSEEN],
)
def test_damaged_files(form: str, damage: str, whole_files: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "broken.pt"
    file.write_bytes(DAMAGE[damage](whole_files[form]))
    with pytest.raises(UserError) as error:
        load_backbone("tiny", file)
    assert str(file) in str(error.value) and "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], torch.zeros(2), {"a": 1}, {"state_dict": [1]}, {"state_dict": {"a": "b"}}, 3, None],
    ids=str,
)
def test_other_contents(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt"):
        load_backbone("tiny", tmp_path / "other.pt")


@pytest.mark.parametrize("place", ["absent.pt", "folder"])
def test_no_file_at_the_path(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"MODEL.BACKBONE.PATH.*{place}"):
        load_backbone("tiny", tmp_path / place)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("ViT-B/61", "ViT-B/16"),
        ("vit-b/32", "ViT-B/32"),
        ("RN-50", "RN50"),
        ("ViT-L/14@336", "ViT-L/14@336px"),
        ("Tiny", "tiny"),
    ],
)
def test_unknown_name(name: str, suggestion: str) -> None:
    with pytest.raises(UserError, match="MODEL.BACKBONE.NAME") as error:
        load_backbone(name)
    assert repr(name) in str(error.value) and f"did you mean {suggestion!r}?" in str(error.value)
    assert all(known in str(error.value) for known in BACKBONES)


# ---------------------------------------------------------------------------------------------- cache and download


class Response(io.BytesIO):
    """What ``urlopen`` returns; raises ``failure`` after ``whole`` bytes."""

    def __init__(
        self, content: bytes, failure: BaseException | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(content)
        self.failure = failure
        self.headers = {"Content-Length": str(len(content))} if headers is None else headers

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(min(size, 4096) if size and size > 0 else size)
        if self.failure and not block:
            raise self.failure
        return block


@pytest.fixture
def content(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A checkpoint that stands for ViT-B/16's: OPENAI_WEIGHTS carries its digest."""
    content = saved(state)
    monkeypatch.setitem(weights.OPENAI_WEIGHTS, "ViT-B/16", (hashlib.sha256(content).hexdigest(), "ViT-B-16.pt"))
    return content


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Response | BaseException], list[str]]:
    """serve(answer) makes ``urlopen`` give (or raise) ``answer``; returns the list of addresses asked for."""

    def serve(answer: Response | BaseException) -> list[str]:
        asked: list[str] = []

        def urlopen(address: str, *args: object, **options: object) -> Response:
            asked.append(address)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return serve


@pytest.fixture(autouse=True)
def no_network(
    serve: Callable[[BaseException], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """No test reaches the network or the user's own cache, whatever it forgets."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked = serve(AssertionError("this test must not ask the network"))
    yield
    assert not asked


def address_of(name: str) -> str:
    sha256, filename = weights.OPENAI_WEIGHTS[name]
    return f"https://openaipublic.azureedge.net/clip/models/{sha256}/{filename}"


def test_addresses_are_openais() -> None:
    """Names, addresses and digests as in OpenAI's own table (clip.py cannot be imported everywhere; it is read)."""
    source = Path(load_clip_file("model").__file__).with_name("clip.py").read_text()
    table = dict(re.findall(r'^ +"(\S+)": "(https://\S+)",$', source, flags=re.MULTILINE))
    assert table and {name: address_of(name) for name in weights.OPENAI_WEIGHTS} == table
    assert set(BACKBONES) == {"tiny", "tiny-photo", *table, "open_clip:ARCH/TAG", "hf:REPOSITORY"}


def test_a_file_in_the_cache(content: bytes, state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "ViT-B-16.pt").write_bytes(content)
    assert_loaded(load_backbone("ViT-B/16", cache_dir=tmp_path), state)


def test_the_default_cache_is_openais(content: bytes, state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".cache" / "clip"
    folder.mkdir(parents=True)
    (folder / "ViT-B-16.pt").write_bytes(content)
    assert_loaded(load_backbone("ViT-B/16"), state)


def test_the_path_wins_over_the_name(content: bytes, state: dict[str, Tensor], tmp_path: Path) -> None:
    other = {key: value + 1 for key, value in state.items()}
    torch.save(other, tmp_path / "mine.pt")
    (tmp_path / "ViT-B-16.pt").write_bytes(content)
    assert_loaded(load_backbone("ViT-B/16", tmp_path / "mine.pt", tmp_path), other)


def test_the_digest_is_computed_once(
    content: bytes, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte takes seconds to digest; the size and time of the file tell whether it is still the same."""
    file = tmp_path / "ViT-B-16.pt"
    file.write_bytes(content)
    load_backbone("ViT-B/16", cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_sha256", lambda file: pytest.fail("digested again"))
        assert_loaded(load_backbone("ViT-B/16", cache_dir=tmp_path), state)
    file.write_bytes(saved({key: value + 1 for key, value in state.items()}))
    with pytest.raises(UserError, match="SHA256"):
        load_backbone("ViT-B/16", cache_dir=tmp_path)


def test_the_cache_may_refuse_to_be_written(content: bytes, state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "ViT-B-16.pt").write_bytes(content)
    (tmp_path / "ViT-B-16.pt.verified").mkdir()
    assert_loaded(load_backbone("ViT-B/16", cache_dir=tmp_path), state)


def test_a_wrong_file_in_the_cache(content: bytes, state: dict[str, Tensor], tmp_path: Path) -> None:
    """A whole, readable CLIP, but not the one it is named after."""
    file = tmp_path / "ViT-B-16.pt"
    torch.save({key: value + 1 for key, value in state.items()}, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="SHA256") as error:
        load_backbone("ViT-B/16", cache_dir=tmp_path)
    assert str(file) in str(error.value) and address_of("ViT-B/16") in str(error.value)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


def test_download(content: bytes, state: dict[str, Tensor], tmp_path: Path, serve: Callable) -> None:
    folder = tmp_path / "new" / "folder"
    asked = serve(Response(content))
    assert_loaded(load_backbone("ViT-B/16", cache_dir=folder), state)
    assert asked == [address_of("ViT-B/16")]
    assert [file.name for file in folder.iterdir()] == ["ViT-B-16.pt"]
    assert (folder / "ViT-B-16.pt").read_bytes() == content
    assert_loaded(load_backbone("ViT-B/16", cache_dir=folder), state)
    assert asked.pop() and not asked  # not asked for again


def test_a_downloaded_file_is_as_readable_as_any(content: bytes, tmp_path: Path, serve: Callable) -> None:
    """Cache folders are shared; a file for its owner only would stop everybody else."""
    serve(Response(content))
    load_backbone("ViT-B/16", cache_dir=tmp_path)
    (tmp_path / "other").touch()
    assert (tmp_path / "ViT-B-16.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "unknown"}], ids=str)
def test_download_of_unknown_size(headers: dict[str, str], content: bytes, tmp_path: Path, serve: Callable) -> None:
    serve(Response(content, headers=headers))
    load_backbone("ViT-B/16", cache_dir=tmp_path)
    assert (tmp_path / "ViT-B-16.pt").read_bytes() == content


FAILURES: dict[str, Callable[[bytes], Response | BaseException]] = {
    "no network": lambda content: urllib.error.URLError("no route to host"),
    "timeout": lambda content: TimeoutError("timed out"),
    "refused": lambda content: urllib.error.HTTPError("https://x", 403, "Forbidden", None, None),  # type: ignore[arg-type]
    "no answer": lambda content: http.client.BadStatusLine(""),
    "wrong content": lambda content: Response(b"<html>log in to the guest network</html>"),
    "one byte wrong": lambda content: Response(scrambled(content, 0.5, 1)),
    "ends early": lambda content: Response(content[:9000], headers={"Content-Length": str(len(content))}),
    "empty": lambda content: Response(b""),
    "connection lost": lambda content: Response(content[:9000], ConnectionResetError("reset by peer")),
    "timeout in the middle": lambda content: Response(content[:9000], TimeoutError("timed out")),
    "chunk incomplete": lambda content: Response(content[:9000], http.client.IncompleteRead(b"", 100)),
    "lost at the end": lambda content: Response(content, ConnectionResetError("reset by peer")),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("folder_exists", [True, False], ids=["folder", "no folder"])
def test_failed_download(failure: str, folder_exists: bool, content: bytes, tmp_path: Path, serve: Callable) -> None:
    """The message says what to fetch from where and where to put it; nothing half is left."""
    folder = tmp_path / "cache"
    if folder_exists:
        folder.mkdir()
    serve(FAILURES[failure](content))
    with pytest.raises(UserError) as error:
        load_backbone("ViT-B/16", cache_dir=folder)
    message = str(error.value)
    assert (
        address_of("ViT-B/16") in message
        and str(folder / "ViT-B-16.pt") in message
        and "MODEL.BACKBONE.PATH" in message
    )
    assert "\n" not in message
    assert not folder.exists() or not list(folder.iterdir())


def test_interrupted_by_the_user(content: bytes, tmp_path: Path, serve: Callable) -> None:
    serve(Response(content[:9000], KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load_backbone("ViT-B/16", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_cache_folder_cannot_be_made(content: bytes, tmp_path: Path, serve: Callable) -> None:
    (tmp_path / "file").touch()
    serve(Response(content))
    with pytest.raises(UserError, match="ViT-B/16") as error:
        load_backbone("ViT-B/16", cache_dir=tmp_path / "file" / "cache")
    assert str(tmp_path / "file") in str(error.value)
