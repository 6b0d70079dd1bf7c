"""`gigacam train`: the command, and what it asks of the trainer."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from flows.options import INTERRUPTED, AsJson, Out


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def train(
        csv: Annotated[
            str,
            typer.Argument(
                metavar="CSV",
                help="Slides: columns image, label, patient; may have split (train, val, test) and features (a file each).",
                show_default=False,
            ),
        ],
        model: Annotated[str, typer.Option("--model", help="Card of the encoder that made the features.")],
        out: Out,
        features: Annotated[
            str,
            typer.Option(
                "--features",
                help="Folder with features named like each image: .h5 (CLAM, TRIDENT), .npy, or NAME-*/tiles.zarr of a run. "
                "Default: the CSV says where.",
            ),
        ] = "",
        classes: Annotated[
            str, typer.Option("--classes", help="Labels in the order of the logits. Default: as they sort.")
        ] = "",
        head: Annotated[str, typer.Option("--head", help="Bag head: abmil, abmil_gated, clam_sb, clam_mb, dsmil, transmil, additive, mean, max.")] = "abmil",
        args: Annotated[str, typer.Option("--args", help="Arguments of the head, as JSON. Default: the head's, dropout 0.25.")] = "",
        mhim: Annotated[
            str,
            typer.Option("--mhim", help="Masked hard instance mining: v1, v1-tcga, v1-transmil, v1-tcga-transmil or v2. Default: none."),
        ] = "",
        loss: Annotated[
            str,
            typer.Option("--loss", help="cross_entropy, or AnyLoss: any_accuracy, any_balanced_accuracy, any_f1, any_gmean."),
        ] = "cross_entropy",
        folds: Annotated[int, typer.Option("--folds", help="Of the cross-validation, by patient; 1: a fifth is held out.")] = 5,
        epochs: Annotated[int, typer.Option("--epochs", help="At most.")] = 200,
        patience: Annotated[int, typer.Option("--patience", help="Epochs without a lower validation loss before it stops.")] = 20,
        learning_rate: Annotated[float, typer.Option("--learning-rate", help="At the start; falls by half a cosine.")] = 2e-4,
        class_weights: Annotated[str, typer.Option("--class-weights", help="balanced or none.")] = "balanced",
        seed: Annotated[int, typer.Option("--seed", help="Of folds, weights, order and masks.")] = 0,
        fresh: Annotated[bool, typer.Option("--fresh", help="Train anew where OUT holds a training.")] = False,
        as_json: AsJson = False,
    ) -> None:  # fmt: skip
        """Train a bag head on the features of labelled slides: cross-validation, figures, a model card."""
        flags = locals()
        from flows.progress import listener
        from flows.train import run_training, train_lines, train_request

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        request = train_request(flags)
        told = listener(as_json)
        try:
            report = run_training(request, told, fresh)
        except KeyboardInterrupt:
            print(INTERRUPTED, file=sys.stderr)
            raise typer.Exit(130) from None
        finally:
            told.close()
        print(report.model_dump_json() if as_json else "\n".join(train_lines(report)))
