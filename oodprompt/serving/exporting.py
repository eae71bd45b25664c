"""``export``: a trained run as one safetensors file, and as an ONNX model; both are checked before they are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodprompt import __version__
from oodprompt.backbones.weights import digest
from oodprompt.engine.trainer import PromptTrainer, load_run
from oodprompt.errors import UserError
from oodprompt.files import temporary_folder
from oodprompt.methods.contracts import PromptLearner
from oodprompt.methods.heads import Head
from oodprompt.serving import file as files
from oodprompt.serving.classifier import Classifier
from oodprompt.serving.deployed import Deployed

LIMIT = 1e-4  # of a difference between probabilities
IMAGES = 64  # that a file is checked on
_AT_ONCE = 16  # of them
_ONNX_BYTES = 2**31 - 2**20  # protobuf's limit of one file


@dataclass(frozen=True)
class Report:
    """What was written: sizes in bytes, and the largest difference of a probability to that of the run."""

    file: Path
    size: int
    file_difference: float
    onnx: Path | None
    onnx_size: int  # where there is an ONNX model
    onnx_difference: float | None
    images: int

    def __str__(self) -> str:
        lines = [f"Wrote {self.file} ({_size(self.size)}): largest difference to the run {self.file_difference:.1e}"]
        if self.onnx is not None:
            lines.append(
                f"Wrote {self.onnx} ({_size(self.onnx_size)}): largest difference between PyTorch and onnxruntime "
                f"{self.onnx_difference:.1e}"
            )
        lines.append(f"Differences are of probabilities on {self.images} images; the limit is {LIMIT:.0e}")
        return "\n".join(lines)


def export(
    run: Any,
    output: str | Path,
    onnx: str | Path = "",
    with_backbone: bool = False,
    epoch: int | None = None,
    root: str | None = None,
    images: Sequence[str | Path] = (),
) -> Report:
    """Write the trained model of ``run`` (an output folder, or a ``Run``) to ``output``, and as an ONNX model to ``onnx``.

    All is in fp32. ``with_backbone`` puts the weights of the towers that are used into ``output``, which otherwise names
    the backbone and verifies it. ``epoch``: that of the model; else the best, else the last. ``root``: the folder of the
    data sets, where it has moved. Both files are checked on ``images`` (paths; else 64 of the run's test images). Where a
    probability differs by more than 1e-4, an error says so and nothing is written. Raises ``UserError`` also for a
    method that cannot be exported.
    """
    output, onnx_path = Path(output), Path(onnx) if onnx else None
    if onnx_path is not None:
        _need_onnx()
    trainer = _trainer_of(run, epoch, root)
    trainer.trained.set_mode(training=False)
    card, tensors = describe(trainer, with_backbone)
    paths = [str(path) for path in images] or _some_images(trainer)
    expected = trainer.classify(paths)
    places, difference = [output, *([onnx_path] if onnx_path else [])], None
    try:
        with contextlib.ExitStack() as stack:
            drafts = [stack.enter_context(temporary_folder(place.parent)) / place.name for place in places]
            drafts[0].write_bytes(files.content(card, tensors))
            classifier = Classifier.load(drafts[0], trainer.cfg.MODEL.BACKBONE.PATH, device="cpu")
            pixels = torch.stack([classifier.pixels_of(path) for path in paths])
            found = torch.cat([classifier.classify(part) for part in pixels.split(_AT_ONCE)])
            file_difference = _difference(found, expected, output)
            if onnx_path is not None:
                write_onnx(classifier, drafts[1])
                difference = _check_onnx(pixels, found, drafts[1], onnx_path)
            sizes = [_put(draft, place) for draft, place in reversed([*zip(drafts, places, strict=True)])]
    except OSError as error:
        place = error.filename or output
        raise UserError(
            f"cannot write {place}: {error.strerror or error}; choose another --output or --onnx"
        ) from error
    return Report(output, sizes[-1], file_difference, onnx_path, sizes[0], difference, len(paths))


def _trainer_of(run: Any, epoch: int | None, root: str | None) -> PromptTrainer:
    """The trained model in fp32: that of a ``Run`` as it stands, or loaded from a folder."""
    trainer = getattr(run, "trainer", None)
    if isinstance(trainer, PromptTrainer) and epoch is None and root is None:
        if trainer.precision == "fp32" and (trainer.device.type == "cpu" or trainer.cfg.TRAIN.TF32 == "none"):
            return trainer
        number = Path(trainer.evaluated_checkpoint).name.rpartition("tar-")[2]  # none of the best
        epoch, root = int(number) if number.isdigit() else None, trainer.cfg.DATASET.ROOT
    keys = ["TRAINER.PREC", "fp32", "TRAIN.TF32", "none"]
    return load_run(getattr(run, "folder", run), epoch, keys, root=root)


def _put(draft: Path, place: Path) -> int:
    """Move a whole file to its place; returns its size."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    size = draft.stat().st_size
    os.replace(draft, place)
    return size


def describe(trainer: PromptTrainer, with_backbone: bool = False) -> tuple[files.Card, dict[str, Tensor]]:
    """Card and tensors of the model of a run, which is in evaluation mode; ``UserError`` where it cannot be exported."""
    cfg, learner, clip = trainer.cfg, trainer.learner, trainer.clip
    if type(learner).encode_image is not PromptLearner.encode_image:
        raise UserError(f"{trainer.base_name} cannot be exported: it encodes images in its own way (encode_image)")
    head = head_of(trainer)
    own_tower = learner.image_clip is not clip
    by_image = head.class_vectors is None
    plain = files.is_plain(clip)
    if with_backbone and not plain:
        raise UserError(
            f"--with-backbone: the weights of {cfg.MODEL.BACKBONE.NAME} are not put into a file, as another library builds "
            "it; leave the flag out, and the file names and verifies it"
        )
    tensors = {f"head.{name}": value for name, value in head.tensors().items()}
    prompts = learner.visual_prompts()
    if prompts and prompts[0] is not None:
        tensors["prompts.first"] = prompts[0]
        deep = prompts[1] if len(prompts) > 1 else ()
        tensors |= {f"prompts.deep.{i}": value for i, value in enumerate(deep)}
    if by_image:
        tensors |= {f"learner.{name}": value for name, value in learner.state_dict().items()}
    if own_tower or with_backbone:
        tower = learner.image_clip.visual.state_dict()
        tensors |= {f"tower.{name}": value for name, value in tower.items()}
    if with_backbone and by_image:
        text = {name: value for name, value in clip.state_dict().items() if not name.startswith("visual.")}
        tensors |= {f"text.{name}": value for name, value in text.items()}
    keys = cfg.MODEL.BACKBONE
    card = files.Card(
        classnames=list(trainer.dataset.classnames),
        template=trainer.dataset.template,
        backbone={
            "name": keys.NAME,
            "path": keys.PATH,
            "setting": keys.ACTIVATION,
            "activation": files.activation_of(clip),
            "image_digest": "" if own_tower or with_backbone else digest(clip.visual),
            "text_digest": files.text_digest(clip) if by_image and not with_backbone else "",
            "shape": dataclasses.asdict(clip.shape) if plain else None,
        },
        input=files.section(cfg, "INPUT"),
        members=head.members,
        aggregate=head.aggregate,
        learner={"trainer": trainer.base_name, "keys": files.section(cfg, "TRAINER")} if by_image else {},
        made_from={
            "oodprompt": __version__,
            "trainer": cfg.TRAINER.NAME,
            "base": trainer.base_name,
            "stack": list(cfg.TRAINER.STACK),
            "dataset": cfg.DATASET.NAME,
            "checkpoint": Path(trainer.evaluated_checkpoint).name,
        },
    )
    return card, tensors


@torch.no_grad()
def head_of(trainer: PromptTrainer) -> Head:
    """The prediction of a run in tensors."""
    z = torch.nn.functional.normalize(torch.ones(2, trainer.clip.shape.embed_dim, device=trainer.device), dim=-1)
    alignment = trainer.learner(z)
    text = alignment.text_features
    head = Head(alignment.logit_scale.float(), text.float() if text.ndim == 2 else None)
    for debiaser in trainer.debiasers:
        head = debiaser.head(head)
    return head


def _some_images(trainer: PromptTrainer) -> list[str]:
    """Paths of test images, or of training images where there are none, spread over the split."""
    if not getattr(trainer.dataset, "has_pixels", True):
        raise UserError("the data set has image features alone: name some images to check the file on (--images)")
    data = trainer.dataset.test or trainer.dataset.train_x
    places = np.unique(np.linspace(0, len(data) - 1, IMAGES).round().astype(int))
    return [data[int(i)].impath for i in places]


def _difference(found: Tensor, expected: Tensor, place: Path) -> float:
    """The largest difference of a probability; ``UserError`` above the limit."""
    difference = float((found - expected).abs().max())
    if not difference <= LIMIT:
        raise UserError(
            f"{place} would give other probabilities than the trained model, by up to {difference:.1e} (limit {LIMIT:.0e}); "
            "nothing is written. Report this with the run's config.yaml"
        )
    return difference


# --- ONNX ------------------------------------------------------------------------------------------------------------


def _need_onnx() -> None:
    """``UserError`` where the packages of the extra [onnx] are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"--onnx needs the package {error.name}: pip install 'oodprompt[onnx]'") from error


def write_onnx(classifier: Classifier, path: Path) -> None:
    """The ONNX model of a classifier: "pixels" uint8 [batch, 3, R, R] -> "probabilities" float32 [batch, C].

    Pixels are those of images that were resized and cut as ``Classifier.pixels_of`` does. The names of the classes are in
    the metadata, under "classnames".
    """
    size = tuple(classifier.card.input["SIZE"])
    example = torch.zeros(3, 3, *size, dtype=torch.uint8)
    model = classifier.model
    parts = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if parts > _ONNX_BYTES:
        raise UserError(f"--onnx: the towers have {_size(parts)}, and an ONNX file holds 2 GB; leave --onnx out")
    with torch.no_grad(), _quiet():
        model.clip.activation_limit = 2**62  # the graph has one way for any number of images
        model(example)  # what is kept between calls is made of real tensors
        names: Any = {"input_names": ["pixels"], "output_names": ["probabilities"]}
        program: Any = torch.onnx.export(_traced(model, example), dynamo=True, verbose=False, **names)
        program.model.metadata_props["classnames"] = json.dumps(classifier.classnames)
        program.save(str(path), external_data=False)


def _traced(model: Deployed, example: Tensor) -> torch.export.ExportedProgram:
    """The graph of a model, for any number of images. ``UserError`` where its operations cannot be recorded."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=2**16)},)
    reasons = []
    for strict in (False, True):  # the second follows Python code that asks for the number of images, and takes longer
        try:
            return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=strict)
        except Exception as error:  # whatever a tower's code makes the tracer raise
            reasons.append(" ".join(str(error).split())[:200])
    raise UserError(f"--onnx: PyTorch cannot record this model as a graph ({reasons[0]}); leave --onnx out")


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter's own words stay away."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _check_onnx(pixels: Tensor, expected: Tensor, file: Path, place: Path) -> float:
    """The largest difference of onnxruntime from the ``expected`` probabilities, over several batch sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    parts = [part for part in (pixels[:1], pixels[1:8], pixels[8:]) if len(part)]
    found = [torch.from_numpy(session.run(None, {"pixels": part.numpy()})[0]) for part in parts]
    return _difference(torch.cat(found), expected, place)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
