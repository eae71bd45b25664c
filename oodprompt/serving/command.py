"""``oodprompt export``: a trained run as one file, for deployment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oodprompt.config import extensions
from oodprompt.log import show_messages
from oodprompt.terminal import Parser, exit_status

DESCRIPTION = """Write a trained model as one file: ``oodprompt export --model-dir RUN --output model.safetensors``.

``oodprompt predict --model-file model.safetensors IMAGES`` and ``oodprompt.Classifier.load`` take the file. The run and its
data set are then not needed any more. The backbone is named in the file, and verified when it is loaded. Both files are
checked against the run on real images before they are kept.
"""


def build_parser() -> Parser:
    parser = Parser(prog="oodprompt export", description=DESCRIPTION)
    parser.add_argument("--model-dir", type=Path, required=True, help="output folder of a run")
    parser.add_argument("--load-epoch", type=int, help="epoch whose model is taken; else the best model, else the last")
    parser.add_argument("--output", type=Path, default=Path("model.safetensors"), help="file that is written")
    parser.add_argument("--onnx", type=Path, help="ONNX model that is written too, from pixels to probabilities")
    parser.add_argument("--with-backbone", action="store_true", help="put the backbone's weights into the file")
    parser.add_argument("--root", help="folder that holds the data sets, where it is not the run's")
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="images to check on; else the run's own")
    extensions.add_flag(parser)
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Export a model and say how far it is from the run."""
    show_messages()
    args = build_parser().parse_args(argv)
    extensions.add(args.imports)
    from oodprompt.serving.exporting import export  # here: it takes PyTorch, for which --help does not wait

    report = export(
        args.model_dir, args.output, args.onnx or "", args.with_backbone, args.load_epoch, args.root, args.images
    )
    print(report)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
