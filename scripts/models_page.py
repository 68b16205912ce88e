"""Write docs/models.md, the page of models:  python scripts/models_page.py"""

import pathlib
import sys
import warnings

from jaxcifar import command


def main():
    """Write the page."""
    command.Parser(__doc__).parse_args()
    from jaxcifar.report import measured, models_page
    root = pathlib.Path(__file__).resolve().parent.parent
    path = root / "docs" / "models.md"
    with warnings.catch_warnings():  # ImageNet's stems are described at 32x32 too
        warnings.simplefilter("ignore", UserWarning)
        text = models_page.page(measured.accuracies(root), measured.training_speeds(root))
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(command.run(main))
